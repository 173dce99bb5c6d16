"""Weights, gradients, moments and averages split among processes (FSDP: Zhao et al. 2023, arXiv 2304.11277)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from featinv.errors import UserError

CALLS = ("training_losses", "estimate_losses", "draw", "posterior_mean")
"""What is asked of a sharded inverter; its weights come together for the length of each of these."""


class ShardedStrategy(ModelParallelStrategy):
    """`strategy=fsdp`: torch's `fully_shard` on every kind of device, Lightning's own FSDP being for GPUs alone.

    A checkpoint is the one file that every other strategy writes, and is read by any of them. The module writes and
    reads its own weights (`on_save_checkpoint`, `on_load_checkpoint`).
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the optimizer its state as for unsharded weights; `optimizers.match_layout` splits it."""
        return True

    def setup_environment(self) -> None:
        """Split over all processes of all machines."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: see the class."""
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The whole state, in the first process."""
        return gathered(optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read by the trainer's own reader, which cannot run code."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """As for unsharded weights."""
        super(ModelParallelStrategy, self).load_optimizer_state_dict(checkpoint)


def shard(inverter: Any, mesh: DeviceMesh) -> None:
    """Split a diffusion inverter's weights, in place; its parameters are new objects afterwards.

    Each block of the prior's UNet and of the branch comes together when it is its turn; the small rest stays together
    for the length of a call. The first stage stays whole in every process: it is used outside such calls too.

    Args:
        inverter: A `DiffusionInverter`.
        mesh: One-dimensional.

    Raises:
        UserError: If it is another kind of inverter.
    """
    if not all(hasattr(inverter, name) for name in ("prior", "branch", *CALLS)):
        raise UserError(
            f"strategy=fsdp splits diffusion inverters, not a {type(inverter).__name__}; take strategy=ddp."
        )
    inverter.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # shards know no channels_last
    for network in (inverter.prior.unet, inverter.branch):
        for name in ("down_blocks", "mid_block", "up_blocks"):
            blocks = getattr(network, name, None)
            for block in blocks if isinstance(blocks, nn.ModuleList) else filter(None, [blocks]):
                fully_shard(block, mesh=mesh)
    whole = set(inverter.prior.first_stage.parameters())
    # Resharded after every call: else the next one would miss a change of weights, such as their average's.
    fully_shard(inverter, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for name in CALLS:
        register_fsdp_forward_method(inverter, name)


def gathered(tree: Any) -> Any:
    """A nested structure with whole tensors in place of split ones; every process must call it.

    The first process gets them, on the CPU; the others get empty ones, since only the first writes checkpoints.
    """
    if isinstance(tree, DTensor):
        whole = tree.full_tensor().detach()
        return whole.cpu() if dist.get_rank() == 0 else torch.empty(0)
    if isinstance(tree, Mapping):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value) for value in tree)
    return tree


def placed_as(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor split as `like` is; as it is where `like` is whole or `value` is split already."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    # Every process has read the same values, so none needs to be sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
