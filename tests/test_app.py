"""The app without a browser; what needs gradio is skipped where it is not installed."""

import threading
import time

import numpy as np
import pytest
import torch
from conftest import save_tiny, tiny_config, tiny_prior
from PIL import Image

from featinv.applications.concepts import Direction
from featinv.applications.lookup import find_concept
from featinv.checkpoint import load_checkpoint, read_header, save_checkpoint
from featinv.errors import UserError
from featinv.inverters.reconstruct import sample_seed
from featinv.report.app import models as models_module
from featinv.report.app import pictures
from featinv.report.app.background import Cancelled, Job
from featinv.report.app.blend import Blend
from featinv.report.app.models import OPTIMISATION, Choice, Models, found_inverters
from featinv.report.app.session import BATCH, Session

STEPS = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory, backbone):
    """A folder with two inverters of one tiny prior, a checkpoint of another kind, and a damaged file."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("app")
    tiny_prior().save_pretrained(root / "prior")
    for name in ("first", "demo/second"):
        save_tiny(root / "runs" / name / "inverter.safetensors", tiny_config(root / "prior"), backbone)
    save_checkpoint(root / "runs" / "prior" / "last.safetensors", {"weights": torch.zeros(2)})
    (root / "runs" / "broken").mkdir()
    (root / "runs" / "broken" / "last.safetensors").write_bytes(b"no tensors")
    foreign = {"inverter": {"target": "elsewhere.Inverter"}, "backbone": {"target": "elsewhere.Backbone"}}
    save_checkpoint(root / "runs" / "foreign" / "inverter.safetensors", {"featinv": {"config": foreign}})
    return root / "runs"


@pytest.fixture(scope="module")
def session(runs):
    return Session(Models([str(runs / "first"), str(runs / "demo/second")], steps=4, size=32, examples=24))


@pytest.fixture(scope="module")
def choice(session, runs):
    backbone = session.models.backbones[0]
    return Choice(backbone, "final", str(runs / "first"))


@pytest.fixture
def image():
    return pictures.example("scene", 1)


def test_runs_are_found_and_other_files_left_out(runs) -> None:
    bundled = ["scenes64/efficientnet_lite0_early"]
    bundled += [name for name in models_module.bundled_inverters() if name.startswith("photos64")]
    assert found_inverters(runs) == bundled + sorted([str(runs / "demo/second"), str(runs / "first")])


def test_a_header_is_the_checkpoint_without_its_tensors(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"a": {1: torch.zeros(3)}, "b": [1.5, "x", None]})
    assert read_header(path) == {"a": {1: None}, "b": [1.5, "x", None]} and load_checkpoint(path)["a"][1].numel() == 3


def test_what_can_be_chosen_follows_from_the_backbone(session, runs, choice) -> None:
    models = session.models
    assert models.backbones == ["resnet10t, 64 px, random weights", "efficientnet_lite0, 128 px"]
    layers = models.layers(choice.backbone)
    assert layers[-1] == models.start(choice.backbone) == "final" and len(layers) == len(set(layers)) > 2
    assert models.inverters(choice.backbone, "final") == [str(runs / "first"), str(runs / "demo/second"), OPTIMISATION]
    assert models.inverters(choice.backbone, layers[0]) == [OPTIMISATION]
    early = models.load(Choice(choice.backbone, layers[0], OPTIMISATION))
    assert early.backbone.layer == layers[0] and early.inverter.size == 32
    with pytest.raises(UserError, match="no inverter"):
        models.load(Choice(choice.backbone, layers[0], str(runs / "first")))
    with pytest.raises(UserError, match="no backbone"):
        models.layers("resnet999")


def test_each_model_is_loaded_once_and_the_prior_is_shared(runs, monkeypatch) -> None:
    calls = []
    real = models_module.load_trained

    def counted(name, prior=None):
        calls.append(name)
        time.sleep(0.05)  # wide enough for two threads to meet
        return real(name, prior=prior)

    monkeypatch.setattr(models_module, "load_trained", counted)
    names = [str(runs / "first"), str(runs / "demo/second")]
    models = Models(names, examples=4)
    choices = [Choice(models.backbones[0], "final", name) for name in names]
    threads = [threading.Thread(target=models.load, args=[choices[0]]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = (models.load(choice).inverter for choice in choices)
    assert calls == names and first.prior is second.prior and first.branch is not second.branch


def test_samples_are_the_inverters_own_and_every_step_is_told(session, choice, image) -> None:
    told = []
    count = BATCH + 1
    found = session.sample(choice, image, count, 7, lambda done, total: told.append((done, total)))
    loaded = session.models.load(choice)
    seen = pictures.square(image, 32)
    features = loaded.backbone(seen[None])
    for k in (0, count - 1):
        alone = loaded.inverter.invert(features, seeds=[sample_seed(7, "0", k)])[0]
        assert torch.allclose(found.samples[k].image, alone, atol=1e-4)
    assert told == [(step, 2 * STEPS) for step in range(1, 2 * STEPS + 1)]
    assert torch.equal(found.seen.image, seen) and len(found.samples) == count
    drawn = torch.stack([sample.image for sample in found.samples])
    deviation = drawn.var(0).mean(0).sqrt()
    brightness = found.pixels.image.sum(0)
    assert brightness.flatten().argmax() == deviation.flatten().argmax()
    again = loaded.backbone(drawn).flatten(1)
    cosines = torch.nn.functional.cosine_similarity(again, features.flatten(1))
    assert [f"cosine {c:.2f}" in s.caption for c, s in zip(cosines, found.samples, strict=True)] == [True] * count


def test_a_progress_that_raises_ends_the_work(session, choice, image) -> None:
    told = []

    def stop_at_two(done: int, total: int) -> None:
        told.append(done)
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        session.sample(choice, image, 2, 0, stop_at_two)
    assert told == [1, 2]
    assert session.sample(choice, image, 2, 0).samples  # nothing is left in a bad state


class _Window:
    """An inverter whose picture is the map's first three channels: every change is seen where it is."""

    size = 32

    def __init__(self, scale: float):
        self.scale = scale

    def invert(self, features, *, seeds):
        shown = torch.sigmoid(features[:, :3] / self.scale)
        return torch.nn.functional.interpolate(shown, (self.size, self.size), mode="nearest")


