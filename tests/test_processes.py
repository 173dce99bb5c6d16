"""Several processes train what one would: DDP, split weights (FSDP), streams, a killed process, the folder's lock."""

import gc
import json
import os
import resource
import signal
import tarfile
import weakref
from pathlib import Path

import pytest
import torch
from conftest import tiny_first_stage, tiny_prior
from forks import in_a_process, in_two_processes
from torch.utils.data import IterableDataset

from featinv.checkpoint import load_checkpoint
from featinv.conditioning.encoders import PublishedEncoder, SpatialEncoder
from featinv.data.scenes import ScenesDataset
from featinv.data.shards import WebDatasetShards
from featinv.errors import UserError
from featinv.image import save_png
from featinv.inverters.build import INVERTER_FILE, save_inverter
from featinv.inverters.diffusion import DiffusionInverter
from featinv.inverters.upconv import UpconvInverter
from featinv.processes import (
    is_first_process,
    keep_freed_memory,
    process_rank,
    return_freed_memory,
    settled_objects,
    torchrun_layout,
)
from featinv.training.cache import build_cache
from featinv.training.module import InversionModule
from featinv.training.prior_modules import FirstStageModule, PriorModule
from featinv.training.probe import FeatureProbe
from featinv.training.rows import prepare
from featinv.training.runner import fit
from featinv.training.sharding import shard

STEPS = 4
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture(scope="module")
def cache(tmp_path_factory, backbone):
    torch.manual_seed(0)
    scenes, first_stage = ScenesDataset(12, size=32), tiny_prior().first_stage
    return build_cache(tmp_path_factory.mktemp("cache"), {}, scenes, first_stage, backbone, 4)


def _module(backbone, published: bool = False, estimate_steps: int = 0, **parts) -> InversionModule:
    torch.manual_seed(5)
    prior = tiny_prior()
    sizes = {"hidden": 16} if published else {"components": 16, "hidden": 16, "blocks": 1}
    encoder = (PublishedEncoder if published else SpatialEncoder)(backbone.spec, prior.latent_shape, 16, **sizes)
    inverter = DiffusionInverter(prior, encoder, num_inference_steps=2, **parts)
    for block in inverter.branch.controlnet_down_blocks:  # else the branch adds nothing within a few steps
        torch.nn.init.normal_(block.weight, std=0.1)
    settings = {"max_steps": STEPS, "warmup_steps": 1, "feature_noise": 0.1, "estimate_steps": estimate_steps}
    return InversionModule(inverter, backbone, **settings)


def _train(
    folder: Path,
    backbone,
    dataset,
    steps: int = STEPS,
    die_at: int | None = None,
    parts: dict | None = None,
    **settings,
) -> None:
    """Train; each process writes its losses (and which images it saw) and the first one its averaged weights."""
    module, rank, losses, seen = _module(backbone, **(parts or {})), process_rank()[0], [], []
    whole = module.training_step

    def training_step(batch, batch_idx):
        if rank == 1 and module.global_step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = whole(batch, batch_idx)
        losses.append(float(loss.detach()))
        seen.append(batch.get("id"))
        return loss

    module.training_step = training_step
    probe = FeatureProbe(ScenesDataset(2, size=32)[0]["image"][None], backbone, folder, 2, 4)
    settings = {"batch_size": 4, "checkpoint_every": 2, "precision": "fp32", "accelerator": "cpu", **settings}
    fit(module, dataset, folder, max_steps=steps, callbacks=[probe], progress=False, **settings)
    state = module.apply_average()
    (folder / f"{rank}-{steps}.json").write_text(json.dumps({"losses": losses, "seen": seen, "probe": probe.lines}))
    if rank == 0:
        save_inverter(folder / "averaged" / INVERTER_FILE, module.inverter, {}, state=state)


def _losses(folder: Path, steps: int = STEPS) -> torch.Tensor:
    """Mean over the processes of each step's loss."""
    ranks = [json.loads(path.read_text())["losses"] for path in sorted(folder.glob(f"?-{steps}.json"))]
    return torch.tensor(ranks, dtype=torch.float64).mean(0)


