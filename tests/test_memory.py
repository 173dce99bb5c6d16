"""Peak memory of a benchmark does not grow with the number of images."""

import resource
from pathlib import Path

import pytest
import torch
from forks import in_a_process
from test_benchmark import Benchmark, Contestant, Painter, images, load_backbone

SIDE = 128  # an image has 0.2 MB


class Large(Painter):
    size = SIDE

    def invert(self, features, *, seeds):
        return torch.nn.functional.interpolate(super().invert(features, seeds=seeds), SIDE)


class Items:
    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return {"image": images(1, index, SIDE)[0], "label": index % 5, "id": f"image-{index}"}


def growth(few: int, many: int, out: Path) -> float:
    """MiB by which the peak of many images is above that of a few before them."""
    backbone, referee = (load_backbone(name, pretrained=False, input_size=32) for name in ("resnet10t", "resnet14t"))
    peaks = []
    for count in (few, many):
        settings = {"referee": referee, "size": SIDE, "distribution_resamples": 5}
        Benchmark(backbone, Items(count), out / str(count), **settings).run({"a": Contestant(Large())})
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(f"peak resident memory in MiB of {few} and {many} images: {peaks}")
    return peaks[1] - peaks[0]


@pytest.mark.slow
def test_three_hundred_images_need_little_more_memory_than_fifty(tmp_path) -> None:
    def measured() -> None:
        assert growth(50, 300, tmp_path) < 60  # kept, originals and reconstructions would be 100 MB

    in_a_process(measured)
