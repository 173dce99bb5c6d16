"""The three commands of the README's ImageNet job at full network size, on a tree of two classes.

Minutes and many GB, so left out unless it is asked for:

python -m pytest -m full -s tests/test_imagenet_job.py
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from featinv.image import load_png

ROOT = Path(__file__).resolve().parents[1]
CLASSES, NEEDED_GB = ("n01440764", "n01443537"), 16
MEMORY_GB = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
SMALLER = {
    "train.py": "prior=random:minisd backbone.params.pretrained=false data.params.num_workers=0 training.num_workers=0 "
    "training.max_steps=2 training.batch_size=2 training.probe_images=1 training.probe_every=2 "
    "inverter.params.num_inference_steps=2",
    "sample.py": "batch_size=2",
}


def _commands() -> list[str]:
    section = (ROOT / "README.md").read_text().partition("recipe on ImageNet")[2].partition("\n## ")[0]
    return re.findall(r"^    python ((?:train|sample)\.py [^#\n]*)", section, re.MULTILINE)[:3]


def _tree(root: Path) -> None:
    for split, count in (("train", 3), ("val", 3)):
        for name in CLASSES:
            for number in range(count):
                path = root / split / name / f"{name}_{number}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.effect_noise((300, 280), 60).convert("RGB").save(path)


def _run(words: str, root: Path, log: Path) -> str:
    """Run one command; print its output, time and peak memory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "IMAGENET_ROOT": str(root)}
    started = time.time()
    with open(log, "w") as file:
        command = [sys.executable, *shlex.split(words)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    output = log.read_text()
    print(f"\n$ python {words}\n{output}")
    print(f"-> {time.time() - started:.0f} s, peak memory {usage.ru_maxrss / 1e6:.1f} GB")
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.skipif(MEMORY_GB < NEEDED_GB, reason=f"this machine has less than {NEEDED_GB} GB of memory")
def test_the_imagenet_job_in_three_commands(tmp_path) -> None:
    _tree(tmp_path / "imagenet")
    prepare, train, reconstruct = _commands()
    assert "--dry-run" in prepare and "per_class=10" in reconstruct
    run, out = tmp_path / "run", tmp_path / "val"
    try:
        output = _run(f"{prepare} {SMALLER['train.py']}", tmp_path / "imagenet", tmp_path / "log")
        assert "859.5 M" in output and "nothing is missing" in output
        output = _run(f"{train} {SMALLER['train.py']} out={run}", tmp_path / "imagenet", tmp_path / "log")
        assert "1024 x 9 x 9" in output and (run / "inverter.safetensors").is_file()
        words = f"{reconstruct} {SMALLER['sample.py']} inverter={run} out={out}"
        _run(words, tmp_path / "imagenet", tmp_path / "log")
        images = json.loads((out / "manifest.json").read_text())["images"]
        assert [image["label"] for image in images] == [0, 0, 0, 1, 1, 1]  # up to 10 of each class; here are 3
        for image in images:
            assert load_png(out / image["samples"][0]["file"]).shape == (3, 256, 256)
    finally:
        shutil.rmtree(run, ignore_errors=True)  # a checkpoint of 6 GB
