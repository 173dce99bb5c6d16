"""Faults in the middle of the work: kill -9, a full disk, a second run in the folder, checkpoints that hold code.

Beside these: a killed or damaged training run in test_end_to_end and test_training, killed processes in test_processes,
a NaN loss and changed settings in test_training, corrupt images in test_data, LDM checkpoints in test_ldm.
"""

import ast
import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import tiny_first_stage, tiny_prior
from forks import in_a_process
from omegaconf import DictConfig
from PIL import Image
from safetensors import SafetensorError

import train
from featinv.backbones import load_backbone
from featinv.checkpoint import save_checkpoint
from featinv.conditioning.encoders import SpatialEncoder
from featinv.config import CONFIG_ROOT, load_config, refuse_foreign
from featinv.data.cifar import CIFAR10
from featinv.data.scenes import ScenesDataset
from featinv.data.shards import IndexedShards
from featinv.diffusion.prior import load_prior
from featinv.errors import UserError, exit_on_user_error
from featinv.files import atomic_write, read_state, run_lock
from featinv.inverters.build import about, build_inverter, load_inverter, save_inverter
from featinv.inverters.diffusion import DiffusionInverter
from featinv.inverters.reconstruct import reconstruct
from featinv.training.cache import build_cache, cache_bytes
from featinv.training.module import InversionModule
from featinv.training.runner import fit, hold_run, last_checkpoint
from sample import sample

ROOT = Path(__file__).resolve().parents[1]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, hidden ones too."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def _cache(folder: Path, prior, backbone, progress=None):
    scenes = ScenesDataset(20, size=32)
    return build_cache(folder, {}, scenes, prior.first_stage, backbone, batch_size=1, progress=progress)


@pytest.mark.parametrize("die_at", [1, 18])
def test_a_cache_killed_with_kill_9_is_finished_by_the_same_call(tmp_path, prior, backbone, die_at) -> None:
    def die(done: int, total: int) -> None:
        if done == die_at:
            _kill()

    in_a_process(lambda: _cache(tmp_path / "cut", prior, backbone, die), -signal.SIGKILL)
    done = []
    _cache(tmp_path / "cut", prior, backbone, lambda number, total: done.append(number))
    assert done[0] == (1 if die_at == 1 else 17)  # progress is written down every 16 batches
    _cache(tmp_path / "whole", prior, backbone)
    assert _contents(tmp_path / "cut") == _contents(tmp_path / "whole")


def test_a_damaged_cache_is_made_anew(tmp_path, prior, backbone) -> None:
    folder = _cache(tmp_path, prior, backbone).folder
    whole = _contents(tmp_path)
    (folder / "mean.npy").write_bytes((folder / "mean.npy").read_bytes()[:500])
    _cache(tmp_path, prior, backbone)
    assert _contents(tmp_path) == whole


def test_a_cache_that_is_made_anew_leaves_a_reader_what_it_reads(tmp_path, prior, backbone) -> None:
    read = _cache(tmp_path, prior, backbone)
    before = {name: torch.from_numpy(array.copy()) for name, array in read.arrays.items()}
    more = ScenesDataset(30, seed=1, size=32)
    assert build_cache(tmp_path, {}, more, prior.first_stage, backbone).folder == read.folder
    for name, value in before.items():
        assert torch.equal(torch.from_numpy(read.arrays[name]), value)


def test_what_an_interrupted_cache_reserved_is_no_space_that_is_missing(tmp_path, prior, backbone, monkeypatch) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    needed = cache_bytes(20, {"features": (512, 2, 2), "mean": (4, 4, 4), "std": (4, 4, 4)})

    def usage(folder: Path) -> tuple[int, int, int]:
        used = sum(path.stat().st_size for path in folder.glob("*.npy"))
        return shutil._ntuple_diskusage(2 * needed, used, int(1.2 * needed) - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(KeyboardInterrupt):
        _cache(tmp_path, prior, backbone, interrupt)  # before its first progress is written down
    assert len(_cache(tmp_path, prior, backbone)) == 20


def test_a_cache_on_a_full_disk_ends_in_a_sentence_before_it_begins(tmp_path, prior, backbone, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(FULL))
        with pytest.raises(UserError, match="cannot write .*No space left.*; free some space"):
            _cache(tmp_path, prior, backbone)
    assert not _contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 100, 0))
        with pytest.raises(UserError, match="the cache needs .* free; choose another folder"):
            _cache(tmp_path, prior, backbone)
    assert not _contents(tmp_path)


def _module(backbone) -> InversionModule:
    torch.manual_seed(5)
    prior = tiny_prior()
    encoder = SpatialEncoder(backbone.spec, prior.latent_shape, 16, components=16, hidden=16, blocks=1)
    return InversionModule(DiffusionInverter(prior, encoder), backbone, max_steps=4, warmup_steps=1)


