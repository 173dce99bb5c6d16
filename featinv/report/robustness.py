"""The page and figure of a robustness run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featinv.files import write_text
from featinv.inverters.reconstruct import Reconstructions
from featinv.report.canvas import canvas, save_figure
from featinv.report.page import figure_table, file_tag, picture_table, write_page

SHOWN = ("cosine", "top1_agreement", "referee_cosine", "psnr")
AGAINST = {
    "given": "reconstruction / picture given",
    "clean": "reconstruction / clean picture",
    "input": "picture given / clean picture",
}


def table_rows(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """One row for each condition; columns "METRIC, WHAT" for each pair that is compared."""
    rows = {}
    for name, found in content["conditions"].items():
        rows[name] = {f"{m}, {a}": found[a][m] for m in SHOWN for a in AGAINST if a in found and m in found[a]}
    return rows


def write_table(folder: Path, content: Mapping[str, Any]) -> None:
    """Write table.md."""
    rows = table_rows(content)
    metrics = list(dict.fromkeys(metric for figures in rows.values() for metric in figures))
    lines = ["| | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for name, figures in rows.items():
        cells = [f"{figures[m]['value']:.3f}" if m in figures else "" for m in metrics]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [f"\nskipped: {line}" for line in content["meta"].get("skipped", [])]
    write_text(folder / "table.md", "\n".join(lines) + "\n")


def draw_curves(path: Path, content: Mapping[str, Any], metric: str = "cosine") -> bool:
    """One panel for each corruption: the metric over severity, for each pair; False if there are no severities."""
    families: dict[str, list[Mapping[str, Any]]] = {}
    for name, found in content["conditions"].items():
        if found["severity"] is not None:
            families.setdefault(name.rsplit("-", 1)[0], []).append(found)
    if not families:
        return False
    columns = min(len(families), 5)
    rows = -(-len(families) // columns)
    figure = canvas(2.6 * columns, 2.2 * rows, layout=None)
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(families) :]:
        axis.set_visible(False)
    for axis, (family, members) in zip(axes.flat, families.items(), strict=False):
        for against, label in AGAINST.items():
            points = [(m["severity"], m[against][metric]) for m in members]
            value = [p["value"] for _, p in points]
            spread = [[p["value"] - p["low"] for _, p in points], [p["high"] - p["value"] for _, p in points]]
            axis.errorbar([s for s, _ in points], value, spread, marker="o", markersize=3, capsize=2, label=label)
        axis.set_title(family, fontsize=9)
        axis.set_xticks(range(1, 6))
    axes[0][0].set_ylabel(metric)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.06 if rows > 1 else 0.12, 1, 1))
    save_figure(figure, path)
    return True


def pictures(folder: Path, content: Mapping[str, Any], shown: int = 8) -> list[tuple[str, str]]:
    """For each kind of condition, the pictures given above their reconstructions."""
    by_kind: dict[str, dict[str, Any]] = {}
    for name, found in content["conditions"].items():
        made = Reconstructions(folder / "reconstructions" / name)
        chosen = range(min(shown, len(made.ids)))
        rows = by_kind.setdefault(found["kind"], {})
        rows[f"{name}: given"], rows[f"{name}: drawn"] = made.originals(chosen), made.samples(0, chosen)
    return [(f"Pictures: {kind}", picture_table(rows, scale=1)) for kind, rows in by_kind.items()]


def write_robustness(folder: str | Path, content: Mapping[str, Any], title: str) -> None:
    """Write table.md, curves.png and report.html beside robustness.json."""
    folder = Path(folder)
    write_table(folder, content)
    rows = table_rows(content)
    metrics = list(dict.fromkeys(metric for figures in rows.values() for metric in figures))
    note = "".join(f"<p class='note'>{name}: {meaning}</p>" for name, meaning in AGAINST.items())
    sections = [("Figures", figure_table(rows, metrics) + note)]
    if draw_curves(folder / "curves.png", content):
        sections.insert(0, ("Cosine over severity", file_tag(folder / "curves.png", "cosine over severity")))
    write_page(folder / "report.html", title, [*sections, *pictures(folder, content)])
