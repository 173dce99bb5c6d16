"""The app's page. Everything that it does is in `handlers` and `session`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import gradio as gr

from featinv.attribution.saliency import SALIENCY
from featinv.errors import UserError
from featinv.report.app.handlers import NO_SALIENCY, Handlers, enlarged, status
from featinv.report.app.pictures import PHOTOGRAPHS, SCENE, example
from featinv.report.app.session import Session

SLIDERS = 3
"""Concepts that can be steered at once."""
_SCENES = (3, 4)  # the pictures that the page starts with
_BOX = (0.25, 0.25, 0.75, 0.75)
_CSS = """
.gradio-container img {image-rendering: pixelated}
.figures {display: flex; flex-wrap: wrap; gap: 12px; padding-top: 16px}
progress {accent-color: var(--color-accent)}
.figures figure {margin: 0; max-width: 260px; width: min-content; min-width: 192px}
.figures img {max-width: 100%}
.figures figcaption {font-size: 13px; line-height: 1.35; margin-top: 4px}
"""


class _Page:
    """Makes the page's parts and binds them; one object, so that the parts can see each other."""

    def __init__(self, session: Session):
        self.handlers, self.session = Handlers(session), session

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="featinv", analytics_enabled=False) as page:
            gr.Markdown("# What did this layer keep?\nPictures drawn from a feature map alone.")
            with gr.Row():
                with gr.Column(scale=1, min_width=320):
                    self.image = self.picture("Picture", "picture", _SCENES[0])
                with gr.Column(scale=3):
                    self.choosers()
                    self.tabs()
            self.cancel.click(self.stop, None, None, queue=False, api_visibility="private")
            page.unload(self.stop)
        return page

    def tabs(self) -> None:
        parts = {
            "Samples": self.samples,
            "Steering": self.steering,
            "Paste a region": self.pasting,
            "Methods": self.methods,
        }
        with gr.Tabs():
            for title, part in parts.items():
                with gr.Tab(title):
                    part()

    def stop(self, request: gr.Request) -> None:
        self.handlers.cancel(request.session_hash)

    def picture(self, label: str, name: str, number: int) -> gr.Image:
        """A picture that is picked or uploaded."""
        start = enlarged(example(SCENE, number))
        image = gr.Image(start, label=label, format="png", interactive=False, elem_id=name, height=280, buttons=[])
        kind = gr.Radio([SCENE, *PHOTOGRAPHS], value=SCENE, label="Example", elem_id=f"{name}-example")
        scene = gr.Number(number, label="Scene number", precision=0, minimum=0, elem_id=f"{name}-scene")
        file = gr.File(label="Your own picture", elem_id=f"{name}-file", height=120)
        for part in (kind, scene):
            self.short(part.input, self.handlers.pick, [kind, scene], image)
        self.short(file.upload, self.handlers.upload, file, image)
        return image

    def choosers(self) -> None:
        """Backbone, layer, inverter, seed; cancel and status."""
        models = self.session.models
        backbone = models.backbones[0]
        layer = models.start(backbone)
        names = models.inverters(backbone, layer)
        with gr.Row():
            self.backbone = gr.Dropdown(models.backbones, value=backbone, label="Backbone", scale=4, elem_id="backbone")
            self.layer = gr.Dropdown(models.layers(backbone), value=layer, label="Layer", scale=2, elem_id="layer")
            self.inverter = gr.Dropdown(names, value=names[0], label="Inverter", scale=5, elem_id="inverter")
            self.seed = gr.Number(0, label="Seed", precision=0, min_width=80, scale=1, elem_id="seed")
        with gr.Row():
            with gr.Column(scale=4):
                self.status = gr.HTML(status("Ready."), elem_id="status")
            self.cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", scale=1)
        self.choice = [self.backbone, self.layer, self.inverter]

    def samples(self) -> None:
        with gr.Row():
            count = gr.Slider(2, 16, value=4, step=1, label="Samples", elem_id="count")
            method = gr.Dropdown([NO_SALIENCY, *SALIENCY], value="grad_cam", label="Saliency", elem_id="saliency")
        button = gr.Button("Draw samples", variant="primary", elem_id="draw")
        drawn = _figures("The picture as the network sees it, and samples of its features", "samples")
        maps = _figures("Where the samples differ: black is the same in all", "maps")
        shown, note, first = _figures("What the class score depends on", "explained"), gr.Markdown(), gr.State()
        inputs = [self.image, self.seed, count, method, *self.choice]
        self.long(button, self.handlers.sample, inputs, [drawn, maps, shown, note, first])
        explain = [method, self.image, first, *self.choice]
        self.short(method.input, self.handlers.explain, explain, [shown, note], heavy=True)

    def steering(self) -> None:
        moves = []
        for k in range(SLIDERS):
            with gr.Row():
                word = gr.Dropdown(
                    self.session.concepts(),
                    value=None if k else self.session.concepts()[0],
                    label=f"Concept {k + 1}",
                    allow_custom_value=True,
                    elem_id=f"concept-{k}",
                )
                strength = gr.Slider(-8, 8, value=0, step=0.5, label="Strength", elem_id=f"strength-{k}")
            moves += [word, strength]
        everywhere = gr.Checkbox(True, label="Everywhere; if not, in this region alone:")
        box = _region("steer")
        button = gr.Button("Steer", variant="primary", elem_id="steer")
        found = _figures("As it was, half of the way, all of it", "steered")
        inputs = [self.image, self.seed, everywhere, *box, *moves, *self.choice]
        self.long(button, self.handlers.steer, inputs, [found])

    def pasting(self) -> None:
        with gr.Row():
            with gr.Column():
                other = self.picture("Cut from", "other", _SCENES[1])
            with gr.Column():
                start = self.handlers.outline(enlarged(example(SCENE, _SCENES[1])), *_BOX)
                cut = gr.Image(start, label="The region", interactive=False, format="png", height=280, buttons=[])
                box = _region("paste")
                moved = gr.Checkbox(False, label="Put its corner elsewhere:")
                to = [gr.Slider(0, 1, value=0.5, step=0.05, label=label) for label in ("To left", "To top")]
        for part in (other, *box):
            self.short(part.change, self.handlers.outline, [other, *box], cut)
        button = gr.Button("Paste into the picture", variant="primary", elem_id="paste")
        found = _figures("Decoded without and with the region, and the difference", "pasted")
        inputs = [self.image, self.seed, other, moved, *box, *to, *self.choice]
        self.long(button, self.handlers.paste, inputs, [found])

    def methods(self) -> None:
        names = self.session.models.inverters(self.backbone.value, self.layer.value)
        ticked = gr.CheckboxGroup(names, value=names, label="Inverters of this layer", elem_id="methods")
        button = gr.Button("Compare", variant="primary", elem_id="compare")
        found = _figures("The same features through each", "compared")
        self.long(button, self.handlers.compare, [self.image, self.seed, ticked, *self.choice], [found])
        lists = [self.layer, self.inverter, ticked]
        self.short(self.backbone.input, self.handlers.layers, self.backbone, lists, heavy=True)
        self.short(self.layer.input, self.handlers.inverters, [self.backbone, self.layer], lists[1:])

    def long(self, button: gr.Button, work: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Bind work that is watched and can be cancelled."""

        def stream(request: gr.Request, *values: Any) -> Generator[Any, None, None]:
            yield from self.handlers.stream(
                request.session_hash, lambda progress: work(progress, *values), len(outputs)
            )

        button.click(
            stream,
            list(inputs),
            [*outputs, self.status],
            show_progress="hidden",
            concurrency_limit=None,  # the handlers see to it that one works at a time
            api_visibility="private",
        )

    def short(self, event: Any, handler: Callable[..., Any], inputs: Any, outputs: Any, heavy: bool = False) -> None:
        """Bind a handler that returns at once, or, where it is heavy, one that waits for its turn."""
        bound = self.handlers.in_turn(handler) if heavy else handler
        event(bound, inputs, outputs, show_progress="hidden", concurrency_limit=None, api_visibility="private")


def _figures(label: str, name: str) -> gr.HTML:
    return gr.HTML(label=label, show_label=True, container=True, min_height=120, elem_id=name)


def _region(name: str) -> list[gr.Slider]:
    with gr.Row():
        return [
            gr.Slider(0, 1, value=value, step=0.05, label=side.capitalize(), elem_id=f"{name}-{side}", min_width=160)
            for side, value in zip(("left", "top", "right", "bottom"), _BOX, strict=True)
        ]


def build_page(session: Session) -> gr.Blocks:
    """The page, not yet served."""
    return _Page(session).build()


def serve(session: Session, port: int = 7860, share: bool = False, wait: bool = True) -> tuple[Any, str]:
    """Serve the app on this machine alone (127.0.0.1).

    Args:
        session: Does the work.
        port: Where it listens.
        share: Also make Gradio's public link: whoever has it can use this machine through the app.
        wait: Until interrupted; otherwise return at once.

    Returns:
        The page, to be closed with `close()`, and its address.

    Raises:
        UserError: If the port is taken.
    """
    page = build_page(session)
    fonts = ["system-ui", "sans-serif"]  # the theme's own would be fetched from the network
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=share,
            prevent_thread_lock=not wait,
            show_error=True,
            ssr_mode=False,
            footer_links=[],
            max_file_size="50mb",
            theme=gr.themes.Default(font=fonts, font_mono=["monospace"]),
            css=_CSS,
            quiet=True,
        )
    except OSError as error:
        raise UserError(f"port {port} is not free; choose another with --port.") from error
    return page, address
