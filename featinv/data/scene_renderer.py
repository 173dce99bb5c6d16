"""A vectorised ray caster: analytic spheres, boxes, cylinders and cones on a floor, soft shadows, no stored images.

Each object is intersected in its own frame, where it fills |y| <= 1 and has unit radius. Objects stand on the floor and
are seen and lit from above, so no shape needs a bottom.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from featinv.data.scene_factors import COLOURS, FLOOR_COLOURS, MAX_OBJECTS, SKY_COLOURS, Scenes

SUBSAMPLES = 2  # rays per pixel side; each of the four has its own light direction, which softens shadows
_ROUND, _BOX, _CONE = range(3)
_KIND = (_ROUND, _BOX, _ROUND, _CONE)  # by shape
_SLOPE = ((1.0, 0.0), (0.0, 0.0), (0.0, 0.0), (-0.25, 0.25))  # by shape: normal_y = slope * y + offset on the side
_EPS = 1e-3


@dataclass(frozen=True)
class _Objects:
    """The present objects of a chunk of scenes, flattened to M rows."""

    scene: Tensor  # (M,) row of the scene
    slot: Tensor  # (M,) column of the object
    shape: Tensor  # (M,) index into SHAPES
    kind: Tensor  # (M,) which intersection: _ROUND, _BOX or _CONE
    centre: Tensor  # (M, 3)
    scale: Tensor  # (M, 3) half extents
    cos: Tensor  # (M,)
    sin: Tensor  # (M,)


def _flatten(scenes: Scenes) -> _Objects:
    scene, slot = scenes.present.nonzero(as_tuple=True)
    o = {name: v[scene, slot] for name, v in scenes.objects.items()}
    shape = o["shape"].long()
    # A box's footprint must fit its circle of radius `size`.
    radius = torch.where(shape == 1, o["size"] * 0.78, o["size"])
    return _Objects(
        scene,
        slot,
        shape,
        torch.tensor(_KIND)[shape],
        torch.stack([o["world_x"], o["height"], o["world_z"]], 1),
        torch.stack([radius, o["height"], radius], 1),
        o["yaw"].cos(),
        o["yaw"].sin(),
    )


def _to_local(v: Tensor, cos: Tensor, sin: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn world vectors (3, ..., R) by -yaw and divide by the half extents; the parameters broadcast."""
    x, y, z = v
    return (cos * x - sin * z) / scale[0], y / scale[1], (sin * x + cos * z) / scale[2]


def _hit_box(o: tuple[Tensor, ...], d: tuple[Tensor, ...]) -> Tensor:
    near = far = None
    for oi, di in zip(o, d, strict=True):
        inverse = 1.0 / di
        middle, half = -oi * inverse, inverse.abs()
        near = middle - half if near is None else torch.maximum(near, middle - half)
        far = middle + half if far is None else torch.minimum(far, middle + half)
    assert near is not None and far is not None
    return torch.where((far >= near) & (near > _EPS), near, torch.inf)


def _hit_round(o: tuple[Tensor, ...], d: tuple[Tensor, ...], has_lid: Tensor) -> Tensor:
    """Spheres and cylinders: x^2 + z^2 + p y^2 = 1 with p = 1 or 0, and the cylinder's lid."""
    (ox, oy, oz), (dx, dy, dz) = o, d
    p = 1.0 - has_lid
    a = dx * dx + dz * dz + p * dy * dy
    half_b = ox * dx + oz * dz + p * oy * dy
    discriminant = half_b * half_b - a * (ox * ox + oz * oz + p * oy * oy - 1.0)
    t = (-half_b - discriminant.clamp(min=0.0).sqrt()) / a
    side = (discriminant > 0) & ((oy + t * dy).abs() <= 1.0) & (t > _EPS)
    lid_t = (1.0 - oy) / dy
    x, z = ox + lid_t * dx, oz + lid_t * dz
    lid = (x * x + z * z < has_lid) & (lid_t > _EPS)
    return torch.where(side, t, torch.where(lid, lid_t, torch.inf))


def _hit_cone(o: tuple[Tensor, ...], d: tuple[Tensor, ...]) -> Tensor:
    """Cones with the apex at y = 1: x^2 + z^2 = (1 - y)^2 / 4; the mirrored upper half is cut off."""
    (ox, oy, oz), (dx, dy, dz) = o, d
    fall, rise = 0.5 * (1.0 - oy), 0.5 * dy
    a = dx * dx + dz * dz - rise * rise
    half_b = ox * dx + oz * dz + fall * rise
    discriminant = half_b * half_b - a * (ox * ox + oz * oz - fall * fall)
    root, inverse = discriminant.clamp(min=0.0).sqrt(), 1.0 / a
    best = torch.full_like(root, torch.inf)
    for t in ((-half_b - root) * inverse, (-half_b + root) * inverse):
        valid = (discriminant > 0) & ((oy + t * dy).abs() <= 1.0) & (t > _EPS)
        best = torch.where(valid, torch.minimum(best, t), best)
    return best


