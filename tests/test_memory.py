"""Peak memory of a benchmark does not grow with the number of images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import resource, sys, torch
sys.path[:0] = [{tests!r}]
torch.set_num_threads(1)
from test_benchmark import Benchmark, Contestant, Painter, images, load_backbone

SIDE = 128  # an image has 0.2 MB

class Large(Painter):
    size = SIDE

    def invert(self, features, *, seeds):
        return torch.nn.functional.interpolate(super().invert(features, seeds=seeds), SIDE)

class Items:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {{"image": images(1, index, SIDE)[0], "label": index % 5, "id": f"image-{{index}}"}}

backbone, referee = (load_backbone(name, pretrained=False, input_size=32) for name in ("resnet10t", "resnet14t"))
for count in (50, 300):
    settings = dict(referee=referee, size=SIDE, distribution_resamples=5)
    benchmark = Benchmark(backbone, Items(count), {out!r} + str(count), **settings)
    benchmark.run({{"a": Contestant(Large()), "b": Contestant(Large(0.3))}})
    print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_three_hundred_images_need_little_more_memory_than_fifty(tmp_path) -> None:
    script = SCRIPT.format(tests=str(ROOT / "tests"), out=str(tmp_path / "out"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = dict(map(int, line.split()) for line in done.stdout.splitlines())
    print(f"peak resident memory in MiB by images: {peak}")
    assert peak[300] <= 1.1 * peak[50], peak  # kept, they would be 0.15 GB
