"""Layer explorer: what each depth of a network still tells, and how well it gives away whose picture it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from featinv.applications.batches import Progress, decode, encode, seeds_of, small_maps
from featinv.attribution.diagnostics import leak_check
from featinv.backbones.base import Backbone
from featinv.errors import UserError
from featinv.image import resize
from featinv.inverters.base import Inverter
from featinv.metrics.factors import FactorProbe, FactorSpec
from featinv.metrics.features import feature_cosine
from featinv.metrics.images import psnr, ssim
from featinv.metrics.intervals import Interval, bootstrap_mean


@dataclass(frozen=True)
class LayerPoint:
    """One depth of a curve.

    Attributes:
        layer: Name of the layer.
        shape: (C, H, W) of its map.
        figures: "cosine", "psnr", "ssim", "leak" and with a referee "referee_cosine", over the images.
        chance: Of the leak: what reconstructions that hold nothing would reach.
        images: (N, 3, H', W') reconstructions.
    """

    layer: str
    shape: tuple[int, int, int]
    figures: dict[str, Interval]
    chance: float
    images: Tensor


def layer_curve(
    backbone: Backbone,
    layers: Sequence[str],
    images: Tensor,
    inverter_for: Callable[[Backbone], Inverter],
    referee: Backbone,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[LayerPoint]:
    """Invert the same images from every layer with the same kind of inverter.

    The leak is `leak_check`: how often the referee, a network that took no part, finds the own original among all N by
    the reconstruction alone.

    Args:
        backbone: Cut at each layer in turn, weights shared.
        layers: Names, first to last.
        images: (N, 3, H, W) in [0, 1], N at least 2.
        inverter_for: Makes or loads the inverter of a layer, from the backbone cut there.
        referee: Judges.
        seed: Of the samples.
        batch_size: Maps inverted at a time.
        progress: Told after every layer.

    Raises:
        UserError: If there is no layer or no second image.
    """
    if not layers or len(images) < 2:
        raise UserError("a layer curve needs at least one layer and two images.")
    points = []
    for number, layer in enumerate(layers):
        cut = backbone.at(layer)
        points.append(_point(cut, images, inverter_for(cut), referee, seed, batch_size))
        if progress is not None:
            progress(number + 1, len(layers))
    return points


def _point(
    cut: Backbone, images: Tensor, inverter: Inverter, referee: Backbone, seed: int, batch_size: int
) -> LayerPoint:
    features = encode(cut, images, batch_size)
    found = decode(inverter, features, seeds_of(seed, len(images)), batch_size)
    originals = resize(images, (found.shape[-2], found.shape[-1])).clamp(0, 1)
    leak = leak_check(originals, found, referee, batch_size=batch_size)
    per_image = {
        "cosine": feature_cosine(features, encode(cut, found, batch_size)),
        "referee_cosine": feature_cosine(encode(referee, originals), encode(referee, found)),
        "psnr": psnr(originals, found),
        "ssim": ssim(originals, found),
        "leak": leak.hits,
    }
    spec = cut.spec
    figures = {name: bootstrap_mean(values, seed=seed) for name, values in per_image.items()}
    return LayerPoint(cut.layer, (spec.channels, spec.height, spec.width), figures, leak.chance, found)


def linear_information(
    backbone: Backbone,
    layers: Sequence[str],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    schema: Sequence[FactorSpec],
    grid: int = 2,
    batch_size: int = 64,
) -> dict[str, dict[str, Interval]]:
    """What a linear probe reads of the true factors at each layer: no inverter, so an upper part of the same curve.

    Args:
        backbone: Cut at each layer in turn.
        layers: Names, first to last.
        train: Images (N, 3, H, W) and their factors (N, F) that the probe learns from.
        test: Others that it is scored on.
        schema: Of the F factors.
        grid: Maps are averaged to grid x grid positions.
        batch_size: Images at a time.

    Returns:
        Layer -> factor -> accuracy (classes) or R2 (numbers) with its interval.
    """
    curve = {}
    for layer in layers:
        cut = backbone.at(layer)
        inputs = [small_maps(cut, images, grid, batch_size) for images, _ in (train, test)]
        curve[layer] = FactorProbe(schema).fit(inputs[0], train[1]).score(inputs[1], test[1])
    return curve


def leak_report(points: Sequence[LayerPoint]) -> list[str]:
    """One sentence a layer on how much its features give away."""
    said = []
    for point in points:
        leak, count = point.figures["leak"], point.figures["leak"]["n"]
        value, low, high = (float(leak[k] or 0.0) for k in ("value", "low", "high"))  # type: ignore[literal-required]
        clear = "identifies originals" if low > point.chance else "cannot be told from chance"
        said.append(
            f"{point.layer}: {100 * value:.0f} % [{100 * low:.0f}, {100 * high:.0f}] of reconstructions find their own "
            f"original among {count} (chance {100 * point.chance:.0f} %): {clear}."
        )
    return said