def _cast(objects: _Objects, n: int, origins: Tensor, directions: Tensor) -> Tensor:
    """Nearest hit with each object.

    Args:
        objects: M objects of n scenes.
        n: Number of scenes.
        origins: (3, n, R) or (3, n, 1).
        directions: (3, n, R).

    Returns:
        Ray parameters (n, MAX_OBJECTS, R), infinite where the ray misses.
    """
    hits = torch.full((n, MAX_OBJECTS, directions.shape[-1]), torch.inf)
    for kind in range(3):
        m = (objects.kind == kind).nonzero()[:, 0]
        if not len(m):
            continue
        scene = objects.scene[m]
        frame = objects.cos[m, None], objects.sin[m, None], objects.scale[m].T[:, :, None]
        o = _to_local(origins[:, scene] - objects.centre[m].T[:, :, None], *frame)
        d = _to_local(directions[:, scene], *frame)
        if kind == _ROUND:
            hit = _hit_round(o, d, (objects.shape[m] == 2).float()[:, None])
        else:
            hit = _hit_box(o, d) if kind == _BOX else _hit_cone(o, d)
        hits[scene, objects.slot[m]] = hit
    return hits


def _camera(scenes: Scenes, size: int) -> tuple[Tensor, Tensor]:
    """Origins (3, n, 1) and unit directions (3, n, R), R = (size * SUBSAMPLES)^2 rays by subsample, then pixel."""
    height, distance = scenes.values["camera_height"], scenes.values["camera_distance"]
    azimuth = scenes.values["camera_azimuth"]
    eye = torch.stack([distance * azimuth.sin(), height, -distance * azimuth.cos()])
    target = torch.tensor([0.0, 0.62, 0.0])[:, None]
    forward = torch.nn.functional.normalize(target - eye, dim=0)
    right = torch.stack([-forward[2], torch.zeros_like(height), forward[0]])
    right = torch.nn.functional.normalize(right, dim=0)
    up = torch.linalg.cross(right, forward, dim=0)
    offset = (torch.arange(SUBSAMPLES) + 0.5) / SUBSAMPLES
    axis = (torch.arange(size)[None] + offset[:, None]) / size * 2 - 1  # (S, size)
    v, u = torch.broadcast_tensors(axis[:, None, :, None], axis[None, :, None, :])  # (S, S, size, size)
    zoom = 0.42
    directions = (  # u grows to the right, v downwards
        forward[:, :, None]
        + zoom * right[:, :, None] * u.reshape(1, 1, -1)
        - zoom * up[:, :, None] * v.reshape(1, 1, -1)
    )
    return eye[:, :, None], directions * directions.square().sum(0).rsqrt()


