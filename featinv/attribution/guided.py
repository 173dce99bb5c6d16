"""Guided backpropagation, and stand-ins for a network's rectifiers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import GuidedBackprop
from torch import Tensor, nn

from featinv.attribution.scores import Logits, prepare
from featinv.backbones.base import Backbone
from featinv.errors import UserError


class _Copy(nn.Module):
    """Gives its successor a tensor of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class _Rectifier(nn.ReLU):
    """A ReLU or ReLU6 in the one form that Captum hooks; never in place; counts its calls."""

    def __init__(self, six: bool):
        super().__init__(inplace=False)
        self.six, self.calls = six, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu6(x) if self.six else F.relu(x)


@contextmanager
def replaced_rectifiers(model: nn.Module, make: Callable[[bool], Any] = _Rectifier) -> Iterator[list[Any]]:
    """Within the context every nn.ReLU and nn.ReLU6 of the model is a stand-in, by default one that Captum can hook.

    The model's own modules are set aside untouched and put back at the end, also after an exception.

    Args:
        model: Any module.
        make: Makes a stand-in, told whether it stands for a ReLU6.

    Yields:
        The stand-ins.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()  # named_children leaves out a module's second name
        if isinstance(child, nn.ReLU | nn.ReLU6)
    ]
    stand_ins = {child: make(isinstance(child, nn.ReLU6)) for _, _, child in places}
    try:
        for parent, name, child in places:
            # Captum rectifies the whole gradient of a ReLU's input; where others read that tensor too, as in
            # pre-activation networks, it would rectify theirs as well without the copy.
            setattr(parent, name, nn.Sequential(_Copy(), stand_ins[child]))
        yield list(stand_ins.values())
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


def _graph_names(output: Tensor) -> list[str]:
    """Names of all nodes behind a tensor in the autograd graph."""
    seen: set[Any] = set()
    open_nodes: list[Any] = [output.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            open_nodes += [following for following, _ in node.next_functions]
    return [node.name() for node in seen]


def _check_rectifiers(logits: Logits, image: Tensor, stand_ins: list[_Rectifier]) -> None:
    name = getattr(logits.backbone, "name", type(logits.backbone).__name__)
    advice = "use gradient, smooth_grad, integrated_gradients or grad_cam instead."
    if not stand_ins:
        raise UserError(f"guided backpropagation needs ReLU layers, and {name} has none; {advice}")
    with torch.enable_grad():
        names = _graph_names(logits(image))
    called = sum(stand_in.calls for stand_in in stand_ins if not stand_in.six)
    if sum(name.startswith("ReluBackward") for name in names) > called:
        raise UserError(f"{name} calls ReLU as a function, out of guided backpropagation's reach; {advice}")


def guided_backprop(backbone: Backbone, images: Tensor, target: Tensor | Sequence[int] | None = None) -> Tensor:
    """Guided backpropagation (Springenberg et al. 2015, arXiv 1412.6806), signed.

    Negative gradients stop at every ReLU and ReLU6; other activations (GELU, SiLU, the gates of squeeze-excitation)
    keep their derivative. Known to depend little on the weights (Adebayo et al. 2018, arXiv 1810.03292).

    Args:
        backbone: A backbone with a classifier and ReLU layers.
        images: (N, 3, H, W) in [0, 1].
        target: Class indices (N,); None takes the predicted classes.

    Returns:
        (N, 3, H, W), score per unit of pixel value.

    Raises:
        UserError: As `gradient`, or if the network has no ReLU layer or calls ReLU as a function.
    """
    images, target = prepare(backbone, images, target)
    logits = Logits(backbone)
    with replaced_rectifiers(backbone) as stand_ins, warnings.catch_warnings():
        _check_rectifiers(logits, images[:1], stand_ins)
        warnings.filterwarnings("ignore", message="Setting backward hooks")
        return GuidedBackprop(logits).attribute(images, target).detach()
