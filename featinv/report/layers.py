"""One figure of several benchmarks: what survives with depth, a curve for each inverter and network."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featinv.errors import UserError
from featinv.files import write_text
from featinv.report.canvas import canvas, save_figure
from featinv.report.page import figure_table, file_tag, write_page

METRICS = ("psnr", "ssim", "referee_cosine", "factor_accuracy", "identified")
TITLES = {"identified": "leak rate (own original identified)"}
Figures = dict[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Point:
    """A row of a benchmark: its curve, its layer, that layer's depth in 0..1 (None if unknown), figures."""

    curve: str
    layer: str
    depth: float | None
    figures: Figures


def layer_points(content: Mapping[str, Any]) -> list[Point]:
    """The points of a metrics.json.

    Raises:
        UserError: If it was written before rows had layers.
    """
    described = content["meta"].get("rows")
    if described is None:
        raise UserError("this metrics.json does not say which layer each row inverts; evaluate again.")
    points = []
    for name, figures in content["inverters"].items():
        row = described[name]
        curve = f"{_kind(name, row['layer'])}, {row['network']}"
        points.append(Point(curve, row["layer"], row["depth"], _with_identified(figures)))
    return points


def _kind(name: str, layer: str) -> str:
    """A row's name without its layer: rows that differ in nothing else make one curve."""
    # What matches the pictures to the features, as "+refined", stands behind the layer.
    pattern = r"[-_@/]?" + r"[._-]".join(re.escape(part) for part in re.split(r"[._-]", layer)) + r"(?=(\+[a-z]+)*$)"
    return re.sub(pattern, "", name) or name


def _with_identified(figures: Mapping[str, Any]) -> Figures:
    """Figures, and "identified" whatever network it was found in."""
    found: Figures = dict(figures)
    for name, figure in figures.items():
        if name.startswith("identified_"):
            found.setdefault("identified", figure)
    return found


def _ordered(points: Sequence[Point]) -> dict[str, list[Point]]:
    curves: dict[str, list[Point]] = {}
    for point in points:
        curves.setdefault(point.curve, []).append(point)
    listed = {name: sorted(members, key=lambda p: (p.depth is None, p.depth or 0)) for name, members in curves.items()}
    for name, members in listed.items():
        layers = [p.layer for p in members]
        for layer in layers:
            if layers.count(layer) > 1:
                raise UserError(f"{name} has layer {layer!r} more than once; leave one of the benchmarks out.")
    return listed


def _distance(figure: Mapping[str, Any], side: str) -> float:
    """From a value to its bound; 0 where there is none."""
    return 0.0 if figure[side] is None else abs(figure[side] - figure["value"])


def draw_layers(path: Path, curves: Mapping[str, Sequence[Point]], metrics: Sequence[str], title: str) -> None:
    """A panel for each metric, a line with intervals for each curve; layers in the order of their depth."""
    figure = canvas(3.4 * len(metrics), 3.6, layout=None)
    axes = figure.subplots(1, len(metrics), squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        named: set[tuple[float, str]] = set()
        for name, members in curves.items():
            points = [(p, p.figures[metric]) for p in members if p.figures.get(metric, {}).get("value") is not None]
            places = [i if p.depth is None else p.depth for i, (p, _) in enumerate(points)]
            value = [f["value"] for _, f in points]
            spread = [[_distance(f, side) for _, f in points] for side in ("low", "high")]
            axis.errorbar(places, value, spread, marker="o", markersize=4, capsize=2, label=name)
            named |= {(place, point.layer) for (point, _), place in zip(points, places, strict=True)}
        axis.margins(y=0.2)  # room for the names
        _name_places(axis, sorted(named))
        axis.set_title(TITLES.get(metric, metric))
        axis.set_xlabel("depth (share of the modules before)")
    figure.suptitle(title)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    save_figure(figure, path, dpi=120)


def _name_places(axis: Any, named: Sequence[tuple[float, str]], apart: float = 0.03) -> None:
    """Layers' names along the lower edge, those that would lie over another one left out."""
    last = -apart
    for place, layer in named:
        if place - last >= apart:
            last = place
            across = axis.get_xaxis_transform()
            axis.text(place, 0.02, layer, transform=across, rotation=90, ha="center", fontsize=6, color="grey")


def write_layers(folder: str | Path, points: Sequence[Point], metrics: Sequence[str] | None, title: str) -> None:
    """Write layers.png, layers.csv and report.html.

    Args:
        folder: Where they go.
        points: Of one or more benchmarks.
        metrics: Names in metrics.json, or "identified"; by default those of `METRICS` that are there.
        title: Of the figure and the page.

    Raises:
        UserError: If there is no point, no benchmark has a metric, or a curve has a layer twice.
    """
    folder = Path(folder)
    if not points:
        raise UserError("there is nothing to draw: give benchmarks=[FOLDER,FOLDER].")
    curves = _ordered(points)
    known = {metric for point in points for metric in point.figures}
    missing = [metric for metric in metrics or () if metric not in known]
    if missing:
        raise UserError(f"no row has {missing[0]!r}; there are {', '.join(sorted(known))}.")
    chosen = list(metrics or [metric for metric in METRICS if metric in known])
    if not chosen:
        raise UserError(f"no row has any of {', '.join(METRICS)}; choose metrics of {', '.join(sorted(known))}.")
    draw_layers(folder / "layers.png", curves, chosen, title)
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["curve", "layer", "depth", "metric", "value", "low", "high", "n"])
    rows = {}
    for name, members in curves.items():
        for point in members:
            rows[f"{name}, {point.layer}"] = {metric: point.figures.get(metric) for metric in chosen}
            for metric in chosen:
                f = point.figures.get(metric)
                if f:
                    writer.writerow([name, point.layer, point.depth, metric, f["value"], f["low"], f["high"], f["n"]])
    write_text(folder / "layers.csv", buffer.getvalue())
    sections = [("Curves", file_tag(folder / "layers.png", title)), ("Figures", figure_table(rows, chosen))]
    write_page(folder / "report.html", title, sections)
