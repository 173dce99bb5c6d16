"""The pages and tables of a benchmark."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featinv.files import write_text
from featinv.inverters.reconstruct import Reconstructions
from featinv.report.page import figure_table, picture_table, write_page

COLUMNS: tuple[str, ...] = (
    "share",
    "cosine",
    "cosine_median",
    "cosine_q05",
    "referee_cosine",
    "top1_agreement",
    "top5_agreement",
)
COLUMNS += ("psnr", "ssim", "fd_mobilenetv2", "kid_mobilenetv2", "precision_mobilenetv2", "recall_mobilenetv2")


def shown_columns(content: Mapping[str, Any]) -> list[str]:
    """The metrics of the main table that this run has."""
    known = {metric for figures in content["inverters"].values() for metric in figures}
    return [metric for metric in COLUMNS if metric in known]


def table_rows(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Floor, ceiling and one row for each inverter."""
    rows = {"floor (shuffled pairs)": content["floor"]}
    if content["ceiling"]:
        rows["ceiling (first stage)"] = content["ceiling"]
    return rows | dict(content["inverters"])


def write_tables(folder: Path, content: Mapping[str, Any]) -> None:
    """Write table.md (main columns) and table.csv (every figure with its interval)."""
    metrics = shown_columns(content)
    lines = ["| | " + " | ".join(metrics) + " | n |", "|---" * (len(metrics) + 2) + "|"]
    for name, figures in table_rows(content).items():
        cells = [_cell(figures.get(metric)) for metric in metrics]
        n = next((f["n"] for f in figures.values()), "")
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {n} |")
    write_text(folder / "table.md", "\n".join(lines) + "\n")
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["row", "metric", "value", "low", "high", "n"])
    for name, figures in table_rows(content).items():
        for metric, figure in figures.items():
            writer.writerow([name, metric, figure["value"], figure["low"], figure["high"], figure["n"]])
    write_text(folder / "table.csv", buffer.getvalue())


def _cell(figure: Mapping[str, Any] | None) -> str:
    return "" if not figure or figure["value"] is None else f"{figure['value']:.3f}"


def picture_rows(folder: Path, names: Sequence[str], columns: Sequence[int]) -> dict[str, Tensor]:
    """Originals and each inverter's samples at the given positions; a blank where an inverter has none."""
    made = {name: Reconstructions(folder / name) for name in names}
    longest = max(made.values(), key=lambda m: len(m.ids))
    rows = {"original": longest.originals()[list(columns)]}
    for name, m in made.items():
        for k in range(len(m.manifest["images"][0]["samples"])):
            samples = m.samples(k)
            blank = torch.full_like(samples[0], torch.nan)
            label = name if k == 0 else f"{name}, sample {k + 1}"
            rows[label] = torch.stack([samples[i] if i < len(samples) else blank for i in columns])
    return rows


def factor_section(content: Mapping[str, Any]) -> str:
    """The table of factor recovery."""
    rows = {**({"ceiling (first stage)": content["ceiling"]} if content["ceiling"] else {}), **content["inverters"]}
    names = sorted({m for figures in rows.values() for m in figures if m.startswith("factor_")})
    if not names:
        return ""
    by_factor = {
        name.removeprefix("factor_"): {row: figures[name] for row, figures in rows.items() if name in figures}
        for name in names
    }
    note = "<p class='note'>Accuracy of classes and R² of numbers, by a linear probe fitted to originals.</p>"
    return note + figure_table(by_factor, list(rows))


def benchmark_sections(folder: Path, content: Mapping[str, Any], shown: int = 12) -> list[tuple[str, str]]:
    """Pictures, the main table, the equal subset, factor recovery, and how it was computed."""
    names = list(content["inverters"])
    fewest = min(len(Reconstructions(folder / name).ids) for name in names)
    columns = list(range(min(shown, max(fewest, 1))))
    sections = [
        ("Pictures", picture_table(picture_rows(folder, names, columns))),
        ("Figures", _explained(figure_table(table_rows(content), shown_columns(content)))),
    ]
    if "subset" in content:
        subset = figure_table(content["subset"]["inverters"], shown_columns(content))
        sections.append((f"The {content['subset']['n']} images that every inverter has", subset))
    factors = factor_section(content)
    if factors:
        sections.append(("What can be read from the reconstructions", factors))
    meta = "\n".join(f"{key}: {value}" for key, value in content["meta"].items())
    return [*sections, ("How", f"<pre>{html.escape(meta)}</pre>")]


def _explained(table: str) -> str:
    return table + (
        "<p class='note'>share = (cosine − floor) / (ceiling − floor). Brackets: bootstrap 95 % intervals. Metrics "
        "that carry a network's name were computed with it, not with Inception. No inverter saw the referee network. "
        "cosine_median and cosine_q05 are over positions.</p>"
    )


def write_benchmark(folder: str | Path, content: Mapping[str, Any], title: str) -> None:
    """Write table.md, table.csv and report.html beside metrics.json."""
    folder = Path(folder)
    write_tables(folder, content)
    write_page(folder / "report.html", title, benchmark_sections(folder, content))
