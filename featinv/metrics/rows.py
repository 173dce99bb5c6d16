"""One pass over the originals for all rows of a table: memory does not grow with the pictures, processes share them.

Every batch leaves one file of numbers (values, embeddings, probe's predictions); the rows are then read one at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from featinv.errors import UserError
from featinv.files import save_safetensors
from featinv.metrics.collection import METRICS, embed, possible_metrics, seen_classes
from featinv.metrics.factors import FactorProbe
from featinv.metrics.features import feature_cosine
from featinv.metrics.images import embedding_diversity, pixel_diversity
from featinv.metrics.views import Embedder, ImagePairs, Network, Perceptual, View
from featinv.processes import first_does, own_share, process_rank, wait_for_all

Pictures = Callable[[list[int]], Tensor]
_SEPARATOR = "\n"  # no row's name has one
ORIGINALS = "originals\n"


@dataclass(frozen=True)
class Row:
    """The pictures of one row.

    Attributes:
        pictures: Positions of originals -> their pictures (B, 3, H, W) in [0, 1].
        indices: Positions that the row has.
        samples: Positions -> (B, K, 3, H, W), if there are several samples of each.
        own: The network whose features were inverted, where that is not the judges' backbone.
        also: Networks in which the row's cosine is wanted as well: the other rows' own ones, for a floor or a ceiling.
    """

    pictures: Pictures
    indices: Container[int]
    samples: Pictures | None = None
    own: Network | None = None
    also: Sequence[Network] = ()


@dataclass(frozen=True)
class Judges:
    """What looks at the pictures.

    Attributes:
        backbone: The inverted network.
        referee: A network that no inverter saw; its pooled features are embeddings named `referee_name`.
        referee_name: Its name in metric names.
        embedders: More embedding networks by name, such as "inception".
        perceptual: LPIPS.
        probe: Reads factors from `probe_input` of the referee's features (the backbone's, if there is no referee).
        feature_probe: Reads factors from `probe_input` of the backbone's features of originals.
        labels: Class indices (N,) of the networks' classes; -1 where unknown.
        device: Where the networks are.
    """

    backbone: Network
    referee: Network | None = None
    referee_name: str = "mobilenetv2"
    embedders: Mapping[str, Embedder] = field(default_factory=dict)
    perceptual: Perceptual | None = None
    probe: FactorProbe | None = None
    feature_probe: FactorProbe | None = None
    labels: Tensor | None = None
    device: torch.device | str = "cpu"


def probe_input(features: Tensor) -> Tensor:
    """Maps (N, C, H, W) averaged to 2 x 2 and flattened: enough to read positions from, (N, 4 C)."""
    return F.adaptive_avg_pool2d(features, 2).flatten(1).cpu()


class RowEvaluation:
    """What `evaluate_rows` wrote, read row by row.

    Args:
        folder: Its files.
    """

    def __init__(self, folder: Path):
        self._files = sorted(folder.glob("*.safetensors"))

    def _read(self, prefix: str) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for path in self._files:
            with safe_open(str(path), framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    if key.startswith(prefix):
                        found.setdefault(key.removeprefix(prefix), []).append(file.get_tensor(key))
        return {name: torch.cat(parts) for name, parts in found.items()}

    def values(self, row: str) -> dict[str, Tensor]:
        """Metric -> (n,) values, in the order of `indices`; none if there is no such row."""
        return self._read(_key(row, "value", ""))

    def indices(self, row: str) -> Tensor:
        """Positions of the row's originals, (n,)."""
        return self._read(_key(row, "indices", ""))[""]

    def also(self, row: str) -> list[Tensor]:
        """Cosines (n,) in each network of `Row.also`."""
        found = self._read(_key(row, "also", ""))
        return [found[str(k)] for k in range(len(found))]

    def embeddings(self, row: str = ORIGINALS) -> dict[str, Tensor]:
        """Network -> (n, D); by default those of the originals."""
        return self._read(_key(row, "embedding", ""))

    def predicted(self, row: str = ORIGINALS) -> dict[str, Tensor]:
        """Probe -> predicted factors (n, F)."""
        return self._read(_key(row, "predicted", ""))


def _key(row: str, kind: str, name: str) -> str:
    return _SEPARATOR.join((row, kind, name))