def _assert_same_pictures(one: Path, other: Path, backbone) -> None:
    """Pictures, since AdamW moves what changes no loss (a bias before a normalisation) by the sign of rounding."""
    pictures = []
    for folder in (one, other):
        inverter = _module(backbone).inverter
        inverter.load_state_dict(load_checkpoint(folder / "averaged" / INVERTER_FILE)["state_dict"], strict=False)
        pictures.append(inverter.invert(torch.rand(2, 512, 2, 2, generator=torch.manual_seed(1)), seeds=[1, 2]))
    torch.testing.assert_close(pictures[0], pictures[1], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def one(tmp_path_factory, backbone, cache) -> Path:
    folder = tmp_path_factory.mktemp("one")
    _train(folder, backbone, cache)
    return folder


def test_two_processes_have_the_losses_of_one_with_the_same_batch(tmp_path, backbone, cache, one) -> None:
    in_two_processes(lambda: _train(tmp_path, backbone, cache, strategy="ddp"))
    assert len(_losses(one)) == STEPS
    torch.testing.assert_close(_losses(tmp_path), _losses(one), atol=1e-5, rtol=0)
    _assert_same_pictures(one, tmp_path, backbone)


def test_split_weights_train_stop_and_resume_as_whole_ones(tmp_path, backbone, cache, one) -> None:
    def work() -> None:
        for steps in (1, 3):
            _train(tmp_path, backbone, cache, steps, strategy="fsdp")

    in_two_processes(work)
    first, second = (json.loads((tmp_path / f"{rank}-3.json").read_text())["probe"] for rank in (0, 1))
    assert [line["cosine"] for line in first] == [line["cosine"] for line in second] and len(first) == 3
    _train(tmp_path, backbone, cache)  # a checkpoint of split weights is a checkpoint like any other
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["last.safetensors", "previous.safetensors"]
    found = torch.cat([_losses(tmp_path, steps) for steps in (1, 3, 4)])
    torch.testing.assert_close(found, _losses(one), atol=1e-5, rtol=0)
    _assert_same_pictures(one, tmp_path, backbone)


@pytest.mark.parametrize(
    ("strategy", "parts"),
    [
        ("ddp", {"published": True}),  # its gate of estimates gets none
        ("ddp", {"regression_weight": 0.0, "gated": False}),  # nor is there a loss of its estimates
        ("fsdp", {"estimate_steps": 2}),
    ],
)
def test_what_a_step_does_not_use_holds_no_process_up(tmp_path, backbone, cache, strategy, parts) -> None:
    in_two_processes(lambda: _train(tmp_path / "two", backbone, cache, parts=parts, strategy=strategy))
    _train(tmp_path / "one", backbone, cache, parts=parts)
    torch.testing.assert_close(_losses(tmp_path / "two"), _losses(tmp_path / "one"), atol=1e-5, rtol=0)


class _Rows:
    """Eight latents, or pictures, all alike."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        one = {
            "latents": torch.randn(4, 4, 4, generator=generator),
            "image": torch.rand(3, 32, 32, generator=generator),
        }
        return {name: value.expand(len(rows), *value.shape) for name, value in one.items()}


def _train_prior(folder: Path) -> None:
    """Train both parts of a prior for a step; each process writes its timesteps and its first stage's noise."""
    torch.manual_seed(5)
    prior, drawn = tiny_prior(), {}
    unet, first_stage = PriorModule(prior), FirstStageModule(tiny_first_stage(), None, latent_noise=1.0)
    draw, disturb = unet.loss.draw, first_stage._disturb

    def drawing(latents, seeds):
        noise, timesteps = draw(latents, seeds)
        drawn["timesteps"] = timesteps.tolist()
        return noise, timesteps

    def disturbing(latents, generator):
        drawn["posterior"] = latents.flatten().tolist()
        return disturb(latents, generator)

    unet.loss.draw, first_stage._disturb = drawing, disturbing
    settings = {"max_steps": 1, "batch_size": 4, "precision": "fp32", "accelerator": "cpu", "progress": False}
    for name, module in (("unet", unet), ("first_stage", first_stage)):
        fit(module, _Rows(), folder / name, **settings)  # type: ignore[arg-type]
    (folder / f"{process_rank()[0]}.json").write_text(json.dumps(drawn))


def test_each_process_draws_noise_of_its_own_for_a_prior(tmp_path) -> None:
    in_two_processes(lambda: _train_prior(tmp_path / "two"))
    _train_prior(tmp_path / "one")
    (one,), two = (
        [json.loads(path.read_text()) for path in sorted((tmp_path / name).glob("?.json"))] for name in ("one", "two")
    )
    assert [rank["timesteps"] for rank in two] == [one["timesteps"][0::2], one["timesteps"][1::2]]
    assert two[0]["timesteps"] != two[1]["timesteps"] and two[0]["posterior"] != two[1]["posterior"]


def test_a_killed_process_ends_the_run_and_the_next_goes_on(tmp_path, backbone, cache, one) -> None:
    in_two_processes(lambda: _train(tmp_path, backbone, cache, die_at=3), exit_codes=(1, -signal.SIGKILL))
    assert load_checkpoint(tmp_path / "last.safetensors")["global_step"] == 2
    in_two_processes(lambda: _train(tmp_path, backbone, cache))
    torch.testing.assert_close(_losses(tmp_path), _losses(one)[2:], atol=1e-5, rtol=0)
    _assert_same_pictures(one, tmp_path, backbone)


def test_unknown_strategies_and_inverters_that_cannot_be_split_are_refused(tmp_path, backbone) -> None:
    with pytest.raises(UserError, match="did you mean fsdp"):
        fit(_module(backbone), [], tmp_path, max_steps=1, batch_size=1, strategy="fsdp2")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="UpconvInverter.*ddp"):
        shard(UpconvInverter(backbone.spec, size=32, width=16), None)


