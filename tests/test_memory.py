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

class Items:
    def __len__(self):
        return {count}

    def __getitem__(self, index):
        return {{"image": images(1, seed=index, size=64)[0], "label": index % 5, "id": f"image-{{index}}"}}

backbone = load_backbone("resnet10t", pretrained=False, input_size=64)
settings = dict(referee=backbone, size=32, distribution_resamples=5)
Benchmark(backbone, Items(), {out!r}, **settings).run({{"a": Contestant(Painter()), "b": Contestant(Painter(0.3))}})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_two_thousand_images_need_little_more_memory_than_five_hundred(tmp_path) -> None:
    peak = {}
    for count in (500, 2000):
        script = SCRIPT.format(tests=str(ROOT / "tests"), count=count, out=str(tmp_path / str(count)))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        peak[count] = int(done.stdout.split()[-1])
    print(f"peak resident memory in MiB: { {n: kib // 1024 for n, kib in peak.items()} }")
    assert peak[2000] <= 1.2 * peak[500], peak
