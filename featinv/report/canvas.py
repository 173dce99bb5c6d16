"""Figures that need no display and leave pyplot's global state, such as a notebook's backend, alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from featinv.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def canvas(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure of so many inches; None leaves the layout to the caller."""
    # Imported when needed: most commands draw nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a PNG; atomically."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
