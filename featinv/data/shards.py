"""WebDataset shards: tar files of (picture, .cls) pairs, streamed for training or indexed for evaluation."""

from __future__ import annotations

import glob
import itertools
import json
import os
import random
import tarfile
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys

from featinv.data.folders import ilsvrc_synsets, read_class_index
from featinv.data.image_list import Entry, ImageList, Verify, stable_ids, write_skip_report
from featinv.data.reading import IMAGE_SUFFIXES, UnreadableImage, read_image
from featinv.data.transforms import build_transform
from featinv.errors import UserError
from featinv.processes import process_rank

OnSkip = Callable[[str, str], None]


class Shard(NamedTuple):
    """A tar file and the prefix of its samples' ids."""

    url: str
    name: str


class WebDatasetShards(IterableDataset[dict[str, Any]]):
    """Stream items {"image", "label", "id"} from shards, each sample to one worker of one process.

    With at least as many shards as workers (over all processes) each worker reads its own shards; with fewer,
    each reads all and takes its share of the samples, so that none goes without. The crops depend on (seed,
    epoch, id) only; the order depends on the number of workers too.

    Args:
        urls: Path or URL, or a list; braces {000..003} and `*` are expanded.
        size: Side of the images in pixels.
        augment: False, True or the arguments of `TrainTransform`.
        shuffle: Number of samples in the shuffle buffer (shards are shuffled too); 0 keeps the order.
        seed: Of the shuffling.
        wnids: File that names the synset of each label in the shards (see `read_class_index`); with it,
            labels become ILSVRC class indices.

    Raises:
        UserError: If a shard is missing or no sample in any of them can be read.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        size: int = 256,
        *,
        augment: bool | Mapping[str, Any] = False,
        shuffle: int = 0,
        seed: int = 0,
        wnids: str | os.PathLike[str] | None = None,
    ):
        if shuffle < 0:
            raise UserError(f"shuffle is the size of a buffer, at least 0, not {shuffle}.")
        self.shards, self.to_label = expand_shards(urls), _label_map(wnids)
        self.transform = build_transform(size, augment)
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self._skips = _SkipLog()
        if next(self._decoded(iter_shards(self.shards, self.to_label, self._skips.add)), None) is None:
            raise UserError(f"no image in {urls} can be read; {_first(self.skipped)}.")

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(id, reason) of each unreadable sample met so far, in any worker of this process."""
        return self._skips.read()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        slot, slots = _slot()
        shards = list(self.shards)
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(shards)
        if len(shards) >= slots:
            entries = iter_shards(shards[slot::slots], self.to_label, self._skips.add)
        else:
            add = self._skips.add if slot == 0 else _ignore  # all read the same broken samples
            entries = itertools.islice(iter_shards(shards, self.to_label, add), slot, None, slots)
        if self.shuffle:
            rng = random.Random(f"{self.seed}/{self.epoch}/{slot}")
            entries = wds.shuffle(self.shuffle, initial=self.shuffle, rng=rng)(entries)
        return self._decoded(entries)

    def set_epoch(self, epoch: int) -> None:
        """Choose which order, crops and flips come next."""
        self.epoch = epoch

    def write_report(self, path: str | Path) -> None:
        """Write which samples were skipped so far and why, as JSON."""
        write_skip_report(path, ", ".join(shard.url for shard in self.shards), None, self.skipped)

    def _decoded(self, entries: Iterator[Entry]) -> Iterator[dict[str, Any]]:
        for entry in entries:
            try:
                image = read_image(entry.source, name=entry.id, min_side=self.transform.min_side)
            except UnreadableImage as error:
                self._skips.add(entry.id, error.reason)
                continue
            image = self.transform(image, item_id=entry.id, epoch=self.epoch)
            yield {"image": image, "label": entry.label, "id": entry.id}


