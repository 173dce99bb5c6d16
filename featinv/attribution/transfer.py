"""What an attack does: accuracy under it, and whether one network's adversarial examples fool another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from featinv.attribution.adversarial import fgsm, pgd
from featinv.backbones.base import Backbone
from featinv.errors import UserError


def attacks(
    backbone: Backbone,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = 4 / 255,
    l2_eps: float = 1.5,
    steps: int = 10,
    targets: Tensor | None = None,
    seeds: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """FGSM and PGD in both norms on the same images, and towards `targets` where there are some.

    Args:
        backbone: The attacked network.
        images: (N, 3, H, W) in [0, 1].
        labels: True classes (N,).
        eps: L-infinity radius in [0, 1] pixel units.
        l2_eps: L2 radius of the whole change, in the same units.
        steps: Of PGD.
        targets: Wanted classes (N,).
        seeds: Of PGD's random start, one for each image; None starts at the images.

    Returns:
        Images (N, 3, H, W) by "fgsm", "pgd", "pgd_l2", and with targets by "fgsm_targeted", ... too.

    Raises:
        UserError: As `pgd`.
    """
    found = {}
    wanted = {"": labels} if targets is None else {"": labels, "_targeted": targets}
    for suffix, classes in wanted.items():
        targeted = bool(suffix)
        found[f"fgsm{suffix}"] = fgsm(backbone, images, classes, eps, targeted)
        found[f"pgd{suffix}"] = pgd(backbone, images, classes, eps, steps, targeted=targeted, seeds=seeds)
        l2 = pgd(backbone, images, classes, l2_eps, steps, norm="l2", targeted=targeted, seeds=seeds)
        found[f"pgd_l2{suffix}"] = l2
    return found


@torch.no_grad()
def predict(backbone: Backbone, images: Tensor, batch_size: int = 64) -> Tensor:
    """Predicted classes (N,) of images (N, 3, H, W) in [0, 1], on the CPU."""
    device = backbone.mean.device
    parts = [backbone.logits(batch.to(device)).argmax(1).cpu() for batch in images.split(batch_size)]
    return torch.cat(parts)


def accuracy(backbone: Backbone, images: Tensor, labels: Tensor, batch_size: int = 64) -> float:
    """Share of images whose predicted class is their label.

    Args:
        backbone: A backbone with a classifier.
        images: (N, 3, H, W) in [0, 1].
        labels: True classes (N,).
        batch_size: Images evaluated at a time (memory).

    Raises:
        UserError: If there are no images, or not one label for each.
    """
    _check_labels(images, labels, "images")
    return float((predict(backbone, images, batch_size) == labels.cpu()).double().mean())


def _check_labels(images: Tensor, labels: Tensor, name: str) -> None:
    if not len(images) or labels.shape != (len(images),):
        raise UserError(f"{name}: {len(images)} images with {labels.numel()} labels; give one label for each image.")


def transfer_table(
    attacked: dict[str, Tensor],
    labels: Tensor,
    backbones: dict[str, Backbone],
    originals: Tensor | None = None,
    batch_size: int = 64,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """How adversarial examples made for one network act on others (Szegedy et al. 2014, arXiv 1312.6199).

    Args:
        attacked: Name of the source, such as the attacked network -> its images (N, 3, H, W) in [0, 1].
        labels: True classes (N,).
        backbones: Name -> judge.
        originals: The images before the attack (N, 3, H, W); None leaves out what compares with them.
        batch_size: Images evaluated at a time (memory).

    Returns:
        table[source][judge] = {"n": number of images, "right": share whose predicted class is the label, "changed":
        share whose predicted class is not the one of the original, "flipped": the same among the originals that the
        judge got right, whose number is "n_right"; None if there are none}.

    Raises:
        UserError: If the numbers of images and labels differ.
    """
    for name, images in {**attacked, **({} if originals is None else {"originals": originals})}.items():
        _check_labels(images, labels, name)
    table: dict[str, dict[str, dict[str, float | None]]] = {source: {} for source in attacked}
    for judge, backbone in backbones.items():
        before = None if originals is None else predict(backbone, originals, batch_size)
        for source, images in attacked.items():
            after = predict(backbone, images, batch_size)
            right = (after == labels.cpu()).double().mean()
            cell: dict[str, float | None] = {"n": float(len(after)), "right": float(right)}
            if before is not None:
                changed, known = (after != before).double(), before == labels.cpu()
                cell |= {"changed": float(changed.mean()), "n_right": float(known.sum())}
                cell["flipped"] = float(changed[known].mean()) if known.any() else None
            table[source][judge] = cell
    return table
