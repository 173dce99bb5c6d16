"""Run a LightningModule step by step with checkpoints that resume exactly and cannot run code."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.plugins.io import CheckpointIO
from torch.utils.data import DataLoader, Dataset, IterableDataset

from featinv.checkpoint import load_checkpoint, read_header, save_checkpoint
from featinv.config import nearest
from featinv.data.datamodule import collate, tell_epoch
from featinv.errors import UserError
from featinv.files import run_lock
from featinv.processes import is_first_process, settled_objects, torchrun_layout
from featinv.training.batches import StepBatches
from featinv.training.optimizers import configured_settings, restore_settings
from featinv.training.precision import lightning_precision
from featinv.training.sharding import ShardedStrategy

log = logging.getLogger(__name__)
_LAST, _PREVIOUS, _NEW = "last.safetensors", "previous.safetensors", "new.safetensors"


class SafetensorsCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as safetensors; the one before the last is kept, should the last be damaged."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write atomically; the others stay as they are until the new one is whole."""
        path = Path(path)
        fresh = path.with_name(_NEW)
        save_checkpoint(fresh, checkpoint)
        if path.is_file():
            path.replace(path.with_name(_PREVIOUS))
        fresh.replace(path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        """Read on the CPU; nothing is unpickled."""
        return load_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file that Lightning no longer needs."""
        Path(path).unlink(missing_ok=True)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, or None; a damaged one is passed over with a warning."""
    found = False
    for name in (_LAST, _PREVIOUS):
        path = Path(folder) / name
        if not path.is_file():
            continue
        found = True
        try:
            load_checkpoint(path)
            return path
        except UserError as error:
            log.warning("%s; trying the one before", error)
    if found:
        raise UserError(f"no whole checkpoint is left in {folder}; delete the folder to start again.")
    return None


class _Batches(pl.LightningDataModule):
    """The loader is made once Lightning knows how many processes there are."""

    def __init__(
        self, dataset: Dataset[dict[str, Any]], batch_size: int, stop: int, start: int, seed: int, workers: int
    ):
        super().__init__()
        self.dataset, self.batch_size, self.stop, self.start = dataset, batch_size, stop, start
        self.seed, self.workers = seed, workers

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.batch_size % world:
            raise UserError(f"batch_size {self.batch_size} cannot be shared by {world} processes; make it a multiple.")
        if isinstance(self.dataset, IterableDataset):
            stream = _Endless(self.dataset, self.start)
            return DataLoader(stream, self.batch_size // world, num_workers=self.workers, collate_fn=collate)
        batches = StepBatches(len(self.dataset), self.batch_size, self.stop, self.start, self.seed, rank, world)  # type: ignore[arg-type]
        return DataLoader(self.dataset, sampler=batches, batch_size=None, num_workers=self.workers)


class _Endless(IterableDataset[dict[str, Any]]):
    """A stream again and again, each time in another order.

    Processes differ in how many images their shards hold; nobody waits for another's end of an epoch here, but those
    with fewer see theirs again sooner.
    """

    def __init__(self, stream: IterableDataset[dict[str, Any]], first: int):
        self.stream, self.first = stream, first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in itertools.count(self.first):
            tell_epoch(self.stream, epoch)
            count = 0
            for count, item in enumerate(self.stream, 1):  # noqa: B007
                yield item
            if not count:
                raise UserError("a reader of the stream gets no images; make more shards or lower num_workers.")


class _ConfiguredSettings(Callback):
    """Go on with the configured rates and weight decay; Lightning restores the checkpoint's."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing is restored yet."""
        self.settings = [configured_settings(config.scheduler.optimizer) for config in trainer.lr_scheduler_configs]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is."""
        for config, settings in zip(trainer.lr_scheduler_configs, self.settings, strict=True):
            restore_settings(config.scheduler, settings)  # type: ignore[arg-type]


@contextlib.contextmanager
def hold_run(folder: str | Path) -> Iterator[None]:
    """Hold a run's folder for the processes of one run, which the first of them stands for.

    Raises:
        UserError: If another run holds it.
    """
    with run_lock(folder) if is_first_process() else contextlib.nullcontext():
        yield


def _strategy(name: str) -> Any:
    # Lightning's others write and read checkpoints of their own, some of them pickled.
    if name not in (known := ["auto", "ddp", "fsdp"]):
        raise UserError(f"no strategy {name!r}: {nearest(name, known)}")
    return ShardedStrategy() if name == "fsdp" else name


def fit(
    module: pl.LightningModule,
    dataset: Dataset[dict[str, Any]],
    folder: str | Path,
    *,
    max_steps: int,
    batch_size: int,
    seed: int = 0,
    checkpoint_every: int = 200,
    precision: str = "auto",
    accumulate: int = 1,
    callbacks: list[Callback] | None = None,
    progress: bool = True,
    num_workers: int = 0,
    devices: int | str = "auto",
    strategy: str = "auto",
    accelerator: str = "auto",
) -> None:
    """Train to `max_steps`, from the folder's last checkpoint if there is one, at the module's rates and weight decay.

    The order of the rows is a function of (seed, step): a resumed run goes through what an uninterrupted one would. (A
    streamed data set has no rows: resumed, it goes on with an epoch of its own.) The caller holds the folder
    (`hold_run`).

    Args:
        module: Its `training_step` takes a batch of `dataset`.
        dataset: Indexed with a list of rows, it returns a whole batch (see `batches`); or a stream of items.
        folder: Checkpoints and TensorBoard logs.
        max_steps: Optimizer steps of the whole run.
        batch_size: Rows of a batch, over all processes.
        seed: Of the order.
        checkpoint_every: Steps between checkpoints: what a killed run loses at most.
        precision: "auto", "bf16" or "fp32".
        accumulate: Batches for each optimizer step.
        callbacks: Further Lightning callbacks.
        progress: Show a progress bar.
        num_workers: Processes that read data.
        devices: As Lightning's Trainer has it; under torchrun, torchrun's number of processes counts instead.
        strategy: "auto", "ddp" or "fsdp" (`ShardedStrategy`).
        accelerator: As Lightning's Trainer has it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    machines, started = torchrun_layout()
    last = last_checkpoint(folder)
    start = read_header(last)["global_step"] if last is not None else 0
    if start >= max_steps:
        log.info("%s is trained to step %d already", folder, start)
    saver = ModelCheckpoint(
        dirpath=folder,
        filename="last",
        every_n_train_steps=checkpoint_every,
        save_top_k=1,
        save_last=False,
        enable_version_counter=False,  # else a continued run may write last-v1, where nobody looks for it
    )
    saver.FILE_EXTENSION = ".safetensors"
    saver._last_global_step_saved = start  # else saved again after the first of the `accumulate` batches
    trainer = pl.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        default_root_dir=folder,
        num_nodes=machines,
        devices=started or devices,
        strategy=_strategy(strategy),
        accelerator=accelerator,
        precision=lightning_precision(precision),  # type: ignore[arg-type]
        accumulate_grad_batches=accumulate,
        callbacks=[saver, _ConfiguredSettings(), *(callbacks or [])],
        plugins=[SafetensorsCheckpointIO()],
        logger=pl.loggers.TensorBoardLogger(folder, name="", version="tensorboard"),
        enable_progress_bar=progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=20,
    )
    batches = _Batches(dataset, batch_size, max_steps * accumulate, start * accumulate, seed, num_workers)
    with settled_objects():
        trainer.fit(module, batches, ckpt_path=last)
    if trainer.global_step > start:
        trainer.save_checkpoint(folder / _LAST)
