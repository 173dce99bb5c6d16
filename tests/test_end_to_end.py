"""train.py, sample.py and eval.benchmark as a user runs them, on a prior small enough for a test."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_prior
from forks import in_a_process, run_command, run_here, under_torchrun

from eval.benchmark import spelled_out
from featinv.checkpoint import load_checkpoint
from featinv.cli import parse_command_line
from featinv.config import CONFIG_ROOT
from featinv.inverters.build import load_inverter

ROOT = Path(__file__).resolve().parents[1]


def _run(*words: str) -> subprocess.CompletedProcess:
    return run_command(words, ROOT)


def _run_alone(*words: str) -> subprocess.CompletedProcess:
    """In an interpreter that has imported nothing, as a user's."""
    command, environment = [sys.executable, *words], _environment()
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("end_to_end")
    torch.manual_seed(0)
    tiny_prior().save_pretrained(folder / "prior")
    scenes = {"target": "featinv.data.scenes.ScenesDataset"}
    content = {
        "defaults": ["experiment/scenes64"],
        "prior": str(folder / "prior"),
        "data": {
            "params": {
                "train": {**scenes, "params": {"length": 24, "size": 32}},
                "val": {**scenes, "params": {"length": 12, "size": 32}},
                "num_workers": 0,
            }
        },
        "backbone": {
            "target": "featinv.backbones.timm_backbone.TimmBackbone",
            "params": {"name": "resnet10t", "pretrained": False, "input_size": 64},
        },
        "conditioning": {"params": {"components": 16, "hidden": 16, "blocks": 1}},
        "inverter": {"params": {"num_inference_steps": 2}},
        "training": {
            "max_steps": 4,
            "batch_size": 4,
            "checkpoint_every": 2,
            "probe_every": 2,
            "probe_images": 4,
            "prepare_images": 24,
            "cache_root": str(folder / "cache"),
        },
    }
    content["backbone"]["params"]["layer"] = "final"
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def trained(experiment) -> Path:
    done = _run_alone("train.py", f"experiment={experiment}", f"out={experiment.parent / 'run'}")
    assert done.returncode == 0, done.stderr[-2000:]
    return experiment.parent / "run"


def test_training_leaves_an_inverter_a_curve_and_pictures(trained) -> None:
    lines = [json.loads(line) for line in (trained / "probe.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["floor"] < 1 and line["images"] == 4 * line["step"] for line in lines)
    for name in ("inverter.safetensors", "config.yaml", "probe.png", "probe/0000004.png"):
        assert (trained / name).stat().st_size > 0


def test_a_finished_run_does_not_train_again(experiment, trained) -> None:
    before = (trained / "inverter.safetensors").read_bytes()
    done = _run("train.py", f"experiment={experiment}", f"out={trained}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (trained / "inverter.safetensors").read_bytes() == before


def test_a_run_starts_from_the_weights_of_another(experiment, trained) -> None:
    out = experiment.parent / "from_run"
    words = [f"experiment={experiment}", f"training.start={trained}", "training.max_steps=1", f"out={out}"]
    done = _run("train.py", *words, "training.module.params.learning_rate=1e-12")
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_checkpoint(run / "inverter.safetensors")["state_dict"] for run in (trained, out))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-6, rtol=2e-3)  # rounded to half precision


def test_sampling_one_picture_and_a_data_set(trained, tmp_path) -> None:
    from featinv.image import load_png, save_png

    save_png(tmp_path / "my.png", torch.rand(3, 50, 70))
    done = _run_alone(
        "sample.py",
        f"inverter={trained}",
        f"image={tmp_path / 'my.png'}",
        "samples=2",
        f"out={tmp_path / 'one'}",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert load_png(tmp_path / "one" / "samples" / "my_1.png").shape == (3, 32, 32)
    words = [
        f"inverter={trained}+refined",
        "params.refined={steps: 2}",
        "n=3",
        "samples=1",
        "guidance_scale=2",
        f"out={tmp_path / 'set'}",
    ]
    assert _run("sample.py", *words).returncode == 0
    kept = {p: p.read_bytes() for p in (tmp_path / "set" / "samples").iterdir()}
    assert len(kept) == 3
    next(iter(kept)).unlink()
    assert _run("sample.py", *words).returncode == 0
    assert {p: p.read_bytes() for p in (tmp_path / "set" / "samples").iterdir()} == kept


def test_benchmark_writes_the_documented_files(trained, tmp_path) -> None:
    inverters = f"inverters=[{trained},optimisation,retrieval,{trained}+guided+refined,retrieval+refined]"
    words = [
        inverters,
        "limits={optimisation: 5}",
        "n=8",
        "factor_images=40",
        "params={optimisation: {steps: 20}, refined: {steps: 4, tolerance: 1}}",
    ]
    done = _run("-m", "eval.benchmark", *words, "distribution_resamples=2", f"out={tmp_path}")
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads((tmp_path / "metrics.json").read_text())
    documented = {
        "meta",
        "floor",
        "floor_same_class",
        "ceiling",
        "inverters",
        "factors",
        "differences",
        "cases",
        "subset",
    }
    assert set(content) == documented and set(content["factors"]) == {"originals", "features"}
    assert content["subset"]["n"] == 5 and len(content["inverters"]) == 5
    for figures in content["inverters"].values():
        assert {"value", "low", "high", "n"} <= set(figures["cosine"]) and "factor_object0_shape" in figures
        assert "fd_mobilenetv2" in figures and "fid" not in figures
    cosines = [content["inverters"][row]["cosine"]["value"] for row in content["inverters"]]
    assert cosines[3] > cosines[0] and cosines[4] >= cosines[2]  # matched, and not
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64" in page and "http" not in page.replace("http-equiv", "")
    assert (tmp_path / "table.md").read_text().count("\n| ") == 8 and (tmp_path / "table.csv").is_file()
    done = _run("-m", "eval.layers", f"benchmarks=[{tmp_path}]", f"out={tmp_path / 'layers'}")
    assert done.returncode == 0 and "retrieval" in done.stdout, done.stderr[-2000:]
    words = [f"inverter={trained}", "n=2", "corruptions=[fog]", "severities=[2]", "eps=[4]", "ood=[noise]"]
    done = _run("-m", "eval.robustness", *words, f"out={tmp_path / 'robustness'}")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "robustness" / "robustness.json").read_text())["conditions"]
    assert set(found) == {"clean", "fog-2", "fgsm-4of255", "pgd-4of255", "noise"}


