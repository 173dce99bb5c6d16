"""Refine to match: from a sample, steps until the features agree to a tolerance, or an honest "not reached"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featinv.applications.batches import Progress, encode
from featinv.backbones.base import Backbone
from featinv.diffusion.first_stage import FirstStage
from featinv.diffusion.objective_guidance import pictures_together
from featinv.errors import UserError
from featinv.inverters.parametrisations import parametrise
from featinv.metrics.features import feature_cosine


@dataclass(frozen=True)
class Refined:
    """What refinement found for N pictures.

    Attributes:
        images: (N, 3, H, W) in [0, 1]: where the tolerance was passed, else the best on the way.
        before: (N,) feature cosine of the start.
        after: (N,) of `images`.
        tolerance: The cosine to pass.
        steps: (N,) step that gave `images`; 0 where the start was the best.
        skipped: (N,) steps left out because their gradient was not finite.
        referee_before: (N,) cosine of the start and the original in a network that took no part, or None.
        referee_after: (N,) the same of `images`.
    """

    images: Tensor
    before: Tensor
    after: Tensor
    tolerance: float
    steps: Tensor
    skipped: Tensor
    referee_before: Tensor | None = None
    referee_after: Tensor | None = None

    @property
    def reached(self) -> Tensor:
        """(N,) bool."""
        return self.after >= self.tolerance

    @property
    def adversarial(self) -> Tensor | None:
        """(N,) bool: the match grew and the referee's fell, as it does for adversarial noise; None without referee."""
        if self.referee_before is None or self.referee_after is None:
            return None
        return (self.after > self.before) & (self.referee_after < self.referee_before)

    def verdict(self, row: int) -> str:
        """What to tell a reader about one picture."""
        end = f"cosine {float(self.before[row]):.3f} -> {float(self.after[row]):.3f} after {int(self.steps[row])} steps"
        said = f"{'reached' if self.reached[row] else 'not reached'} ({self.tolerance:.3f}): {end}"
        if self.skipped[row]:
            said += f", {int(self.skipped[row])} gradients not finite"
        if self.referee_before is not None and self.referee_after is not None and self.adversarial is not None:
            said += f"; referee {float(self.referee_before[row]):.3f} -> {float(self.referee_after[row]):.3f}"
            said += " (adversarial: only the inverted backbone is pleased)" if self.adversarial[row] else ""
        return said


def refine(
    backbone: Backbone,
    features: Tensor,
    start: Tensor,
    *,
    first_stage: FirstStage | None = None,
    tolerance: float = 0.95,
    steps: int = 100,
    learning_rate: float = 0.01,
    referee: Backbone | None = None,
    originals: Tensor | None = None,
    progress: Progress | None = None,
) -> Refined:
    """Descend on 1 - cosine from samples, each picture on its own, until the tolerance.

    Args:
        backbone: Whose features are matched.
        features: (N, C, H, W) wanted.
        start: (N, 3, H', W') in [0, 1], samples of those features.
        first_stage: Its latents are moved; None moves pixels, which please the backbone soonest and mean least.
        tolerance: Cosine to pass.
        steps: At most.
        learning_rate: Adam's. Every latent moves by about so much in a step: larger ones match sooner and leave grain.
        referee: A network that took no part; it compares with `originals`, the pictures the features came from.
        originals: (N, 3, H'', W'') in [0, 1].
        progress: Told after every step.

    Raises:
        UserError: If the numbers of maps and pictures differ, or the tolerance is no cosine.
    """
    if len(features) != len(start) or not -1 <= tolerance <= 1 or steps < 1:
        raise UserError(
            f"refining needs a picture for each map, a tolerance in [-1, 1] and steps >= 1, not {len(start)} for "
            f"{len(features)}, {tolerance} and {steps}."
        )
    device = backbone.mean.device
    features = features.to(device)
    search = _Search(backbone, features, start.to(device), first_stage, tolerance, learning_rate)
    for step in range(1, steps + 1):
        if search.done():
            break
        search.step(step)
        if progress is not None:
            progress(step, steps)
    search.finish()
    found = Refined(
        search.best.cpu(),
        feature_cosine(features, backbone(start.to(device)).detach()).cpu(),
        search.cosine.cpu(),
        tolerance,
        search.steps,
        search.skipped,
    )
    return found if referee is None or originals is None else _judged(found, referee, originals, start)


