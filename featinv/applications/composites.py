"""Composite feature maps: regions pasted, maps mixed, positions permuted, channels swapped, and what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featinv.errors import UserError
from featinv.image import resize
from featinv.inverters.masks import channel_mask, region_mask


def _check_pair(features: Tensor, other: Tensor) -> None:
    if features.shape[1:] != other.shape[1:] or len(other) not in (1, len(features)):
        raise UserError(
            f"feature maps {tuple(features.shape)} and {tuple(other.shape)} cannot be combined; take both from "
            "one layer, as many or one."
        )


def replace(features: Tensor, other: Tensor, where: Tensor) -> Tensor:
    """Features (N, C, H, W), and those of `other` where the mask (broadcasting to them) is true.

    Raises:
        UserError: If the maps do not fit each other.
    """
    _check_pair(features, other)
    return torch.where(where.to(features.device).bool(), other.to(features), features)


def paste(features: Tensor, other: Tensor, box: Sequence[float], to: Sequence[float] | None = None) -> Tensor:
    """A rectangle of one map laid into another.

    Args:
        features: (N, C, H, W).
        other: (N, C, H, W) or (1, C, H, W), where the rectangle is cut.
        box: (left, top, right, bottom) as fractions of the picture; positions whose centre lies in it.
        to: (left, top) of its new place; None leaves it where it was. Moved by whole positions, cut at the border.

    Raises:
        UserError: If the maps do not fit each other, the box holds no position, or nothing of it lands in the map.
    """
    inside = region_mask(features, box)
    if to is None:
        return replace(features, other, inside)
    height, width = features.shape[2:]
    left, top = round((to[0] - box[0]) * width), round((to[1] - box[1]) * height)
    landed = shift(inside, left, top)
    if not landed.any():
        raise UserError(f"nothing of the region {list(box)} moved to {list(to)} lies in the map.")
    return replace(features, shift(other, left, top), landed)


def shift(maps: Tensor, right: int, down: int) -> Tensor:
    """Maps (N, C, H, W) moved by whole positions (or pixels), zeros where nothing comes from."""
    height, width = maps.shape[2:]
    padded = F.pad(maps, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)))
    return padded[:, :, max(-down, 0) : max(-down, 0) + height, max(-right, 0) : max(-right, 0) + width]


def mix(features: Tensor, other: Tensor, share: float) -> Tensor:
    """(1 - share) of one map and `share` of the other, (N, C, H, W).

    Raises:
        UserError: If the maps do not fit each other.
    """
    _check_pair(features, other)
    return torch.lerp(features, other.to(features).expand_as(features), share)


def permute_positions(features: Tensor, seed: int = 0) -> Tensor:
    """All feature vectors of (N, C, H, W), each at another place; the order follows from the seed."""
    order = torch.randperm(features.shape[2] * features.shape[3], generator=torch.Generator().manual_seed(seed))
    return features.flatten(2)[:, :, order.to(features.device)].unflatten(2, features.shape[2:])


def swap_channels(features: Tensor, other: Tensor, channels: Sequence[int]) -> Tensor:
    """Features (N, C, H, W) with some channels of another map.

    Raises:
        UserError: If the maps do not fit each other or a channel does not exist.
    """
    return replace(features, other, channel_mask(features, channels))


def covered(mask: Tensor, grid: tuple[int, int], share: float = 0.1) -> Tensor:
    """Positions of a map that an object covers.

    Args:
        mask: (N, 1, H, W) in [0, 1], the object in the picture.
        grid: (h, w) of the map.
        share: Of a position's cell that the object must fill.

    Returns:
        (N, 1, h, w) bool.
    """
    return F.adaptive_avg_pool2d(mask.float(), grid) > share


def mean_over(features: Tensor, where: Tensor) -> Tensor:
    """Mean of features (N, C, H, W) over the positions that `where` (N, 1, H, W) marks, (N, C, 1, 1); 0 over none."""
    weights = where.to(features)
    return (features * weights).sum((2, 3), keepdim=True) / weights.sum((2, 3), keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Placement:
    """Whether a pasted object is seen at its place, each figure (N,) in [0, 1], NaN where it is not defined.

    Attributes:
        appeared: Inside the mask: 1 where the decoded picture is the source's there, 0 where it is the target's.
        kept: Outside the mask: 1 where it is the target's there, 0 where it is the source's.
        inside: Share of all change against the picture decoded from the unpasted map that lies in the mask.
        area: The mask's share of the picture: what `inside` is by chance.
    """

    appeared: Tensor
    kept: Tensor
    inside: Tensor
    area: Tensor

    @property
    def placed(self) -> Tensor:
        """(N,) bool: the object appeared where it was pasted, the rest stayed, and the change lies in its place."""
        return (self.appeared > 0.5) & (self.kept > 0.5) & (self.inside > self.area)


def placement(decoded: Tensor, unpasted: Tensor, target: Tensor, source: Tensor, mask: Tensor) -> Placement:
    """Judge decoded composites by the original pictures and the object's mask.

    appeared = E_target / (E_target + E_source), E the squared difference of the decoded picture from that original,
    over the pixels of the mask; `kept` likewise over the others, with the two exchanged.

    Args:
        decoded: (N, 3, H, W) from the composite maps.
        unpasted: (N, 3, H, W) from the target's own maps, with the same seeds.
        target: (N, 3, H, W) originals that were pasted into.
        source: (N, 3, H, W) originals that were pasted from (moved as the paste was).
        mask: (N, 1, H, W) in [0, 1]: the pasted object in the picture.
    """
    size = (decoded.shape[-2], decoded.shape[-1])
    target, source, mask = (resize(x.double(), size) for x in (target, source, mask))
    to_target, to_source = (decoded - target).square(), (decoded - source).square()
    change = (decoded - unpasted).double().square()

    def total(error: Tensor, weight: Tensor) -> Tensor:
        return (error * weight).sum((1, 2, 3))

    inside = total(to_target, mask) / (total(to_target, mask) + total(to_source, mask))
    outside = total(to_source, 1 - mask) / (total(to_target, 1 - mask) + total(to_source, 1 - mask))
    return Placement(inside, outside, total(change, mask) / total(change, torch.ones_like(mask)), mask.mean((1, 2, 3)))