def test_a_checkpoint_on_a_full_disk_leaves_the_ones_before(tmp_path, prior, backbone, monkeypatch) -> None:
    cache, run = _cache(tmp_path / "cache", prior, backbone), tmp_path / "run"
    settings = {"batch_size": 2, "checkpoint_every": 1, "precision": "fp32", "accelerator": "cpu", "progress": False}
    fit(_module(backbone), cache, run, max_steps=2, **settings)
    before = {name: content for name, content in _contents(run).items() if name.endswith(".safetensors")}
    assert sorted(before) == ["last.safetensors", "previous.safetensors"]

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(UserError, match="cannot write .*No space left.*; free some space"):
            fit(_module(backbone), cache, run, max_steps=4, **settings)
    assert {name: content for name, content in _contents(run).items() if name.endswith(".safetensors")} == before
    fit(_module(backbone), cache, run, max_steps=4, **settings)
    assert last_checkpoint(run) == run / "last.safetensors"


@pytest.fixture(scope="module")
def sampling(tmp_path_factory) -> DictConfig:
    """Five pictures, two at a time, by a small inverter."""
    folder = tmp_path_factory.mktemp("sampling")
    torch.manual_seed(0)
    tiny_prior().save_pretrained(folder / "prior")
    words = [f"prior={folder / 'prior'}", "conditioning.params={components: 16, hidden: 16, blocks: 1}"]
    words += [f"data.params.{part}.params.{size}" for part in ("train", "val") for size in ("length=5", "size=32")]
    config = load_config("scenes64", words)
    backbone = {"name": "resnet10t", "layer": "final", "pretrained": False, "input_size": 64}
    config.backbone = {"target": "featinv.backbones.timm_backbone.TimmBackbone", "params": backbone}
    network = load_backbone(**backbone)
    inverter = build_inverter(config, network.spec, network)
    save_inverter(folder / "inverter.safetensors", inverter, about(config, inverter, network.spec))
    words = [f"inverter={folder}", "n=5", "samples=1", "batch_size=2", "num_inference_steps=2"]
    return load_config(CONFIG_ROOT / "sample.yaml", words)


def _stop_in_the_middle_of_picture(number: int, patch: pytest.MonkeyPatch, stop) -> None:
    """Call `stop` once so many of the samples are whole and the next one's file is half there."""
    save, written = Image.Image.save, []

    def half(self, path, *args, **kwargs) -> None:
        if Path(path).parent.name == "samples":
            written.append(path)
            if len(written) == number:
                Path(path).write_bytes(b"\x89PNG half")
                stop()
        save(self, path, *args, **kwargs)

    patch.setattr(Image.Image, "save", half)


def test_sampling_killed_with_kill_9_is_finished_by_the_same_command(tmp_path, sampling) -> None:
    def killed() -> None:
        _stop_in_the_middle_of_picture(4, pytest.MonkeyPatch(), _kill)
        sample(sampling, tmp_path / "cut")

    in_a_process(killed, -signal.SIGKILL)
    assert len([path for path in (tmp_path / "cut/samples").iterdir() if not path.name.startswith(".")]) == 3
    for name in ("cut", "whole"):
        assert sample(sampling, tmp_path / name).samples().shape == (5, 3, 32, 32)
    assert _contents(tmp_path / "cut") == _contents(tmp_path / "whole")


def test_sampling_on_a_full_disk_ends_in_a_sentence_and_goes_on_later(tmp_path, sampling, monkeypatch) -> None:
    def full() -> None:
        raise FULL

    with monkeypatch.context() as patch:
        _stop_in_the_middle_of_picture(4, patch, full)
        with pytest.raises(UserError, match="cannot write .*No space left.*; free some space"):
            sample(sampling, tmp_path / "cut")
    assert len(list((tmp_path / "cut/samples").iterdir())) == 3
    for name in ("cut", "whole"):
        sample(sampling, tmp_path / name)
    assert _contents(tmp_path / "cut") == _contents(tmp_path / "whole")


def test_a_full_disk_anywhere_else_is_one_sentence_too(capsys) -> None:
    @exit_on_user_error
    def main(number: int) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(SystemExit, match="2"):
        main(errno.ENOSPC)
    assert capsys.readouterr().err == "error: the disk is full; free some space and run the same command again.\n"
    with pytest.raises(OSError):
        main(errno.EIO)


def test_a_killed_process_leaves_no_unfinished_files(tmp_path) -> None:
    def killed() -> None:
        with atomic_write(tmp_path / "deep" / "a.txt"):
            _kill()

    in_a_process(killed, -signal.SIGKILL)
    assert len(_contents(tmp_path)) == 1
    with atomic_write(tmp_path / "b.txt"), run_lock(tmp_path):  # what a living process writes stays
        pass
    assert list(_contents(tmp_path)) == ["b.txt"]


def test_a_second_run_in_the_folder_is_refused_and_changes_nothing(tmp_path) -> None:
    config = load_config("demo")
    with hold_run(tmp_path):
        with pytest.raises(UserError, match="another process is working"):
            train.train(config, tmp_path)
        with pytest.raises(UserError, match="another process is working"):
            reconstruct(None, None, [], tmp_path)  # type: ignore[arg-type]
    assert not _contents(tmp_path)