def test_the_benchmark_of_an_experiment_is_that_of_its_run_and_baselines() -> None:
    words = ["n=8", "experiment=configs/experiment/demo.yaml", "out=a", "inverters=[b]"]
    default = str(CONFIG_ROOT / "benchmark.yaml")
    short = parse_command_line("", default, argv=spelled_out(words[:2]))
    assert short.config.inverters == ["runs/demo", "optimisation", "retrieval"] and short.config.n == 8
    assert short.out == Path("runs/demo_benchmark")
    given = parse_command_line("", default, argv=spelled_out(words))
    assert given.config.inverters == ["b"] and given.out == Path("a")
    assert spelled_out(["n=8"]) == ["n=8"]


def _die_after(path: Path) -> None:
    while not path.is_file():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_killed_with_kill_9_goes_on_to_the_same_weights(experiment, tmp_path) -> None:
    words = ["train.py", f"experiment={experiment}", "training.max_steps=40", "training.checkpoint_every=5"]
    words += ["training.probe_every=1000", "training.precision=fp32"]
    cut = tmp_path / "cut"

    def killed() -> None:
        threading.Thread(target=_die_after, args=[cut / "last.safetensors"], daemon=True).start()
        run_here([*words, f"out={cut}"], ROOT)

    in_a_process(killed, exit_code=-signal.SIGKILL)
    assert load_checkpoint(cut / "last.safetensors")["global_step"] < 40
    for out in (cut, tmp_path / "whole"):
        done = _run(*words, f"out={out}")
        assert done.returncode == 0, done.stderr[-2000:]
    resumed, whole = (load_checkpoint(tmp_path / name / "last.safetensors") for name in ("cut", "whole"))
    for part in ("state_dict", "ema"):
        pairs = resumed[part], whole[part]
        first, second = (p["averages"] for p in pairs) if part == "ema" else pairs
        assert all(torch.equal(first[k], second[k]) for k in second)


def test_torchrun_starts_again_after_a_killed_process_and_trains_what_one_process_does(experiment, tmp_path) -> None:
    words = ["train.py", f"experiment={experiment}", "training.max_steps=40", "training.checkpoint_every=5"]
    words += ["training.probe_every=1000", "training.precision=fp32", "training.accelerator=cpu"]
    two = tmp_path / "two"

    def work() -> None:
        (two / "started").mkdir(parents=True, exist_ok=True)
        (two / "started" / "-".join(os.environ[key] for key in ("RANK", "TORCHELASTIC_RESTART_COUNT"))).touch()
        if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
            threading.Thread(target=_die_after, args=[two / "last.safetensors"], daemon=True).start()
        run_here([*words, f"out={two}"], ROOT)

    under_torchrun(work, max_restarts=1)
    assert {path.name for path in (two / "started").iterdir()} == {"0-0", "1-0", "0-1", "1-1"}
    done = _run(*words, f"out={tmp_path / 'one'}")
    assert done.returncode == 0, done.stderr[-3000:]
    features = torch.rand(2, 512, 2, 2)
    one, two = (load_inverter(tmp_path / name).invert(features, seeds=[1, 2]) for name in ("one", "two"))
    torch.testing.assert_close(one, two, atol=2e-3, rtol=0)  # the weights are rounded to half precision


