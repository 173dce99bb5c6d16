"""An HTML page that opens without a network: pictures, curves and tables inside the one file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from featinv.files import write_text
from featinv.image import to_uint8

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}
th,td{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff;min-width:8em}
td small{color:#777;display:block;white-space:nowrap}thead th{border-bottom:2px solid #888}
.strip td{border:0;padding:1px;text-align:center}.strip th{border:0;font-weight:normal;text-align:left}
img{image-rendering:pixelated}.figure{max-width:100%;image-rendering:auto}
.note{color:#555}pre{background:#f5f5f5;padding:.7em;overflow:auto}
"""
LOWER_IS_BETTER = ("l2", "lpips", "fd_", "kid", "fid")


def picture_tag(image: Tensor, scale: int = 1, title: str = "") -> str:
    """An <img> of one image (3, H, W) in [0, 1], enlarged by the browser."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy()).save(buffer, format="PNG")
    height, width = image.shape[1] * scale, image.shape[2] * scale
    return _tag(buffer.getvalue(), f'width="{width}" height="{height}"', title)


def file_tag(path: Path, title: str = "") -> str:
    """An <img> of a PNG file, at its own size, or the page's width if that is less."""
    return _tag(path.read_bytes(), 'class="figure"', title)


def _tag(data: bytes, size: str, title: str) -> str:
    text = html.escape(title, quote=True)
    return f'<img {size} alt="{text}" title="{text}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def picture_table(rows: Mapping[str, Tensor], scale: int = 2) -> str:
    """One row of pictures for each entry; columns belong together.

    Args:
        rows: Label -> images (K, 3, H, W); NaN pictures are left blank.
        scale: Enlargement.
    """
    lines = []
    for label, images in rows.items():
        cells = "".join(
            f"<td>{'' if torch.isnan(image).any() else picture_tag(image, scale, label)}</td>" for image in images
        )
        lines.append(f"<tr><th>{html.escape(label)}</th>{cells}</tr>")
    return f'<table class="strip">{"".join(lines)}</table>'


def figure_text(interval: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A figure with its 95 % interval."""
    if not interval or interval.get("value") is None:
        return "–"
    value = f"{interval['value']:.{digits}f}"
    if interval.get("low") is None:
        return value
    return f"{value} <small>[{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]</small>"


def figure_table(
    rows: Mapping[str, Mapping[str, Any]],
    metrics: Sequence[str],
    cell: Callable[[Mapping[str, Any] | None], str] = figure_text,
) -> str:
    """A table of figures: one line for each row, one column for each metric; ↓ marks metrics where less is better."""
    arrows = {m: "&nbsp;↓" if m.startswith(LOWER_IS_BETTER) else "" for m in metrics}
    head = "".join(f"<th>{html.escape(m)}{arrows[m]}</th>" for m in metrics)
    lines = []
    for name, figures in rows.items():
        n = next((f["n"] for f in figures.values() if f), "")
        cells = "".join(f"<td>{cell(figures.get(m))}</td>" for m in metrics)
        lines.append(f"<tr><td>{html.escape(name)}</td>{cells}<td>{n}</td></tr>")
    return f"<table><thead><tr><th></th>{head}<th>n</th></tr></thead><tbody>{''.join(lines)}</tbody></table>"


def write_page(path: str | Path, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """Write a page of (heading, HTML) sections; atomically."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections)
    write_text(
        path,
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n",
    )
