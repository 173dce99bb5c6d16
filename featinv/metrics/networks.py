"""Metric networks whose weights are used where they lie on disk; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from featinv.backbones.base import Backbone
from featinv.errors import UserError
from featinv.files import given_path
from featinv.inverters.described import weights_hash
from featinv.metrics.images import check_images

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"


def available_networks() -> tuple[dict[str, nn.Module], Lpips | None, dict[str, str]]:
    """Inception and LPIPS, if they are there.

    Returns:
        Embedders by name, LPIPS or None, and metric -> why it is skipped.
    """
    embedders: dict[str, nn.Module] = {}
    perceptual, skipped = None, {}
    try:
        embedders["inception"] = inception_embedder()
    except UserError as error:
        skipped["fid, kid (Inception)"] = str(error)
    try:
        perceptual = lpips_network()
    except UserError as error:
        skipped["lpips"] = str(error)
    return embedders, perceptual, skipped


def same_network(one: Backbone | None, other: Backbone | None) -> bool:
    """Whether two backbones have the same weights, whatever their layers; without weights nothing tells."""
    if one is None or other is None or not any(True for _ in one.parameters()):
        return False
    return weights_hash(one.state_dict()) == weights_hash(other.state_dict())


def check_referee(referee: Backbone | None, inverted: Backbone) -> None:
    """Raise UserError if a referee is the network that is inverted itself: what pleases that one, pleases it."""
    if same_network(referee, inverted):
        raise UserError(
            "the referee is the very network that is inverted and can be no judge of it; choose another, such as "
            "efficientnet_lite0 (referee.params.name=, in eval.classic referee=, in tools.apply --referee)."
        )


class Lpips(nn.Module):
    """LPIPS of originals and reconstructions (N, 3, H, W) in [0, 1]: (N,) float64, 0 for equal images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, original: Tensor, reconstruction: Tensor) -> Tensor:
        check_images(original, reconstruction)
        return self.network(original.float(), reconstruction.float(), normalize=True).flatten().double()


def lpips_network(pretrained: bool = True) -> Lpips:
    """LPIPS (Zhang et al. 2018) with AlexNet, through torchmetrics; nothing is downloaded.

    Args:
        pretrained: False leaves AlexNet random, for tests.

    Raises:
        UserError: If torchvision's AlexNet is not in torch.hub's cache.
    """
    # Its public class keeps every score, and older versions of it give no score per image.
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    path = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS
    if pretrained and not path.is_file():
        raise UserError(f"LPIPS needs torchvision's AlexNet, which is not at {path}; put {LPIPS_WEIGHTS} there.")
    network = _NoTrainLpips(net="alex", pnet_rand=not pretrained)
    network.train(False)
    return Lpips(network.requires_grad_(False))


class _InceptionEmbedder(nn.Module):
    """Inception's 2048 pooled features of [0, 1] images, which it takes as bytes."""

    def __init__(self, inception: nn.Module) -> None:
        super().__init__()
        self.inception = inception

    def forward(self, images: Tensor) -> Tensor:
        return self.inception((images.clamp(0, 1) * 255).round().byte())


def inception_embedder(weights: str | Path | None = None, *, antialias: bool = True) -> nn.Module:
    """The Inception network of FID, through torchmetrics; nothing is downloaded.

    Args:
        weights: Path of `weights-inception-2015-12-05-6726825d.pth`; by default it is looked for in
            torch.hub's cache.
        antialias: Whether the resize to 299 pixels antialiases (torchmetrics' default; older libraries do
            not).

    Returns:
        A frozen module, images (N, 3, H, W) in [0, 1] -> (N, 2048). Name it "inception" to get `fid` and
        `kid`.

    Raises:
        UserError: If the weights or the package torch-fidelity are missing.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3

    path = given_path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    if not path.is_file():
        raise UserError(
            f"There are no Inception weights at {path}; put {INCEPTION_WEIGHTS} there or use another network."
        )
    try:
        network = NoTrainInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path), antialias=antialias
        )
    except ModuleNotFoundError as error:
        raise UserError(
            "FID needs the package torch-fidelity; install it with `pip install torch-fidelity`."
        ) from error
    return _InceptionEmbedder(network.requires_grad_(False)).eval()