@pytest.fixture(scope="module")
def plain(session, choice):
    """The same session with `_Window` for its inverter."""
    backbone = session.models.load(choice).backbone
    scale = float(backbone(torch.rand(4, 3, 32, 32))[:, :3].abs().amax())
    models = Models([], examples=24)
    models.load = lambda _: models_module.Loaded(_Window(scale), backbone)
    return Session(models)


def test_steering_moves_features_by_the_sliders(plain, choice, image) -> None:
    words = ["mean:object0_colour=red", "mean:sky=night"]
    found = plain.steer(choice, image, [(words[0], 2.0), ("", 5.0), (words[1], -1.0)], seed=3)
    loaded, examples = plain.models.load(choice), plain.models.examples(32)
    features = loaded.backbone(pictures.square(image, 32)[None])
    move = sum(s * find_concept(w, loaded.backbone, examples).direction for w, s in zip(words, (2, -1), strict=True))
    assert [p.caption.partition(":")[0] for p in found] == ["0%", "50%", "100%"]
    for share, picture in zip((0, 0.5, 1), found, strict=True):
        expected = loaded.inverter.invert(features + share * move[:, None, None], seeds=[0])[0]
        assert torch.allclose(picture.image, expected, atol=1e-5)
    assert not torch.allclose(found[0].image, found[2].image, atol=1e-3)


def test_steering_one_region_leaves_the_other_positions(plain, choice, image) -> None:
    before, _, after = plain.steer(choice, image, [("mean:sky=night", 4.0)], 0, (0.0, 0.0, 1.0, 0.5))
    changed = (after.image - before.image).abs().sum(0) > 1e-6
    assert changed[:16].all() and not changed[16:].any()


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ([], "slider"),
        ([("mean:sky=night", 0.0)], "slider"),
        ([("red", 1.0)], "KIND:NAME"),
        ([("mean:sky=dust", 1.0)], "dusk"),
    ],
)
def test_steering_says_what_is_wrong(plain, choice, image, moves, message) -> None:
    with pytest.raises(UserError, match=message):
        plain.steer(choice, image, moves, 0)


def test_a_blend_of_orthogonal_concepts_rises_by_one() -> None:
    axes = torch.eye(4)
    concepts = [Direction(str(k), axes[k], axes[k], 0.3) for k in (0, 2)]
    blend, features = Blend(concepts, [2.0, -3.0]), torch.randn(2, 4, 3, 3)
    assert torch.allclose(
        blend.score(blend.move(features, 1.0)) - blend.score(features), torch.ones(2, 3, 3), atol=1e-5
    )
    assert blend.basis.shape == (2, 4) and blend.name == "0 +2, 2 -3"


