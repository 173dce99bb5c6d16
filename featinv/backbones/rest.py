"""The second half of a network by itself: what follows one of its modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from featinv.image import seeded_noise


class RestOfNetwork:
    """From the output of one module to the last map, by the network's own `forward_features`.

    A network is not always a sequence that could be cut. So it runs as it is, on a blank picture, but the module gives
    what it is told to, and whatever ran before it gives what it gave the first time instead of running again: half of
    the network and more, at each of the hundred gradients that one lifted map takes.

    Args:
        model: A timm model.
        module: One of its modules.
        blank: A picture (1, 3, H, W), on the model's device.

    Attributes:
        output: What the module makes of the blank picture; None if `forward_features` does not run it.
        determined: Whether the module's output is one tensor on which all that follows depends, and on nothing else:
            within a residual block the shortcut would be the blank picture's.
        device: Of the blank picture.
    """

    def __init__(self, model: Any, module: nn.Module, blank: Tensor):
        self.model, self.module, self.blank, self.device = model, module, blank, blank.device
        self.output: Any = None
        self._before: list[tuple[nn.Module, Any]] = []
        runs: Counter[nn.Module] = Counter()

        def keep(ran: nn.Module, _inputs: Any, output: Any) -> None:
            runs[ran] += 1
            if ran is module:
                self.output = output
            elif self.output is None:
                self._before.append((ran, output))

        handles = [part.register_forward_hook(keep) for part in (*_beside(model, module), module)]
        try:
            with torch.no_grad():
                model.forward_features(blank)
        finally:
            for handle in handles:
                handle.remove()
        # One that runs again later may be needed there.
        self._before = [(part, output) for part, output in self._before if runs[part] == 1]
        self.determined = isinstance(self.output, Tensor) and self._agrees()

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether the whole network and the rest of it find the same, of noise."""
        noise = seeded_noise([0], self.blank.shape[1:]).to(self.blank)
        output = hooked_output(self.model, self.module, noise)
        wanted = self.model.forward_features(noise)
        # The same operations on as many pictures: what is determined is equal to the last bit, or nearly.
        if output is None or not isinstance(wanted, Tensor):
            return False
        if wanted.is_meta:  # a dry run: shapes alone
            return True
        return bool((self(output) - wanted).norm() <= 1e-5 * wanted.norm())

    def __call__(self, output: Tensor) -> Tensor:
        """An output of the module, of N pictures -> what `forward_features` returns of them."""
        # A copy: what follows may work in place.
        with _giving([*self._before, (self.module, output.clone())]):
            return self.model.forward_features(self.blank)


def hooked_output(model: Any, module: nn.Module, x: Tensor) -> Tensor | None:
    """What a module gives within `forward_features`; None if it does not run there, or gives no tensor."""
    kept: list[Any] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        # A copy: what follows may work in place.
        kept.append(output.clone() if isinstance(output, Tensor) else output)

    handle = module.register_forward_hook(keep)
    try:
        model.forward_features(x)
    finally:
        handle.remove()
    return kept[-1] if kept and isinstance(kept[-1], Tensor) else None


def _beside(model: nn.Module, module: nn.Module) -> Iterator[nn.Module]:
    """The largest modules that do not hold the given one."""
    for child in model.children():
        if child is module:
            continue
        if any(part is module for part in child.modules()):
            yield from _beside(child, module)
        else:
            yield child


@contextmanager
def _giving(outputs: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Modules that return what is given, whatever they are called with."""
    try:
        for part, output in outputs:
            part.forward = _always(output)  # on the object, before its class's
        yield
    finally:
        for part, _ in outputs:
            part.__dict__.pop("forward", None)


def _always(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: output