def _texture(kind: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Brightness factor in [0.5, 1] of a texture at local coordinates; edges are soft so that they alias less."""
    sx, sy, sz = (4.2 * x).sin(), (4.2 * y + 0.8).sin(), (4.2 * z).sin()
    stripes = (7.0 * sy).tanh()
    checks = (12.0 * sx * sy * sz).tanh()
    noise = ((2.1 * x + 2.3 * sy).sin() + (2.7 * z - 1.9 * sx).sin() + (3.1 * y + 1.7 * sz).sin()) / 2.2
    pattern = torch.where(kind == 1, stripes, torch.where(kind == 2, checks, noise))
    return torch.where(kind == 0, 1.0, 0.75 + 0.25 * pattern)


def _lights(scenes: Scenes, rays: int) -> Tensor:
    """Unit directions to the light (3, n, R): one jittered direction per subsample."""
    azimuth, elevation = scenes.values["light_azimuth"], scenes.values["light_elevation"]
    spread = 0.05 * torch.tensor([[-1.0, -1.0], [1.0, -0.4], [-0.4, 1.0], [0.6, 0.6]])
    a, e = azimuth[:, None] + 2 * spread[:, 0], elevation[:, None] + spread[:, 1]
    light = torch.stack([e.cos() * a.sin(), e.sin(), e.cos() * a.cos()])  # (3, n, 4)
    return light.repeat_interleave(rays // light.shape[-1], dim=-1)


def _palette(colours: dict[str, tuple[float, float, float]]) -> Tensor:
    return torch.tensor(list(colours.values()))


def _surface(scenes: Scenes, objects: _Objects, winner: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Albedo (3, n, R), unit normal (3, n, R) and shininess (n, R) at the hit points; slot MAX_OBJECTS is the floor."""
    n = len(winner)
    centre, scale = torch.zeros(3, n, MAX_OBJECTS + 1), torch.ones(3, n, MAX_OBJECTS + 1)
    turn, slope = torch.zeros(2, n, MAX_OBJECTS + 1), torch.zeros(2, n, MAX_OBJECTS + 1)
    shape = torch.full((n, MAX_OBJECTS + 1), -1.0)
    kind, colour = torch.zeros(n, MAX_OBJECTS + 1), torch.zeros(3, n, MAX_OBJECTS + 1)
    turn[0] = 1.0
    at = objects.scene, objects.slot
    centre[:, *at], scale[:, *at] = objects.centre.T, objects.scale.T
    turn[:, *at] = torch.stack([objects.cos, objects.sin])
    slope[:, *at], shape[at] = torch.tensor(_SLOPE)[objects.shape].T, objects.shape.float()
    kind[:, :-1], kind[:, -1] = scenes.objects["texture"], scenes.values["floor_texture"]
    colour[:, :, :-1] = _palette(COLOURS)[scenes.objects["colour"].long()].permute(2, 0, 1)
    colour[:, :, -1] = _palette(FLOOR_COLOURS)[scenes.values["floor_colour"].long()].T
    table = torch.cat([centre, scale, turn, slope, shape[None], kind[None], colour])  # (15, n, MAX_OBJECTS + 1)
    values = table.gather(2, winner[None].expand(len(table), -1, -1))
    centre, scale, (cos, sin), (p, q) = values[:3], values[3:6], values[6:8], values[8:10]
    shape, kind, colour = values[10], values[11], values[12:]

    x, y, z = _to_local(points - centre, cos, sin, scale)
    is_floor = winner == MAX_OBJECTS
    texture = _texture(kind, x, torch.where(is_floor, 0.37, y), z)
    is_box, lid = shape == 1, (shape == 2) & (y > 1.0 - _EPS)
    biggest = torch.maximum(torch.maximum(x.abs(), y.abs()), z.abs()) - 1e-4
    nx = torch.where(is_box, torch.where(x.abs() >= biggest, x, 0.0), torch.where(lid, 0.0, x)) / scale[0]
    ny = torch.where(is_box, torch.where(y.abs() >= biggest, y, 0.0), torch.where(lid, 1.0, p * y + q)) / scale[1]
    nz = torch.where(is_box, torch.where(z.abs() >= biggest, z, 0.0), torch.where(lid, 0.0, z)) / scale[2]
    normal = torch.stack([cos * nx + sin * nz, ny, cos * nz - sin * nx])
    normal[:, is_floor] = torch.tensor([0.0, 1.0, 0.0])[:, None]
    normal = normal * (normal.square().sum(0) + 1e-12).rsqrt()
    return colour * texture, normal, torch.where(is_floor, 0.04, 0.35)


def _render_chunk(scenes: Scenes, size: int) -> tuple[Tensor, Tensor]:
    n, objects = len(scenes.present), _flatten(scenes)
    origins, directions = _camera(scenes, size)
    hits = _cast(objects, n, origins, directions)
    floor = -origins[1] / directions[1]
    floor = torch.where(floor > 0, floor, torch.inf)
    distance, winner = torch.cat([hits, floor[:, None]], 1).min(1)  # (n, R)
    is_sky = distance.isinf()
    distance = distance.clamp(max=60.0)
    points = origins + distance * directions
    albedo, normal, shine = _surface(scenes, objects, winner, points)

    light = _lights(scenes, directions.shape[-1])
    facing = (normal * light).sum(0).clamp(min=0.0)
    shadowed = _cast(objects, n, points + 2 * _EPS * normal, light).amin(1).isfinite()
    lit = torch.where(shadowed, 0.0, facing)
    half = light - directions
    half = half * half.square().sum(0).rsqrt()
    highlight = torch.where(shadowed, 0.0, shine * (normal * half).sum(0).clamp(min=0.0) ** 32)
    ambient = 0.30 + 0.14 * normal[1]
    sky = _palette(SKY_COLOURS)[scenes.values["sky"].long()].T[:, :, None]
    ground = albedo * (ambient + 0.72 * lit) * (0.8 + 0.2 * sky) + highlight
    horizon = sky * (1.0 - 0.45 * directions[1].clamp(min=0.0)) + 0.06
    fog = torch.where(is_sky, 1.0, 1.0 - (-((distance - 9.0).clamp(min=0.0)) / 14.0).exp())
    colour = (ground + (horizon - ground) * fog).clamp(0.0, 1.0)
    images = colour.reshape(3, n, SUBSAMPLES**2, size, size).mean(2).transpose(0, 1).contiguous()
    mask = torch.where(is_sky, MAX_OBJECTS + 1, winner).reshape(n, -1, size, size)
    return images, mask


def render(scenes: Scenes, size: int = 64, chunk: int = 8) -> tuple[Tensor, Tensor]:
    """Render scenes.

    Args:
        scenes: N scenes from `sample_scenes`.
        size: Side of the picture in pixels.
        chunk: Scenes at a time; keeps the working set in the processor's cache.

    Returns:
        Images (N, 3, size, size) in [0, 1], and coverage (N, MAX_OBJECTS + 2, size, size): the share of each pixel that
        shows each drawn object, the floor, the sky.
    """
    images, coverage = [], []
    for start in range(0, len(scenes.present), chunk):
        rows = slice(start, start + chunk)
        part = Scenes(
            {k: v[rows] for k, v in scenes.values.items()},
            {k: v[rows] for k, v in scenes.objects.items()},
            scenes.present[rows],
        )
        image, mask = _render_chunk(part, size)
        images.append(image)
        coverage.append(torch.stack([(mask == k).float().mean(1) for k in range(MAX_OBJECTS + 2)], 1))
    return torch.cat(images), torch.cat(coverage)
