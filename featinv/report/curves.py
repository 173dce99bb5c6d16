"""One figure of quality against sampling steps and against training images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featinv.errors import UserError
from featinv.files import write_json
from featinv.report.benchmark import picture_rows
from featinv.report.canvas import canvas, save_figure
from featinv.report.page import figure_table, file_tag, picture_table, write_page

METRICS = ("share", "referee_cosine", "top5_agreement", "psnr", "kid")
Figures = Mapping[str, Mapping[str, Any]]
Log = list[dict[str, Any]]


def row_name(steps: int) -> str:
    """The benchmark's row of so many sampling steps."""
    return f"steps-{steps}"


def read_log(path: Path) -> Log:
    """Lines of a probe log (see `featinv.training.probe`): images seen, share, cosine, floor, ceiling, minutes.

    Raises:
        UserError: If it is missing, empty or damaged.
    """
    if not path.is_file():
        raise UserError(f"there is no log {path}; give a run's folder that train.py made, or a .jsonl file.")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); leave it out.") from error
    if not lines or any("images" not in line or "share" not in line for line in lines):
        raise UserError(f"{path} is no probe log with images and share; leave it out.")
    return lines


def chosen_metrics(content: Mapping[str, Any], asked: Sequence[str] | None) -> list[str]:
    """Metrics of a metrics.json to draw: those asked for, or those of `METRICS` that every row has.

    Raises:
        UserError: If one asked for is not there.
    """
    rows = list(content["inverters"].values())
    known = [metric for metric in rows[0] if all(metric in figures for figures in rows)]
    for metric in asked or ():
        if metric not in known:
            raise UserError(f"the benchmark has no {metric!r}; there are {', '.join(sorted(known))}.")
    return list(asked) if asked else [name for metric in METRICS for name in known if _is(name, metric)]


def _is(name: str, metric: str) -> bool:
    """Whether a metric is this one, in whatever network ("kid_mobilenetv2")."""
    return name == metric or (metric == "kid" and name.startswith("kid_"))


def draw_curves(
    path: Path, content: Mapping[str, Any] | None, metrics: Sequence[str], logs: Mapping[str, Log], title: str
) -> None:
    """A panel for each metric over sampling steps, and one of the share over training images; atomically.

    Args:
        path: PNG.
        content: A metrics.json with the rows of `row_name`; None leaves these panels out.
        metrics: Of these rows.
        logs: Run -> lines of its probe log; none leaves the last panel out.
        title: Above all panels.
    """
    panels = (len(metrics) if content else 0) + bool(logs)
    figure = canvas(3.6 * max(panels, 1.5), 3.4)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if content:
        for metric in metrics:
            _draw_steps(axes.pop(0), content, metric)
    if logs:
        _draw_training(axes.pop(0), logs)
    figure.suptitle(title)
    save_figure(figure, path, dpi=120)


def steps_of(content: Mapping[str, Any]) -> dict[int, Figures]:
    """Sampling steps -> figures, fewest first."""
    rows = {int(name.rpartition("-")[2]): figures for name, figures in content["inverters"].items()}
    return dict(sorted(rows.items()))


def _draw_steps(axis: Any, content: Mapping[str, Any], metric: str) -> None:
    points = {k: f[metric] for k, f in steps_of(content).items() if f[metric]["value"] is not None}
    steps, values = list(points), [f["value"] for f in points.values()]
    axis.plot(steps, values, marker="o", markersize=4)
    # A figure without bounds (a single image) has a band of no width.
    low, high = ([f["value"] if f[side] is None else f[side] for f in points.values()] for side in ("low", "high"))
    axis.fill_between(steps, low, high, alpha=0.2)
    for side, style in (("floor", ":"), ("ceiling", "--")):
        value = (content[side].get(metric) or {}).get("value")
        if value is not None:
            axis.axhline(value, color="grey", linestyle=style, linewidth=1, label=side)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)
    axis.set_xscale("log")
    axis.set_xticks(steps, [str(k) for k in steps], minor=False)
    axis.set_xticks([], minor=True)
    axis.set(xlabel="sampling steps", title=metric)
    axis.grid(alpha=0.3)


def _draw_training(axis: Any, logs: Mapping[str, Log]) -> None:
    for name, lines in logs.items():
        axis.plot([x["images"] for x in lines], [x["share"] for x in lines], marker=".", label=name[-36:])
    axis.set(xlabel="training images seen", title="share, during training")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)


def write_curves(
    folder: str | Path,
    content: Mapping[str, Any] | None,
    logs: Mapping[str, Log],
    title: str,
    metrics: Sequence[str] | None = None,
    shown: int = 12,
) -> None:
    """Write curves.json, curves.png and report.html.

    Args:
        folder: Where they go; the benchmark's pictures lie in its `steps`.
        content: Of that benchmark's metrics.json, or None.
        logs: Run -> lines of its probe log.
        title: Of figure and page.
        metrics: Panels; by default those of `METRICS` that there are.
        shown: Pictures of a row on the page.

    Raises:
        UserError: If there is nothing to draw, or a metric is not there.
    """
    folder = Path(folder)
    if content is None and not logs:
        raise UserError("there is nothing to draw: give an inverter or runs.")
    chosen = chosen_metrics(content, metrics) if content else []
    draw_curves(folder / "curves.png", content, chosen, logs, title)
    sections = [("Curves", file_tag(folder / "curves.png", title))]
    found: dict[str, Any] = {"steps": None, "training": dict(logs)}
    if content:
        points = steps_of(content)
        found["steps"] = {
            **{key: content[key] for key in ("meta", "floor", "ceiling")},
            "points": [{"num_inference_steps": k, "figures": figures} for k, figures in points.items()],
        }
        rows: dict[str, Figures] = {"floor": content["floor"], "ceiling": content["ceiling"]}
        rows |= {f"{k} steps": figures for k, figures in points.items()}
        names = [row_name(k) for k in points]
        pictures = picture_rows(folder / "steps", names, range(min(shown, content["meta"]["images"])))
        sections += [("Sampling steps", figure_table(rows, chosen)), ("Pictures", picture_table(pictures))]
    if logs:
        last = {
            name: {"share": _bare(lines, "share"), "cosine": _bare(lines, "cosine")} for name, lines in logs.items()
        }
        sections.append(("End of training", figure_table(last, ["share", "cosine"])))
    write_json(folder / "curves.json", found)
    write_page(folder / "report.html", title, sections)


def _bare(lines: Log, key: str) -> dict[str, Any]:
    """The last line's figure, in the shape of a metric without bounds; n is the images seen."""
    return {"value": lines[-1].get(key), "low": None, "high": None, "n": lines[-1]["images"]}