def _judged(found: Refined, referee: Backbone, originals: Tensor, start: Tensor) -> Refined:
    wanted = encode(referee, originals)
    values = vars(found) | {
        "referee_before": feature_cosine(wanted, encode(referee, start)),
        "referee_after": feature_cosine(wanted, encode(referee, found.images)),
    }
    return Refined(**values)


class _Search:
    """Adam on the free tensor; every row keeps its best picture and stands still once it has passed."""

    def __init__(
        self,
        backbone: Backbone,
        features: Tensor,
        start: Tensor,
        first_stage: FirstStage | None,
        tolerance: float,
        learning_rate: float,
    ):
        self.backbone, self.features, self.tolerance = backbone, features, tolerance
        self.free = parametrise("pixel" if first_stage is None else "latent", start, first_stage)
        self.optimizer = torch.optim.Adam([self.free.tensor], lr=learning_rate)
        self.best = start.clone()
        self.cosine = feature_cosine(features, encode(backbone, start).to(features))
        self.steps, self.skipped = (torch.zeros(len(start), dtype=torch.int64) for _ in range(2))
        self.number, self.moved = 0, torch.zeros_like(self.cosine, dtype=torch.bool)
        self.together = pictures_together(start.shape[2:].numel())

    def done(self) -> bool:
        """Whether nothing is left to move: what has no number cannot be."""
        return not bool((self.cosine < self.tolerance).any())

    def step(self, number: int) -> None:
        """Look where the last step has led, then take the next; what has passed is not looked at again."""
        self.free.tensor.grad = torch.zeros_like(self.free.tensor)
        for rows in self._parts(self.cosine < self.tolerance):
            with torch.enable_grad():
                images, match = self._look(rows)
                self.free.tensor.grad += torch.autograd.grad((1 - match).sum(), self.free.tensor)[0]
            self._remember(rows, images.detach(), match.detach())
        active = self.cosine < self.tolerance
        finite = self.free.tensor.grad.flatten(1).isfinite().all(1)
        self.skipped += (active & ~finite).cpu()
        self.number, self.moved = number, active & finite
        self._descend(self.moved)

    @torch.no_grad()
    def finish(self) -> None:
        """Look where the last step has led."""
        for rows in self._parts(self.moved):
            self._remember(rows, *self._look(rows))

    def _parts(self, mask: Tensor) -> Sequence[Tensor]:
        """The chosen rows, as many at a time as the memory for their gradient allows."""
        rows = mask.nonzero()[:, 0]
        return rows.split(self.together) if len(rows) else ()

    def _look(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The pictures of some rows, which every parametrisation keeps in [0, 1], and their cosines."""
        images = self.free.images(rows)
        return images, F.cosine_similarity(self.backbone(images).flatten(1), self.features[rows].flatten(1))

    @torch.no_grad()
    def _descend(self, rows: Tensor) -> None:
        """One step of the chosen rows; Adam's momentum must not move the others."""
        free, mask = self.free.tensor, rows.view(-1, *[1] * (self.free.tensor.ndim - 1))
        held = free.detach().clone()
        assert free.grad is not None
        free.grad = torch.where(mask, free.grad, 0.0)
        self.optimizer.step()
        self.free.project()
        free.copy_(torch.where(mask, free, held))

    @torch.no_grad()
    def _remember(self, rows: Tensor, images: Tensor, cosine: Tensor) -> None:
        better = self.moved[rows] & (cosine > self.cosine[rows])
        chosen = rows[better]
        self.best[chosen], self.cosine[chosen] = images[better].to(self.best), cosine[better].to(self.cosine)
        self.steps[chosen.cpu()] = self.number