def test_a_region_is_pasted_in_its_place(plain, choice, image) -> None:
    other, quarter = pictures.example("coffee"), (0.0, 0.0, 0.5, 0.5)
    own, theirs = (plain.paste(choice, x, x, quarter, 1)[0].image for x in (image, other))
    before, after, change = plain.paste(choice, image, other, quarter, seed=1)
    assert torch.equal(before.image, own)
    assert torch.equal(after.image[:, :16, :16], theirs[:, :16, :16])
    assert torch.equal(after.image[:, 16:], own[:, 16:]) and torch.equal(after.image[:, :, 16:], own[:, :, 16:])
    assert change.caption == "100% of the change is in the region, 25% of the picture"
    _, after, change = plain.paste(choice, image, other, quarter, seed=1, to=(0.5, 0.5))
    assert torch.equal(after.image[:, 16:, 16:], theirs[:, :16, :16]) and torch.equal(after.image[:, :16], own[:, :16])
    assert change.caption == "100% of the change is in the region, 25% of the picture"


def test_pasting_what_is_there_changes_nothing(plain, choice, image) -> None:
    *_, change = plain.paste(choice, image, image, (0.0, 0.0, 1.0, 1.0), seed=1)
    assert change.caption == "nothing changed" and len(change.image.flatten(1).unique(dim=1).T) == 1
    with pytest.raises(UserError, match="region"):
        plain.paste(choice, image, image, (0.6, 0.0, 0.5, 0.5), seed=1)


def test_methods_side_by_side_keep_their_order(session, choice, image, runs) -> None:
    told = []
    names = [OPTIMISATION, str(runs / "demo/second")]
    found = session.compare(choice.backbone, "final", names, image, 0, lambda *report: told.append(report))
    assert [p.caption.partition(",")[0] for p in found] == names
    assert told == [(step, 4 + STEPS) for step in range(1, 5 + STEPS)]
    with pytest.raises(UserError, match="tick"):
        session.compare(choice.backbone, "final", [], image, 0)


def test_saliency_is_laid_over_the_pictures(session, choice, image) -> None:
    maps = session.saliency(choice, [image, 1 - image], "gradient")
    assert [tuple(m.shape) for m in maps] == [(3, 32, 32)] * 2 and not torch.equal(maps[0], maps[1])
    with pytest.raises(UserError, match="gradient"):
        session.saliency(choice, [image], "gradien")


@pytest.mark.parametrize("name", ["scene", *pictures.PHOTOGRAPHS])
def test_examples_are_square_pictures(name: str) -> None:
    image = pictures.example(name)
    assert image.shape[0] == 3 and image.shape[1] == image.shape[2] and 0 <= image.min() < image.max() <= 1
    assert np.array_equal(pictures.to_array(pictures.from_array(pictures.to_array(image))), pictures.to_array(image))


def test_uploads_are_cropped_or_refused_with_a_reason(tmp_path) -> None:
    wide = np.zeros((40, 120, 4), np.uint8)
    wide[:, 40:80] = (255, 0, 0, 255)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    image = pictures.uploaded(tmp_path / "wide.png")
    assert image.shape == (3, 256, 256) and image[0].min() > 0.99 and image[1].max() < 0.6
    (tmp_path / "letter.png").write_text("Dear reader")
    Image.new("RGB", (5, 300)).save(tmp_path / "thin.png")
    (tmp_path / "empty.jpg").touch()
    for name, reason in (("letter.png", "not a picture"), ("thin.png", "5 x 300"), ("empty.jpg", "empty")):
        with pytest.raises(UserError, match=reason) as caught:
            pictures.uploaded(tmp_path / name)
        assert name in str(caught.value) and str(tmp_path) not in str(caught.value)


def _drain(job: Job) -> tuple[list, object]:
    reports, steps = [], job.steps()
    while True:
        try:
            reports.append(next(steps))
        except StopIteration as end:
            return reports, end.value


def test_a_job_reports_every_step_and_returns_its_result() -> None:
    def work(progress):
        for k in range(5):
            progress(k + 1, 5)
        return "done"

    assert _drain(Job(work)) == ([(k, 5) for k in range(1, 6)], "done")

    def fails(progress):
        progress(1, 2)
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        _drain(Job(fails))


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_job_stops_between_two_steps(how: str) -> None:
    done, ended = [], threading.Event()

    def work(progress):
        try:
            for k in range(1000):
                time.sleep(0.005)
                progress(k + 1, 1000)
                done.append(k)
        finally:
            ended.set()

    job = Job(work)
    steps = job.steps()
    next(steps)
    if how == "close":
        steps.close()
    else:
        job.cancel()
        with pytest.raises(Cancelled):
            list(steps)
    assert ended.wait(10) and len(done) < 900


