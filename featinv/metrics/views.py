"""How networks see batches of images and of pairs; each forward runs once, and only if a metric asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from featinv.backbones.base import Backbone
from featinv.errors import UserError

Embedder = Callable[[Tensor], Tensor]
Perceptual = Callable[[Tensor, Tensor], Tensor]
Part = TypeVar("Part")


class Network(Protocol):
    """What a metric asks of a backbone."""

    def __call__(self, images: Tensor) -> Tensor: ...

    def logits_from(self, features: Tensor) -> Tensor: ...

    def logits(self, images: Tensor) -> Tensor: ...


class View:
    """A batch of images (N, 3, H, W) as one network sees it; a forward runs once, and only if a metric asks for it."""

    def __init__(self, network: Network, images: Tensor) -> None:
        self._network, self.images = network, images

    @cached_property
    def features(self) -> Tensor:
        """Features (N, C, H, W)."""
        return self._network(self.images)

    @cached_property
    def logits(self) -> Tensor:
        """Class scores (N, K)."""
        try:
            return self._network.logits_from(self.features)
        except UserError:  # the layer does not lead to the head: a forward from the image does
            return self._network.logits(self.images)

    @cached_property
    def classifies(self) -> bool:
        """Whether the network has class scores."""
        try:
            return self.logits.shape[1] > 0
        except UserError:
            return False

    def take(self, rows: list[int]) -> View:
        """The same view of some of the images, without another forward to their features."""
        if rows == list(range(len(self.images))):
            return self
        view = View(self._network, self.images[rows])
        view.features = self.features[rows]
        return view

    def against(self, images: Tensor) -> NetworkView:
        """Pair these originals with reconstructions (N, 3, H, W)."""
        return NetworkView(self, View(self._network, images))


class NetworkView(NamedTuple):
    """A batch of pairs as one network sees it."""

    original: View
    reconstruction: View

    @property
    def features(self) -> tuple[Tensor, Tensor]:
        """Features of originals and reconstructions, each (N, C, H, W)."""
        return self.original.features, self.reconstruction.features

    @property
    def logits(self) -> tuple[Tensor, Tensor]:
        """Class scores of originals and reconstructions, each (N, K)."""
        return self.original.logits, self.reconstruction.logits


@dataclass(frozen=True)
class ImagePairs:
    """A batch of originals and reconstructions (N, 3, H, W) and the networks' views of them.

    `own` is the network whose features the inverter was given, where that is not `backbone`; `perceptual` is LPIPS.
    """

    originals: Tensor
    reconstructions: Tensor
    backbone: NetworkView
    referee: NetworkView | None = None
    labels: Tensor | None = None
    own: NetworkView | None = None
    perceptual: Perceptual | None = None

    def seen_by_referee(self) -> NetworkView:
        """The referee's view.

        Raises:
            UserError: If there is no referee.
        """
        return _given(self.referee, "a referee network")

    def known_labels(self) -> Tensor:
        """The labels (N,).

        Raises:
            UserError: If there are none.
        """
        return _given(self.labels, "labels")

    def seen_by_own(self) -> NetworkView:
        """The view of the network that the inverter inverts.

        Raises:
            UserError: If there is no other than the backbone.
        """
        return _given(self.own, "the inverter's own network")

    def perceptual_distance(self) -> Tensor:
        """LPIPS (N,).

        Raises:
            UserError: If its network is not there.
        """
        return _given(self.perceptual, "the LPIPS network")(self.originals, self.reconstructions)


def classifies(backbone: Backbone) -> bool:
    """Whether a backbone has class scores; one black picture tells."""
    return View(backbone, backbone.mean.new_zeros(1, 3, backbone.input_size, backbone.input_size)).classifies


def _given(part: Part | None, what: str) -> Part:
    if part is None:
        raise UserError(f"This metric needs {what}; pass it or leave the metric out.")
    return part