def test_train_prior_writes_a_prior_that_loads_and_draws(tmp_path) -> None:
    from featinv.diffusion.prior import load_prior
    from featinv.image import load_png

    words = ["data.params.length=80", "validation.params.length=4", "unet.batch_size=8"]
    words += ["unet.config.block_out_channels=[32, 32, 64]", "first_stage.vae.block_out_channels=[32]"]
    words += [f"{part}.module.params.max_steps=2" for part in ("first_stage", "unet")]
    words += [f"first_stage.{stage}.params.max_steps=2" for stage in ("finishing", "polish")]
    done = _run("-m", "tools.train_prior", "scenes64", *words, f"out={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    prior = load_prior(tmp_path / "prior")
    assert prior.size == 64 and prior.latent_shape == (12, 16, 16)
    assert json.loads((tmp_path / "first_stage.json").read_text())["psnr"] > 25
    assert load_png(tmp_path / "samples.png").shape[0] == 3
    done = _run("-m", "tools.train_prior", "scenes64", *words, "size=65", f"out={tmp_path}")
    assert done.returncode == 2 and "size: 64 -> 65" in done.stderr and "--changed" in done.stderr
    words += [f"start={tmp_path / 'prior'}", "first_stage.module=null", "unet.module=null"]
    done = _run("-m", "tools.train_prior", "scenes64", *words, f"out={tmp_path / 'on'}")
    assert done.returncode == 0, done.stderr[-3000:]
    on, pictures = load_prior(tmp_path / "on" / "prior"), torch.rand(2, 3, 64, 64)
    assert torch.equal(on.first_stage.encode(pictures), prior.first_stage.encode(pictures))
    assert all(torch.equal(a, b) for a, b in zip(on.unet.parameters(), prior.unet.parameters(), strict=True))
    latents = torch.randn(1, 12, 16, 16)
    assert not torch.equal(on.first_stage.decode(latents), prior.first_stage.decode(latents))
    done = _run("-m", "tools.train_prior", "scenes64", "unet.module=null", f"out={tmp_path / 'no'}", *words[:2])
    assert done.returncode != 0 and "`start`" in done.stderr


def test_every_classic_method_runs_on_a_picture(tmp_path) -> None:
    from featinv.image import save_png

    save_png(tmp_path / "my.png", torch.rand(3, 90, 70))
    words = ["--all", "--image", str(tmp_path / "my.png"), "--input-size", "64", "--steps", "2"]
    done = _run("-m", "tools.visualize", *words, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "out" / "report.html").read_text()
    for name in ("grad_cam", "guided_backprop", "integrated_gradients", "optimisation", "maximisation", "fgsm", "pgd"):
        assert (tmp_path / "out" / f"{name}.png").is_file() and (tmp_path / "out" / f"{name}.json").is_file()
    assert "max-pooling" in page  # EfficientNet has none: the DeconvNet says so instead of drawing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.py", "experiment=scenes46"], "did you mean"),
        (["train.py", "training.max_stepz=3"], "training.max_steps"),
        (["train.py", "--dry"], "unknown flag"),
        (["train.py", "backbone=resnet51"], "resnet50"),
        (["sample.py", "inverter=nothing/here"], "no inverter"),
        (["sample.py", "samples"], "key=value"),
        (["sample.py", "params.refined={steps: 3}"], "is not +refined"),
        (["-m", "eval.benchmark", "inverters=[optimisation]"], "at least one trained"),
        (["-m", "eval.benchmark", "experiment=vit_b16"], "runs/vit_b16"),
        (["-m", "eval.robustness", "experiment=demo"], "unknown key 'experiment'"),
        (["tools/list_layers.py", "resnet5000"], "timm has no model"),
        (["-m", "tools.visualize", "gradcam", "--image", "x.png"], "grad_cam"),
        (["-m", "tools.visualize", "grad_cam", "--image", "x.png"], "no picture or folder"),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(words, message) -> None:
    done = _run(*words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "script", [["train.py"], ["sample.py"], ["-m", "eval.benchmark"], ["-m", "eval.robustness"], ["-m", "tools.demo"]]
)
def test_help_lists_every_key(script) -> None:
    done = _run(*script, "--help")
    assert done.returncode == 0 and "key" in done.stdout and "seed" in done.stdout


@pytest.mark.parametrize("damage", ["missing", "empty", "text"])
def test_a_picture_that_is_none_gets_a_clear_error(trained, tmp_path, damage) -> None:
    path = tmp_path / "my.jpg"
    if damage != "missing":
        path.write_text("" if damage == "empty" else "hello")
    done = _run("sample.py", f"inverter={trained}", f"image={path}", f"out={tmp_path / 'out'}")
    assert done.returncode == 2 and "my.jpg" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
