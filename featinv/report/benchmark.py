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
from featinv.metrics.collection import METRICS
from featinv.report.page import figure_table, figure_text, picture_table, write_page

COLUMNS: tuple[str, ...] = (
    *("share", "cosine", "own_share", "own_cosine", "cosine_median", "cosine_q05", "l2", "referee_cosine"),
    *("top1_agreement", "top5_agreement", "referee_top1_agreement", "referee_top5_agreement"),
    *("label_accuracy", "referee_label_accuracy", "psnr", "ssim", "lpips"),
)
DISTRIBUTION_COLUMNS = ("fid", "kid", "fd_", "kid_", "precision", "recall", "identified")
DIVERSITY_COLUMNS = ("pixel_diversity", "diversity_")
Rows = dict[str, Mapping[str, Any]]


def per_image_columns() -> tuple[str, ...]:
    """The metrics of single images in the order of the tables: `COLUMNS`, then what `METRICS` was extended by."""
    return COLUMNS + tuple(metric for metric in METRICS if metric not in COLUMNS)


def shown_columns(content: Mapping[str, Any]) -> list[str]:
    """The metrics of the main table that this run has; new ones come last, factors have a table of their own."""
    known = list(dict.fromkeys(metric for figures in content["inverters"].values() for metric in figures))
    sets = [m for start in (*DISTRIBUTION_COLUMNS, *DIVERSITY_COLUMNS) for m in known if _is_of(m, start)]
    single = [m for m in per_image_columns() if m in known]
    return list(dict.fromkeys([*single, *sets, *(m for m in known if not m.startswith("factor_"))]))


def _is_of(metric: str, start: str) -> bool:
    return metric.startswith(start) if start.endswith("_") else metric == start or metric.startswith(f"{start}_")


def table_rows(content: Mapping[str, Any]) -> Rows:
    """Floors, ceiling and one row for each inverter."""
    rows: Rows = {"floor (shuffled pairs)": content["floor"]}
    if content.get("floor_same_class"):
        rows["floor (another of the class)"] = content["floor_same_class"]
    if content["ceiling"]:
        rows["ceiling (first stage)"] = content["ceiling"]
    return rows | dict(content["inverters"])


def notes(content: Mapping[str, Any]) -> list[str]:
    """What must stand beside the figures: numbers, versions, warnings, what was skipped and why."""
    meta = content.get("meta", {})
    lines = list(meta.get("warnings", []))
    for network in meta.get("distribution", []):
        lines.append(
            f"Distribution metrics in {network['network']}: N = {network['n_real']} originals and as many "
            f"reconstructions (fewer where the row's n says so), antialias = {network['antialias']}, "
            f"torch {network['torch']}, torchmetrics {network['torchmetrics']}."
        )
    return lines + [f"Skipped {name}: {why}" for name, why in meta.get("skipped", {}).items()]


def write_tables(folder: Path, content: Mapping[str, Any]) -> None:
    """Write table.md (main columns, and what must stand beside them) and table.csv (every figure with its interval)."""
    metrics = shown_columns(content)
    lines = ["| | " + " | ".join(metrics) + " | n |", "|---" * (len(metrics) + 2) + "|"]
    for name, figures in table_rows(content).items():
        cells = [_cell(figures.get(metric)) for metric in metrics]
        n = next((f["n"] for f in figures.values()), "")
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {n} |")
    lines += [f"\n{note}" for note in notes(content)]
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
    rows = {"original": longest.originals(columns)}
    for name, m in made.items():
        there = [i for i in columns if i < len(m.ids)]
        for k in range(m.samples_each):
            label = name if k == 0 else f"{name}, sample {k + 1}"
            pictures = torch.full_like(rows["original"], torch.nan)
            if there:
                pictures[[i < len(m.ids) for i in columns]] = m.samples(k, there)
            rows[label] = pictures
    return rows