def test_a_job_cancelled_before_its_turn_never_works() -> None:
    turn = threading.Lock()
    job = Job(lambda progress: pytest.fail("it worked"), turn)
    threading.Timer(0.05, job.cancel).start()
    with turn, pytest.raises(Cancelled):
        _drain(job)


def test_jobs_of_one_turn_do_not_overlap() -> None:
    turn, inside, most = threading.Lock(), [], []

    def work(progress):
        inside.append(1)
        time.sleep(0.01)
        most.append(len(inside))
        inside.pop()

    threads = [threading.Thread(target=_drain, args=[Job(work, turn)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


@pytest.fixture
def handlers(session):
    pytest.importorskip("gradio", reason="the app needs gradio (requirements-app.lock)")
    from featinv.report.app.handlers import Handlers

    return Handlers(session)


def test_a_stream_ends_with_its_outputs_or_with_a_message(handlers, monkeypatch) -> None:
    import gradio

    warned: list[str] = []
    monkeypatch.setattr(gradio, "Warning", lambda message, **_: warned.append(message))

    def fails(progress):
        raise UserError("choose <another> picture.")

    *_, last = handlers.stream("window", lambda progress: (1, 2), 2)
    assert last[:2] == (1, 2) and "Done" in last[2]
    *_, last = handlers.stream("window", fails, 2)
    assert list(last[:2]) == [gradio.skip()] * 2 and "&lt;another&gt;" in last[2] and "<another>" not in warned[0]


def test_cancelling_stops_one_window_only(handlers) -> None:
    def work(progress):
        for k in range(400):
            time.sleep(0.005)
            progress(k + 1, 400)
        return ("finished",)

    mine = handlers.stream("mine", work, 1)
    next(mine), next(mine)
    handlers.cancel("another")
    assert "Step" in next(mine)[1]
    waiting = handlers.stream("waits", work, 1)
    assert "Waiting" in next(waiting)[1]
    for name, stream in (("waits", waiting), ("mine", mine)):
        handlers.cancel(name)
        assert "Cancelled" in list(stream)[-1][1]
    *_, last = handlers.stream("mine", lambda progress: ("next",), 1)
    assert last[0] == "next"


def test_handlers_turn_values_into_arrays(handlers, choice, image) -> None:
    array = pictures.to_array(image)
    chosen = (choice.backbone, choice.layer, choice.inverter)
    report = lambda done, total: None  # noqa: E731
    samples, maps, shown, note, first = handlers.sample(report, array, 0, 2, "gradient", *chosen)
    assert [part.count("<img ") for part in (samples, maps, shown)] == [3, 2, 2] and note == ""
    assert 'width="192"' in samples and first.shape == (32, 32, 3)  # enlarged by the browser alone
    assert handlers.explain("guided_backprop", array, None, *chosen) == ("", "")
    (steered,) = handlers.steer(report, array, 0, True, 0, 0, 1, 1, "mean:sky=night", 2, None, 0, *chosen)
    assert steered.count("<img ") == 3 and "100%: " in steered
    (pasted,) = handlers.paste(report, array, 0, array, False, 0, 0, 0.5, 0.5, 0, 0, *chosen)
    (compared,) = handlers.compare(report, array, 0, [choice.inverter], *chosen)
    assert pasted.count("<img ") == 3 and compared.count("<img ") == 1
    for values in ((None, 0), (array, None)):
        with pytest.raises(UserError):
            handlers.compare(report, *values, [choice.inverter], *chosen)


def test_the_page_is_built_and_stays_on_this_machine(session, monkeypatch) -> None:
    gradio = pytest.importorskip("gradio", reason="the app needs gradio (requirements-app.lock)")
    from featinv.report.app.layout import serve

    asked = {}

    def launch(self, **options):
        asked.update(options)
        return None, "http://127.0.0.1", None

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    page, _ = serve(session, port=1)
    assert asked["server_name"] == "127.0.0.1" and asked["share"] is False and page.analytics_enabled is False

    def taken(self, **options):
        raise OSError("Cannot find empty port in range: 1-1.")

    monkeypatch.setattr(gradio.Blocks, "launch", taken)
    with pytest.raises(UserError, match="--port"):
        serve(session, port=1)


def test_the_command_says_what_is_missing(monkeypatch, capsys) -> None:
    from tools import app

    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        app.main([])
    assert ended.value.code == 2 and "make app" in capsys.readouterr().err
