import math

import pytest
import torch

from featinv.data.scene_factors import FACTOR_INDEX, FACTORS, MAX_OBJECTS, Scenes, sample_scenes
from featinv.data.scene_renderer import _hit_box, _hit_cone, _hit_round, render
from featinv.data.scenes import ScenesDataset, render_scenes
from featinv.errors import UserError


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    together, factors, _ = render_scenes(3, [5, 9, 2, 7, 1, 4, 8, 6, 0], 16)
    alone, factor, _ = render_scenes(3, [9], 16)
    assert torch.equal(together[1], alone[0])
    assert torch.equal(factors[1].nan_to_num(), factor[0].nan_to_num())
    assert not torch.equal(together[1], render_scenes(4, [9], 16)[0][0])


@pytest.mark.parametrize("size", [1, 17, 64])
def test_any_size_gives_finite_pictures_in_range(size: int) -> None:
    images, factors, masks = render_scenes(0, range(6), size)
    assert images.shape == (6, 3, size, size) and masks.shape == (6, MAX_OBJECTS, size, size)
    assert factors.shape == (6, len(FACTORS))
    assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1


def test_factors_lie_in_their_ranges_and_absent_objects_are_nan() -> None:
    _, factors, masks = render_scenes(0, range(64), 16)
    for column, factor in enumerate(FACTORS):
        values = factors[:, column]
        values = values[values.isfinite()]
        if factor.kind == "categorical":
            assert set(values.tolist()) <= set(map(float, range(len(factor.classes)))), factor.name
    count = factors[:, FACTOR_INDEX["count"]] + 1
    shapes = torch.stack([factors[:, FACTOR_INDEX[f"object{k}_shape"]] for k in range(MAX_OBJECTS)], 1)
    assert torch.equal(shapes.isfinite().sum(1).float(), count)
    areas = masks.mean((2, 3))
    assert (areas[:, :-1] >= areas[:, 1:] - 1e-6).all()  # the largest object comes first


def test_centroids_and_areas_agree_with_the_masks() -> None:
    _, factors, masks = render_scenes(1, range(8), 32)
    for i in range(8):
        mask = masks[i, 0]
        rows, columns = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
        assert factors[i, FACTOR_INDEX["object0_image_x"]] == pytest.approx(
            float((mask * columns).sum() / mask.sum() / 32), abs=1e-4
        )
        assert factors[i, FACTOR_INDEX["object0_image_y"]] == pytest.approx(
            float((mask * rows).sum() / mask.sum() / 32), abs=1e-4
        )
        assert factors[i, FACTOR_INDEX["object0_visible_area"]] == pytest.approx(float(mask.mean()), abs=1e-4)


def _inside(shape: int, p: torch.Tensor) -> torch.Tensor:
    x, y, z = p
    radius = {0: (1 - y * y).clamp(min=0).sqrt(), 2: torch.ones_like(y), 3: (1 - y) / 2}.get(shape)
    flat = torch.maximum(x.abs(), z.abs()) <= 1 if radius is None else x * x + z * z <= radius * radius
    return flat & (y.abs() <= 1)


@pytest.mark.parametrize("shape", range(4))
def test_intersections_agree_with_marching_along_the_ray(shape: int) -> None:
    generator = torch.Generator().manual_seed(shape)
    origin = torch.tensor([0.3, 2.2, -4.0])[:, None].expand(3, 400)
    target = torch.rand(3, 400, generator=generator) * 3 - 1.5
    direction = torch.nn.functional.normalize(target - origin, dim=0)
    o, d = tuple(origin), tuple(direction)
    hit = _hit_box(o, d) if shape == 1 else None
    if hit is None:
        hit = _hit_cone(o, d) if shape == 3 else _hit_round(o, d, torch.tensor(float(shape == 2)))
    steps = torch.linspace(0, 9, 9001)
    inside = _inside(shape, origin[:, :, None] + direction[:, :, None] * steps)
    first = torch.where(inside.any(1), steps[inside.float().argmax(1)], torch.inf)
    both = hit.isfinite() & first.isfinite()
    assert both.sum() > 40
    assert (hit[both] - first[both]).abs().max() < 3e-3
    # A grazing ray may pass between two marching steps; no other disagreement about hit or miss.
    assert (hit.isfinite() != first.isfinite()).float().mean() < 0.01


def test_an_object_casts_its_shadow_away_from_the_light() -> None:
    scenes = sample_scenes(0, [0])
    scenes = Scenes(scenes.values, scenes.objects, torch.zeros_like(scenes.present))
    scenes.values.update(camera_azimuth=torch.tensor([0.0]), floor_texture=torch.tensor([0.0]))
    scenes.values.update(light_azimuth=torch.tensor([math.pi / 2]), light_elevation=torch.tensor([0.6]))
    empty, _ = render(scenes, 32)
    one = Scenes(scenes.values, scenes.objects, torch.tensor([[True, False, False, False]]))
    one.objects.update({k: v.clone() for k, v in one.objects.items()})
    for name, value in {"shape": 2.0, "size": 0.5, "height": 0.6, "world_x": 0.0, "world_z": 0.0}.items():
        one.objects[name][:, 0] = value
    image, coverage = render(one, 32)
    darker = (empty - image).mean(1)[0] * coverage[0, MAX_OBJECTS]
    left, right = darker[:, :16].clamp(min=0).sum(), darker[:, 16:].clamp(min=0).sum()
    # Light from +x, camera looking along +z: +x is on one side, the shadow on the other.
    assert max(left, right) > 10 * min(left, right) + 0.1


def test_batched_fetch_equals_single_items() -> None:
    data = ScenesDataset(length=8, seed=2, size=16)
    batch = data.__getitems__([3, 6])
    assert torch.equal(batch[1]["image"], data[6]["image"]) and batch[1]["id"] == data[6]["id"]
    with pytest.raises(IndexError):
        data[8]
    with pytest.raises(UserError):
        ScenesDataset(length=0)