def case_section(folder: Path, content: Mapping[str, Any]) -> str:
    """Worst, median and best images of every inverter, original above reconstruction."""
    parts = []
    for name, cases in content["cases"].items():
        made = Reconstructions(folder / name)
        position = {image: i for i, image in enumerate(made.ids)}
        rows: dict[str, Tensor] = {}
        for kind in ("worst", "median", "best"):
            chosen = [position[image] for image in cases[kind]]
            rows |= {f"{kind}: original": made.originals(chosen), f"{kind}: {name}": made.samples(0, chosen)}
        parts.append(f"<h3>{html.escape(name)}, by {cases['metric']}</h3>{picture_table(rows)}")
    return "".join(parts)


def difference_section(content: Mapping[str, Any]) -> str:
    """Every inverter minus the first one; differences whose interval holds 0 are said to be none."""
    differences = content["differences"]
    if not differences["rows"]:
        return ""
    metrics = [m for m in per_image_columns() if any(m in figures for figures in differences["rows"].values())]
    against = html.escape(differences["against"])
    note = f"<p class='note'>Row minus {against}, image by image; n.s.: the interval holds 0.</p>"
    return note + figure_table(differences["rows"], metrics, _difference_text)


def _difference_text(figure: Mapping[str, Any] | None) -> str:
    insignificant = figure and figure.get("low") is not None and figure["low"] <= 0 <= figure["high"]
    return figure_text(figure) + (" n.s." if insignificant else "")


def factor_section(content: Mapping[str, Any]) -> str:
    """The table of factor recovery, beside what probes read from the originals and from the features themselves."""
    rows = {f"probe on the {name}": figures for name, figures in content.get("factors", {}).items()}
    rows |= {"ceiling (first stage)": content["ceiling"]} if content["ceiling"] else {}
    rows |= content["inverters"]
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
    """Pictures, tables, cases, differences, the equal subset, factor recovery, and how it was computed."""
    names = list(content["inverters"])
    fewest = min(len(Reconstructions(folder / name).ids) for name in names)
    columns = list(range(min(shown, max(fewest, 1))))
    metrics = shown_columns(content)
    paired = [m for m in metrics if m in per_image_columns()]
    sections = [
        ("Pictures", picture_table(picture_rows(folder, names, columns))),
        ("Figures", _explained(figure_table(table_rows(content), paired))),
    ]
    if len(paired) < len(metrics):
        sets = figure_table(table_rows(content), [m for m in metrics if m not in paired])
        sections.append(
            ("Sets of images", sets + "".join(f"<p class='note'>{html.escape(n)}</p>" for n in notes(content)))
        )
    if "subset" in content:
        subset = figure_table(content["subset"]["inverters"], metrics)
        sections.append((f"The {content['subset']['n']} images that every inverter has", subset))
    for title, section in (
        ("Worst, median and best", case_section(folder, content)),
        ("Differences", difference_section(content)),
        ("What can be read from the reconstructions", factor_section(content)),
    ):
        sections += [(title, section)] if section else []
    meta = "\n".join(f"{key}: {value}" for key, value in content["meta"].items())
    return [*sections, ("How", f"<pre>{html.escape(meta)}</pre>")]


def _explained(table: str) -> str:
    return table + (
        "<p class='note'>share = (cosine − floor) / (ceiling − floor); own_share and own_cosine are those in "
        "the layer that the row inverts, where that is not the judging one. Brackets: bootstrap 95 % intervals. No "
        "inverter saw the referee network. cosine_median and cosine_q05 are over positions. Metrics that carry a "
        "network's name were computed with it, not with Inception; identified is the share of images whose "
        "reconstruction is nearer to its own original than to any other in that network.</p>"
    )


def write_benchmark(folder: str | Path, content: Mapping[str, Any], title: str) -> None:
    """Write table.md, table.csv and report.html beside metrics.json."""
    folder = Path(folder)
    write_tables(folder, content)
    write_page(folder / "report.html", title, benchmark_sections(folder, content))