class IndexedShards(ImageList):
    """Shards as a map-style data set: the encoded pictures lie in memory, for a length and any order.

    Args:
        urls: Path or URL, or a list; braces {000..003} and `*` are expanded.
        size: Side of the images in pixels.
        augment: False, True or the arguments of `TrainTransform`.
        verify: `none`, `header` or `full`; see `ImageList`.
        per_class: Keep only the first N readable samples of each label.
        wnids: As for `WebDatasetShards`.

    Raises:
        UserError: If a shard is missing or no sample can be read.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        size: int = 256,
        *,
        augment: bool | Mapping[str, Any] = False,
        verify: Verify = "header",
        per_class: int | None = None,
        wnids: str | os.PathLike[str] | None = None,
    ):
        shards, skipped = expand_shards(urls), list[tuple[str, str]]()
        entries = list(
            iter_shards(shards, _label_map(wnids), lambda item_id, reason: skipped.append((item_id, reason)))
        )
        where = shards[0].url if len(shards) == 1 else f"{len(shards)} shards ({shards[0].url}, ...)"
        super().__init__(
            entries, size, augment=augment, verify=verify, per_class=per_class, where=where, skipped=skipped
        )


def expand_shards(urls: str | Sequence[str]) -> list[Shard]:
    """Expand braces and `*` into shards with unique names.

    Raises:
        UserError: If a local file is missing, or there are none, or one is a command ("pipe:", which a checkpoint's
            configuration may name as well as you) and FEATINV_PIPES is not 1.
    """
    found: list[str] = []
    for pattern in [urls] if isinstance(urls, str | os.PathLike) else urls:
        for url in wds.shardlists.expand_urls(os.path.expanduser(pattern)):
            remote = ":" in url.split("/", 1)[0]
            if url.lower().startswith("pipe:") and os.environ.get("FEATINV_PIPES") != "1":
                raise UserError(f"{url} runs a shell command; set FEATINV_PIPES=1 if you know who wrote it.")
            matches = [url] if remote or Path(url).is_file() else sorted(glob.glob(url))
            if not matches:
                raise UserError(f"there is no shard {url}; give the path of a .tar or .tar.gz file.")
            found += matches
    if not found:
        raise UserError("the list of shards is empty.")
    if len(set(found)) != len(found):
        raise UserError("a shard is listed twice; its images would count double.")
    for depth in itertools.count(1):  # folders go into the name only where file names repeat
        tails = ["/".join(url.split("/")[-depth:]) for url in found]
        if len(set(tails)) == len(found):
            break
    return [Shard(url, name) for url, name in zip(found, stable_ids(tails), strict=True)]


def iter_shards(shards: Sequence[Shard], to_label: Mapping[int, int] | None, on_skip: OnSkip) -> Iterator[Entry]:
    """Read samples in order, still encoded; what is broken goes to `on_skip(id, reason)`."""
    for shard in shards:
        seen: set[str] = set()
        count = itertools.count()

        def on_error(error: Exception, shard: Shard = shard) -> bool:
            on_skip(f"{shard.name}#{error}", f"in the shard {shard.url}: {error}")
            return True

        for sample in group_by_keys(_tar_files(shard, on_skip), handler=on_error):
            item_id = f"{shard.name}__{stable_ids([sample['__key__']])[0]}"
            if item_id in seen:
                on_skip(f"{item_id}#{next(count)}", "an earlier sample of the shard has the same name")
                continue
            seen.add(item_id)
            try:
                picture = _picture(sample)
                yield Entry(item_id, _label(sample, picture, to_label), sample[picture])
            except UserError as error:
                on_skip(item_id, str(error))


def _tar_files(shard: Shard, on_skip: OnSkip) -> Iterator[dict[str, Any]]:
    try:
        with (
            wds.gopen(shard.url) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as tar,
        ):
            for member in tar:
                if member.isreg() and not member.name.startswith("__"):
                    content = tar.extractfile(member)
                    assert content is not None  # regular files have content
                    yield {"fname": member.name, "data": content.read(), "__url__": shard.url}
                tar.members = []  # type: ignore[attr-defined]  # else all headers of a long stream stay in memory
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        on_skip(shard.name, f"the rest of the shard {shard.url} cannot be read: {error}")


class _StrictTarInfo(tarfile.TarInfo):
    """Headers that raise where `tarfile` takes a cut or damaged archive for its end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"it is cut or damaged ({error})") from error


def _picture(sample: Mapping[str, Any]) -> str:
    """Return the key of the sample's picture, which is what follows the first dot of its name."""
    for suffix in IMAGE_SUFFIXES:
        if suffix[1:] in sample:  # 000.png is meant where 000.mask.png lies beside it
            return suffix[1:]
    keys = [key for key in sample if key.endswith(IMAGE_SUFFIXES) and not key.startswith("__")]
    if not keys:
        raise UserError("the sample holds no picture")
    if len(keys) > 1:  # frame.0000.jpg, frame.0001.jpg are one sample to webdataset
        raise UserError(
            f"several pictures share the name before the first dot; they end in .{keys[0]}, .{keys[1]} "
            f"({len(keys)} in all); name them without other dots than the suffix's"
        )
    return keys[0]


def _label(sample: Mapping[str, Any], picture: str, to_label: Mapping[int, int] | None) -> int:
    own = "".join(picture.rpartition(".")[:2]) + "cls"  # of 000.rgb.png, 000.rgb.cls goes before 000.cls
    text = sample.get(own, sample.get("cls"))
    if text is None:
        return -1
    try:
        label = int(text)
        return label if to_label is None else to_label[label]
    except (ValueError, KeyError) as error:
        raise UserError(f"its label {text[:20]!r} is not a class index") from error


def _label_map(wnids: str | os.PathLike[str] | None) -> dict[int, int] | None:
    if wnids is None:
        return None
    index = {name: number for number, name in enumerate(ilsvrc_synsets())}
    names = read_class_index(wnids)
    if unknown := [name for name in names if name not in index]:
        raise UserError(f"{os.fspath(wnids)} names {unknown[0]!r}, which is not a class of ILSVRC-2012.")
    return {number: index[name] for number, name in enumerate(names)}


def _slot() -> tuple[int, int]:
    """Return the number of this worker among all workers of all processes, and how many there are."""
    rank, world = process_rank()
    worker = get_worker_info()
    number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
    return rank * workers + number, world * workers


def _ignore(item_id: str, reason: str) -> None:
    """Take a skip that another worker records."""


def _first(skipped: Sequence[tuple[str, str]]) -> str:
    return f"the first, {skipped[0][0]}: {skipped[0][1]}" if skipped else "they hold no samples"


class _SkipLog:
    """Skips of all workers, as lines of a temporary file, since workers share no memory with their parent."""

    def __init__(self) -> None:
        handle, self.path = tempfile.mkstemp(prefix="featinv-skipped-", suffix=".jsonl")
        os.close(handle)
        weakref.finalize(self, _remove_as, self.path, os.getpid())

    def add(self, item_id: str, reason: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps([item_id, reason]) + "\n")

    def read(self) -> list[tuple[str, str]]:
        with open(self.path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return sorted({item_id: reason for item_id, reason in rows}.items())


def _remove_as(path: str, owner: int) -> None:
    # Forked workers inherit the finalizer but not the file.
    if os.getpid() == owner:
        Path(path).unlink(missing_ok=True)