class _Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def _diffusers_folder(path: Path, content: bytes) -> None:
    for name in ("unet", "text_encoder", "tokenizer", "scheduler"):
        (path / name).mkdir(parents=True)
    tiny_first_stage().vae.save_config(path / "vae")
    (path / "vae" / "diffusion_pytorch_model.bin").write_bytes(content)


def _cifar_folder(path: Path, content: bytes) -> None:
    (path / "cifar-10-batches-py").mkdir(parents=True)
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (path / "cifar-10-batches-py" / name).write_bytes(content)


def test_no_loader_executes_a_pickle(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _Malicious()}, "torch.pt")
    content = Path("torch.pt").read_bytes()
    for name in ("last.safetensors", "inverter.safetensors", "pickle.ckpt"):
        Path(name).write_bytes(content if name != "pickle.ckpt" else pickle.dumps(_Malicious()))
    _diffusers_folder(Path("prior"), content)
    _cifar_folder(Path("cifar"), pickle.dumps(_Malicious()))
    loaders = {
        "torch file": lambda: read_state("torch.pt"),
        "plain pickle": lambda: read_state("pickle.ckpt"),
        "backbone": lambda: load_backbone("resnet10t", checkpoint_path="torch.pt"),
        "inverter": lambda: load_inverter("."),
        "resumed run": lambda: last_checkpoint("."),
        "diffusers folder": lambda: load_prior("prior"),
        "CIFAR-10": lambda: CIFAR10("cifar"),
    }
    for name, load in loaders.items():
        with pytest.raises(UserError):
            load()
        assert not Path("pwned").exists(), name


@pytest.mark.parametrize(
    "node",
    [
        {"target": "os.system", "params": {"command": "touch pwned"}},
        {"target": "featinv", "params": {}},
        {"target": "featinv.load_inverter", "params": {}},
        {"target": "featinv.cli.sys.exit", "params": {}},
        {"target": "featinv.checkpoint.json.dumps", "params": {}},
        {"target": "featinv.files.fcntl", "params": {}},  # of another module, though reached through ours
        {"target": "featinv.config.${name}", "params": {}},
        {"target": "featinv.inverters.diffusion.DiffusionInverter", "params": {"x": [{"target": "os.getcwd"}]}},
        {"target": "featinv.files.write_text", "params": {"path": "pwned", "text": ""}},  # ours, but no class
        {
            "target": "featinv.inverters.diffusion.DiffusionInverter",
            "params": {"guidance": "${oc.decode:'{target: os.system, params: {command: touch pwned}}'}"},
        },
        {
            "target": "featinv.inverters.diffusion.DiffusionInverter",
            "params": {"guidance": "${oc.env:HOME,${oc.decode:'{target: os.system}'}}"},
        },
    ],
)
def test_a_stored_configuration_builds_nothing_foreign(tmp_path, monkeypatch, node) -> None:
    monkeypatch.chdir(tmp_path)
    spec = {"channels": 1, "height": 1, "width": 1, "layer": "final"}
    described = {"config": {"inverter": node, "name": "x"}, "spec": spec, "prior": None, "branch": None}
    save_checkpoint("inverter.safetensors", {"featinv": described, "state_dict": {}})
    with pytest.raises(UserError, match=r"could run any code|cannot import"):
        load_inverter(".")
    assert not Path("pwned").exists()


def test_a_stored_configuration_is_judged_without_importing_what_it_names() -> None:
    """Its data set's module alone brings Lightning, seconds for a picture of one's own."""
    node = "{'target': 'featinv.data.datamodule.ImageDataModule'}"
    judged = f"import sys; from featinv.config import refuse_foreign; refuse_foreign({node}, 'x'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", judged], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "omegaconf" in done.stdout.split() and "torch" not in done.stdout.split()
    refuse_foreign({"target": "featinv.backbones.Backbone"}, "what a package offers of its modules")


def test_a_shard_that_is_a_command_needs_consent(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("pipe:touch pwned", "PIPE:touch pwned", "{pipe:touch pwned,b.tar}"):
        with pytest.raises(UserError, match=r"runs a shell command"):
            IndexedShards(url)
    assert not Path("pwned").exists()
    picture = Path("a.png")
    Image.new("RGB", (8, 8)).save(picture)
    with tarfile.open("a.tar", "w") as tar:
        tar.add(picture)
    monkeypatch.setenv("FEATINV_PIPES", "1")
    assert len(IndexedShards("pipe:cat a.tar", size=8)) == 1


def test_no_source_unpickles() -> None:
    paths = [path for room in ("featinv", "tools", "eval") for path in (ROOT / room).rglob("*.py")]
    for path in [*paths, ROOT / "train.py", ROOT / "sample.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert called not in ("pickle.load", "pickle.loads", "joblib.load", "pd.read_pickle"), path
            assert called != "torch.load" or given.get("weights_only") == "True", path
            assert given.get("allow_pickle", "False") == "False", path