@torch.no_grad()
def evaluate_rows(
    originals: Pictures,
    count: int,
    rows: Mapping[str, Row],
    judges: Judges,
    folder: str | Path,
    batch_size: int = 32,
) -> RowEvaluation:
    """Evaluate every row against the originals; each network sees each original once, whatever the number of rows.

    Under torchrun the processes share the batches; each makes the numbers that one process would.

    Args:
        originals: Positions -> originals (B, 3, H, W) in [0, 1].
        count: Their number.
        rows: By name.
        judges: What looks at them.
        folder: For the numbers; emptied first.
        batch_size: Originals at a time.

    Raises:
        UserError: If there are no images, or a row's pictures do not fit.
    """
    folder = Path(folder)
    if count < 1:
        raise UserError("There are no images to evaluate; check the folder or the filter that chose them.")
    first_does(lambda: shutil.rmtree(folder, ignore_errors=True))
    starts = own_share(range(0, count, batch_size))
    for start in tqdm(starts, desc="evaluating", unit="batch", disable=process_rank()[0] > 0 or len(starts) < 4):
        batch = list(range(start, min(start + batch_size, count)))
        save_safetensors(folder / f"{start:09d}.safetensors", _evaluate_batch(originals, batch, rows, judges))
    wait_for_all()
    return RowEvaluation(folder)


def _evaluate_batch(
    originals: Pictures, batch: list[int], rows: Mapping[str, Row], judges: Judges
) -> dict[str, Tensor]:
    images = originals(batch).to(judges.device)
    backbone = View(judges.backbone, images)
    referee = View(judges.referee, images) if judges.referee is not None else None
    networks = [network for row in rows.values() for network in (row.own, *row.also) if network is not None]
    own = {id(network): View(network, images) for network in networks}
    found = _looks(ORIGINALS, images, backbone, referee, judges)
    if judges.feature_probe is not None:
        features = probe_input(backbone.features)
        found[_key(ORIGINALS, "predicted", "features")] = judges.feature_probe.predict(features)
    for name, row in rows.items():
        kept = [position for position, index in enumerate(batch) if index in row.indices]
        if not kept:
            continue
        indices = [batch[position] for position in kept]
        views = [view.take(kept) if view is not None else None for view in (backbone, referee, own.get(id(row.own)))]
        also = [own[id(network)].take(kept) for network in row.also]
        found |= _evaluate_row(name, row, indices, views, also, judges)
    return found


def _evaluate_row(
    name: str, row: Row, indices: list[int], originals: Sequence[View | None], also: Sequence[View], judges: Judges
) -> dict[str, Tensor]:
    pictures = row.pictures(indices).to(judges.device)
    backbone, referee, own = [None if view is None else view.against(pictures) for view in originals]
    assert backbone is not None
    labels = None if judges.labels is None else judges.labels[indices]
    pairs = ImagePairs(
        backbone.original.images, pictures, backbone, referee, labels, own=own, perceptual=judges.perceptual
    )
    names = possible_metrics(
        referee=referee is not None,
        labels=labels is not None,
        own=own is not None,
        perceptual=judges.perceptual is not None,
        classes=seen_classes(backbone.original),
        referee_classes=0 if referee is None else seen_classes(referee.original),
    )
    found = {_key(name, "indices", ""): torch.tensor(indices)}
    found |= {_key(name, "value", metric): METRICS[metric](pairs).cpu() for metric in names}
    for k, view in enumerate(also):
        found[_key(name, "also", str(k))] = feature_cosine(*view.against(pictures).features).cpu()
    if row.samples is not None:
        spread = sample_diversity(row.samples(indices), judges)
        found |= {_key(name, "value", metric): values for metric, values in spread.items()}
    seen = None if referee is None else referee.reconstruction
    return found | _looks(name, pictures, backbone.reconstruction, seen, judges)


def _looks(row: str, images: Tensor, backbone: View, referee: View | None, judges: Judges) -> dict[str, Tensor]:
    """Embeddings, and what the probe reads."""
    embeddings = embed(images, referee, judges.referee_name, judges.embedders)
    found = {_key(row, "embedding", name): rows for name, rows in embeddings.items()}
    if judges.probe is not None:
        look = probe_input((referee or backbone).features)
        # A broken picture is counted as not recovered: NaN is no class and no number.
        found[_key(row, "predicted", "pictures")] = judges.probe.predict(look)
    return found


def sample_diversity(samples: Tensor, judges: Judges) -> dict[str, Tensor]:
    """How much samples (B, K, 3, H, W) of the same features differ: in pixels, and in every embedding.

    Returns:
        "pixel_diversity" and "diversity_NETWORK" -> (B,); 0 where all samples are equal.
    """
    count, each = samples.shape[:2]
    images = samples.flatten(0, 1).to(judges.device)
    referee = View(judges.referee, images) if judges.referee is not None else None
    embeddings = embed(images, referee, judges.referee_name, judges.embedders)
    spread = {
        f"diversity_{name}": embedding_diversity(rows.unflatten(0, (count, each))) for name, rows in embeddings.items()
    }
    return {"pixel_diversity": pixel_diversity(samples), **spread}
