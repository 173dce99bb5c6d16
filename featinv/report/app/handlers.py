"""Between Gradio's events and the session: values in, arrays and messages out, work that can be watched and stopped."""

from __future__ import annotations

import functools
import html
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import gradio as gr
import numpy as np
import torch.nn.functional as F
from torch import Tensor

from featinv.applications.batches import Progress
from featinv.errors import UserError
from featinv.report.app.background import Cancelled, Job
from featinv.report.app.models import Choice
from featinv.report.app.pictures import SIDE, example, from_array, to_array, uploaded, with_box
from featinv.report.app.session import Picture, Session
from featinv.report.page import picture_tag

SHOWN = 192
"""About the side in pixels at which results are shown."""
NO_SALIENCY = "none"
CANCELLED = "Cancelled."


def friendly(outputs: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn a `UserError` of a short handler into a message; its outputs stay as they are."""

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        def wrapped(*values: Any) -> Any:
            try:
                return handler(*values)
            except UserError as error:
                gr.Warning(html.escape(str(error)), title="That did not work")
                return gr.skip() if outputs == 1 else [gr.skip()] * outputs

        return wrapped

    return decorate


def enlarged(image: Tensor) -> np.ndarray:
    """A picture (3, H, W) as an array, by a whole factor about SIDE pixels a side, so that small ones can be seen."""
    return to_array(F.interpolate(image[None], scale_factor=max(1, SIDE // max(image.shape[1:])))[0])


def figures(pictures: Sequence[Picture]) -> str:
    """Pictures in a row, each with its whole caption below; Gradio's gallery cuts captions short."""
    cells = (
        f"<figure>{picture_tag(p.image, max(1, SHOWN // p.image.shape[-1]))}"
        f"<figcaption>{html.escape(p.caption)}</figcaption></figure>"
        for p in pictures
    )
    return f'<div class="figures">{"".join(cells)}</div>'


def whole(value: float | None, what: str) -> int:
    """A number field's content.

    Raises:
        UserError: If the field is empty.
    """
    if value is None:
        raise UserError(f"give a whole number as {what}.")
    return int(value)


class Handlers:
    """What the layout binds to its events.

    Long ones are generators' work: they take a progress first, run one at a time and can be stopped; short ones return
    at once.

    Args:
        session: Does the work.
    """

    def __init__(self, session: Session):
        self.session = session
        self._jobs: dict[Job[Any], str | None] = {}
        # Not Gradio's own limit: what waits there can only be cancelled by Gradio, which then forgets to end the event.
        self._turn = threading.Lock()

    def stream(self, browser: str | None, work: Callable[[Progress], Any], outputs: int) -> Generator[Any, None, None]:
        """Run work for one browser window: yield its outputs and a status; unfinished, the outputs stay as they are."""
        job, same, started = Job(work, self._turn), [gr.skip()] * outputs, time.monotonic()
        self._jobs[job] = browser
        try:
            yield *same, status("Waiting for other work ..." if self._turn.locked() else "Loading ...")
            steps, shown = job.steps(), 0.0
            while True:
                try:
                    done, total = next(steps)
                except StopIteration as end:
                    yield *end.value, status(f"Done in {time.monotonic() - started:.1f} s.")
                    return
                if time.monotonic() - shown > 0.2 or done >= total:  # not hundreds of messages a second
                    shown = time.monotonic()
                    yield *same, status(f"Step {done} of {total}", done / total)
        except Cancelled:
            yield *same, status(CANCELLED)
        except UserError as error:
            gr.Warning(html.escape(str(error)), title="That did not work")
            yield *same, status(f"That did not work: {error}")
        finally:
            job.cancel()  # the window was closed, or the event cancelled, in the middle of it
            del self._jobs[job]

    def in_turn(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        """A short handler that waits for long work."""

        @functools.wraps(handler)
        def waiting(*values: Any) -> Any:
            with self._turn:
                return handler(*values)

        return waiting

    def cancel(self, browser: str | None) -> None:
        """Stop what this window does or waits for; each job then says so itself."""
        for job, owner in list(self._jobs.items()):
            if owner == browser:
                job.cancel()

    @friendly(1)
    def pick(self, name: str, number: float | None) -> np.ndarray:
        """An example picture."""
        return enlarged(example(name, whole(number, "the scene")))

    @friendly(1)
    def upload(self, path: str | None) -> Any:
        """A picture of the user's own; taking the file away again changes nothing."""
        return gr.skip() if path is None else to_array(uploaded(path))

    @friendly(1)
    def outline(self, other: np.ndarray | None, *box: float) -> np.ndarray | None:
        """The second picture with the region drawn in."""
        return None if other is None else to_array(with_box(from_array(other), box))  # type: ignore[arg-type]

    @friendly(3)
    def layers(self, backbone: str) -> tuple[Any, Any, Any]:
        """The lists of layers, inverters and methods of a backbone."""
        models = self.session.models
        layers, layer = models.layers(backbone), models.start(backbone)
        return gr.Dropdown(choices=layers, value=layer), *self.inverters(backbone, layer)

    @friendly(2)
    def inverters(self, backbone: str, layer: str) -> tuple[Any, Any]:
        """The lists of inverters and methods of a layer."""
        names = self.session.models.inverters(backbone, layer)
        return gr.Dropdown(choices=names, value=names[0]), gr.CheckboxGroup(choices=names, value=names)

    @friendly(2)
    def explain(self, method: str, image: np.ndarray, first: np.ndarray | None, *choice: str) -> tuple[str, str]:
        """Saliency of the picture and of the first sample."""
        if method == NO_SALIENCY or first is None:
            return "", ""
        pictures = [from_array(image), from_array(first)]
        try:
            maps = self.session.saliency(Choice(*choice), pictures, method)
        except UserError as error:  # not every network can do every method; the samples are there all the same
            return "", str(error)
        names = ("the picture", "sample 1")
        return figures([Picture(m, f"{method} of {name}") for m, name in zip(maps, names, strict=True)]), ""

    def sample(
        self,
        progress: Progress,
        image: np.ndarray,
        seed: float | None,
        count: int,
        method: str,
        *choice: str,
    ) -> tuple[str, str, str, str, np.ndarray]:
        """Samples, the maps of where they differ, saliency with its note, and the first sample."""
        picture = from_array(image)
        found = self.session.sample(Choice(*choice), picture, int(count), whole(seed, "the seed"), progress)
        first = to_array(found.samples[0].image)
        shown, note = self.explain(method, image, first, *choice)
        return figures([found.seen, *found.samples]), figures([found.pixels, found.features]), shown, note, first

    def steer(
        self, progress: Progress, image: np.ndarray, seed: float | None, everywhere: bool, *rest: Any
    ) -> tuple[str]:
        """Pictures along the sliders; `rest` is the region, pairs of concept and strength, and the choice."""
        box, moves, choice = rest[:4], rest[4:-3], rest[-3:]
        pairs = [(str(word or ""), float(strength)) for word, strength in zip(moves[::2], moves[1::2], strict=True)]
        where = None if everywhere else box
        picture = from_array(image)
        found = self.session.steer(Choice(*choice), picture, pairs, whole(seed, "the seed"), where, progress)  # type: ignore[arg-type]
        return (figures(found),)

    def paste(
        self, progress: Progress, image: np.ndarray, seed: float | None, other: np.ndarray, moved: bool, *rest: Any
    ) -> tuple[str]:
        """Before, after and the change; `rest` is the region, its new place, and the choice."""
        box, to, choice = rest[:4], rest[4:6], rest[6:]
        if other is None:
            raise UserError("choose a second picture to cut from.")
        pictures = from_array(image), from_array(other)
        place = to if moved else None
        found = self.session.paste(Choice(*choice), *pictures, box, whole(seed, "the seed"), place, progress)  # type: ignore[arg-type]
        return (figures(found),)

    def compare(
        self,
        progress: Progress,
        image: np.ndarray,
        seed: float | None,
        names: list[str],
        backbone: str,
        layer: str,
        _inverter: str,
    ) -> tuple[str]:
        """The picture through several inverters."""
        number, picture = whole(seed, "the seed"), from_array(image)
        return (figures(self.session.compare(backbone, layer, names, picture, number, progress)),)


def status(text: str, share: float | None = None) -> str:
    """The status line, with a bar where the share of the work that is done is known."""
    bar = "" if share is None else f'<progress value="{share:.3f}" style="width:100%"></progress>'
    return f'<div role="status">{bar}<p>{html.escape(text)}</p></div>'