def _shards(folder: Path, sizes: list[int]) -> str:
    for number, size in enumerate(sizes):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for image in range(size):
                save_png(folder / f"{image}.png", torch.rand(3, 32, 32))
                tar.add(folder / f"{image}.png", f"{number}-{image}.png")
    return str(folder / "*.tar")


def test_processes_share_a_stream_whose_shards_differ_in_size(tmp_path, backbone) -> None:
    stream = WebDatasetShards(_shards(tmp_path, [6, 2]), size=32, shuffle=4)
    in_two_processes(lambda: _train(tmp_path, backbone, stream, strategy="ddp"))
    seen = [json.loads((tmp_path / f"{rank}-{STEPS}.json").read_text())["seen"] for rank in (0, 1)]
    large, small = sorted(seen, key=lambda batches: batches[0][0].startswith("1__"))
    first_round = sum(large[:3], []) + small[0]
    assert len(first_round) == len(set(first_round)) == 8  # none twice, none missing
    assert len(large) == len(small) == STEPS  # the one with fewer images went on to its next round


class _Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("parts", [{}, {"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_every_process_fits_on_the_first_images_of_a_stream(tmp_path, backbone, monkeypatch, parts) -> None:
    stream = WebDatasetShards(_shards(tmp_path, [4, 3]), size=32)
    images = torch.stack([item["image"] for item in stream])
    for name, value in parts.items():
        monkeypatch.setenv(name, value)
    for count in (5, 1000):
        module = _module(backbone)
        prepare(module, stream, count, tmp_path)
        whitening = module.inverter.encoder.whitening
        assert whitening.fitted
        torch.testing.assert_close(whitening.mean, backbone(images[:count]).mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    assert {name: os.environ[name] for name in parts} == parts
    with pytest.raises(UserError, match="there are no training images"):
        prepare(_module(backbone), _Nothing(), 5, tmp_path)


@pytest.mark.parametrize(
    ("variables", "first", "layout"),
    [
        ({}, True, (1, None)),
        ({"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}, True, (2, 8)),
        ({"RANK": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}, False, (2, 8)),
        ({"RANK": "3", "LOCAL_RANK": "3", "SLURM_PROCID": "0", "LOCAL_WORLD_SIZE": "4"}, False, (1, 4)),
        ({"LOCAL_RANK": "1"}, False, (1, None)),  # started by Lightning
        ({"SLURM_PROCID": "5"}, False, (1, None)),
    ],
)
def test_the_first_of_all_machines_holds_the_folder(monkeypatch, variables, first, layout) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == first and torchrun_layout() == layout


def _faults(megabytes: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(megabytes << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _resident() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def keeps_and_returns_memory() -> None:
    megabytes = 100  # beyond what glibc keeps by itself
    pages = (megabytes << 20) / resource.getpagesize()
    assert min(_faults(megabytes) for _ in range(3)) > 0.5 * pages
    assert keep_freed_memory()
    for _ in range(9):  # until neighbouring holes have grown together
        _faults(megabytes)
    assert max(_faults(megabytes) for _ in range(3)) < 0.05 * pages
    kept = _resident()
    return_freed_memory()
    assert _resident() < kept - 0.8 * megabytes


def grows_in_huge_pages() -> None:
    def huge() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))

    assert keep_freed_memory() and huge() < 50_000  # none of what is set aside is in use
    for _ in range(2):  # also after memory was given back
        held = [torch.ones(1 << 20) for _ in range(100)]  # 400 MB
        assert huge() > 300_000
        held.clear()
        return_freed_memory()
        assert huge() < 100_000


@pytest.mark.skipif(
    not any(f"[{mode}]" in HUGE_PAGES.read_text() for mode in ("madvise", "always")) if HUGE_PAGES.is_file() else True,
    reason="this system has no transparent huge pages",
)
def test_kept_memory_lies_in_huge_pages() -> None:
    in_a_process(grows_in_huge_pages)


def test_objects_of_before_are_not_searched_for_garbage_within_a_block() -> None:
    class Cycle:
        pass

    with settled_objects():
        assert gc.get_freeze_count() > 10_000
        made = Cycle()
        made.itself, gone = made, weakref.ref(made)
        del made
        gc.collect()
        assert gone() is None, "what is made inside still is"
    assert gc.get_freeze_count() == 0


def test_kept_memory_is_not_faulted_in_again_and_can_be_returned() -> None:
    in_a_process(keeps_and_returns_memory)  # other tests run commands in this one, which set the same
