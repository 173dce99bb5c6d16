"""The second half of a network by itself: what follows one of its modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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

    def __call__(self, output: Tensor) -> Tensor:
        """An output of the module, of N pictures -> what `forward_features` returns of them."""
        with _giving([*self._before, (self.module, output)]):
            return self.model.forward_features(self.blank)


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
