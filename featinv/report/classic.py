"""Figures and page of the classic systems (`eval.classic`)."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featinv.attribution.diagnostics import ChannelActivity
from featinv.files import read_json
from featinv.report.canvas import canvas, save_figure
from featinv.report.page import figure_table, file_tag, write_page

TITLES = {
    "layers": "Inversion by optimisation, layer by layer",
    "attacks": "Adversarial examples, their transfer, and what is reconstructed from them",
    "grad_cam": "Grad-CAM on scenes whose object is known",
    "activity": "Dead channels and inactive units",
    "maximisation": "Activation maximisation, with and without the diffusion prior",
    "table": "Up-convolutional decoder, diffusion, optimisation",
}


def layer_figure(path: Path, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Cosine, PSNR, SSIM and leak over layers, with bootstrap intervals where there are some.

    Args:
        path: A PNG file.
        figures: Layer -> figures, in order of depth, as `study_layers` returns them.
    """
    layers = list(figures)
    figure = canvas(11, 2.8)
    panels = zip(figure.subplots(1, 4), ("cosine", "psnr", "ssim", "leak"), ("", " (dB)", "", " (top-1)"), strict=True)
    for axes, name, unit in panels:
        values = [figures[layer][name] for layer in layers]
        if name == "leak":
            axes.plot(layers, values, marker=".")
            axes.axhline(figures[layers[0]]["leak_chance"], color="grey", linestyle=":")
            axes.set_ylim(-0.05, 1.05)
        else:
            middle = [value["value"] for value in values]
            axes.plot(layers, middle, marker=".")
            axes.fill_between(layers, [v["low"] for v in values], [v["high"] for v in values], alpha=0.2)
        axes.set_title(name + unit)
        axes.tick_params(axis="x", labelrotation=60)
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def activity_figure(path: Path, found: Sequence[ChannelActivity]) -> None:
    """For each layer: every channel's share of active positions, sorted, and where in the map units are never active.

    Args:
        path: A PNG file.
        found: One for each layer.
    """
    figure = canvas(2.2 * len(found), 4.2)
    for column, activity in zip(figure.subplots(2, len(found), squeeze=False).T, found, strict=True):
        shares = activity.position_share.sort(descending=True).values
        column[0].fill_between(range(len(shares)), shares.tolist(), step="mid")
        column[0].set(title=f"{activity.layer}\n{activity.dead_count} of {len(shares)} dead", ylim=(0, 1))
        column[0].set_xlabel("channels, sorted")
        where = activity.inactive_units.double().mean(0)
        column[1].imshow(where.numpy(), vmin=0, vmax=1, cmap="magma")
        column[1].set(xticks=[], yticks=[], title=f"inactive units\n{100 * float(where.mean()):.1f} %")
    figure.axes[0].set_ylabel("share of positions active")
    save_figure(figure, path)


def read_classic(out: Path) -> dict[str, Any]:
    """The content of classic.json of earlier runs, empty if there is none."""
    path = out / "classic.json"
    return read_json(path) if path.is_file() else {}


def write_classic(out: Path, content: Mapping[str, Any]) -> None:
    """Write report.html from classic.json's content and the PNGs beside it."""
    sections = [("What should show", _claims(content))]
    for part, title in TITLES.items():
        if part in content:
            pictures = [out / f"{name}.png" for name in _PICTURES.get(part, (part,))]
            body = "".join(f"<p>{file_tag(path, title)}</p>" for path in pictures if path.is_file())
            sections.append((title, _tables(part, content[part]["figures"]) + body + _settings(content[part])))
    write_page(out / "report.html", "The classic systems", sections)


_PICTURES = {"layers": ("layer_curve", "layers")}


def _claims(content: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(claim['claim'])}</td><td>{claim['value']:.3f}</td><td>{claim['target']:.3f}</td>"
        f"<td>{'met' if claim['met'] else 'missed'}</td></tr>"
        for part in TITLES
        for claim in content.get(part, {}).get("claims", [])
    )
    head = "<tr><th>claim</th><th>measured</th><th>target</th><th></th></tr>"
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _plain_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Numbers without intervals."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["", *columns])
    body = "".join(
        f"<tr><td>{html.escape(label)}</td>" + "".join(f"<td>{_text(row.get(name))}</td>" for name in columns) + "</tr>"
        for label, row in rows.items()
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("value")
    if value is None or isinstance(value, str | bool | int):
        return "–" if value is None else str(value)
    return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))


def _tables(part: str, figures: Mapping[str, Any]) -> str:
    if part == "attacks":
        flipped = {
            attack: {judge: cell["flipped"] for judge, cell in row.items()}
            | {"target hit": figures["target_hit"].get(attack)}
            for attack, row in figures["table"].items()
        }
        clean = f"clean accuracy on {figures['images']} images: {figures['clean_accuracy']}"
        note = f"{clean}; below, the share flipped of those that were right before:"
        return f"<p class='note'>{html.escape(note)}</p>" + _plain_table(flipped)
    if part == "table":
        known = dict.fromkeys(metric for row in figures["inverters"].values() for metric in row)
        metrics = ["cosine", "referee_cosine", "psnr", "ssim", *(m for m in known if m.startswith("fd_"))]
        return figure_table(figures["inverters"], metrics) + _plain_table(
            {"seconds an image": figures["seconds_per_image"]}
        )
    if part == "grad_cam":
        counts = {name: {"found": row["found"], "inside / area": row["median_lift"]} for name, row in figures.items()}
        return _plain_table(counts)
    return _plain_table(figures)


def _settings(part: Mapping[str, Any]) -> str:
    return f"<p class='note'>{html.escape(json.dumps(part['settings'], default=str))}</p>"
