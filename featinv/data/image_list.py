"""The map-style data set under the folders and the indexed shards: a checked list of encoded pictures."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from torch.utils.data import Dataset

from featinv.data.reading import Thoroughness, UnreadableImage, check_image, read_image
from featinv.data.transforms import build_transform
from featinv.errors import UserError
from featinv.files import write_json

log = logging.getLogger(__name__)

Verify = Literal["none", "header", "full"]
_THREADS = 8
_LONGEST_ID = 150


class Entry(NamedTuple):
    """One encoded picture: its id, its label (-1 unknown), and where or what it is."""

    id: str
    label: int
    source: str | bytes


class ImageList(Dataset[dict[str, Any]]):
    """Items {"image", "label", "id"} from a list of encoded pictures.

    The list is checked once, here, so that its length and indices stay true; a picture that breaks only later
    raises.

    Args:
        entries: The pictures, in order.
        size: Side of the images in pixels.
        augment: False, True or the arguments of `TrainTransform`.
        verify: `"header"` finds empty, foreign and cut files; `"full"` decodes all; `"none"` trusts them.
        per_class: Keep only the first readable N of each label.
        where: What the entries came from, for messages.
        skipped: Pictures that were already found unreadable, as (id, reason).

    Attributes:
        skipped: (id, reason) of each unreadable picture.

    Raises:
        UserError: If there are no entries, or none can be read.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        size: int,
        *,
        augment: bool | Mapping[str, Any] = False,
        verify: Verify = "header",
        per_class: int | None = None,
        where: str = "the list",
        skipped: Iterable[tuple[str, str]] = (),
    ):
        if verify not in ("none", "header", "full"):
            raise UserError(f"verify must be none, header or full, not {verify!r}.")
        if per_class is not None and per_class < 1:
            raise UserError(f"per_class must be at least 1, not {per_class}.")
        self.transform = build_transform(size, augment)
        self.where, self.epoch = where, 0
        self.skipped: list[tuple[str, str]] = list(skipped)
        if not entries and not self.skipped:
            raise UserError(f"there are no images in {where}.")
        if per_class is None:
            self.entries = self._readable(entries, verify)
        else:
            self.entries = self._first_of_each_class(entries, verify, per_class)
        report_skipped(self.skipped, len(self.entries), where)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        name = entry.source if isinstance(entry.source, str) else f"{entry.id} in {self.where}"
        try:
            image = read_image(entry.source, name=name, min_side=self.transform.min_side)
        except UnreadableImage as error:
            raise UnreadableImage(name, f"{error.reason}; verify=full leaves such images out") from error
        image = self.transform(image, item_id=entry.id, epoch=self.epoch)
        return {"image": image, "label": entry.label, "id": entry.id}

    def set_epoch(self, epoch: int) -> None:
        """Choose which random crops and flips come next."""
        self.epoch = epoch

    def write_report(self, path: str | Path) -> None:
        """Write how many pictures are used, and which were skipped and why, as JSON."""
        write_skip_report(path, self.where, len(self), self.skipped)

    def _readable(self, entries: Sequence[Entry], verify: Verify) -> list[Entry]:
        if verify == "none":
            return list(entries)
        how = cast(Thoroughness, verify)
        with ThreadPoolExecutor(_THREADS) as pool:
            reasons = list(pool.map(lambda entry: check_image(entry.source, name=entry.id, how=how), entries))
        self.skipped += [(e.id, reason) for e, reason in zip(entries, reasons, strict=True) if reason is not None]
        return [e for e, reason in zip(entries, reasons, strict=True) if reason is None]

    def _first_of_each_class(self, entries: Sequence[Entry], verify: Verify, per_class: int) -> list[Entry]:
        waiting: dict[int, list[Entry]] = defaultdict(list)
        for entry in entries:
            waiting[entry.label].append(entry)
        kept: dict[int, list[Entry]] = {label: [] for label in sorted(waiting)}
        while waiting:
            # As many as are missing in each class; an unreadable one is replaced by the next of its class.
            batch: list[Entry] = []
            for label, rest in list(waiting.items()):
                missing = per_class - len(kept[label])
                batch += rest[:missing]
                waiting[label] = rest[missing:]
            for entry in self._readable(batch, verify):
                kept[entry.label].append(entry)
            waiting = {label: rest for label, rest in waiting.items() if rest and len(kept[label]) < per_class}
        short = [label for label, chosen in kept.items() if len(chosen) < per_class]
        if short:
            log.warning("%d classes in %s have fewer than %d readable images", len(short), self.where, per_class)
        return [entry for chosen in kept.values() for entry in chosen]


def report_skipped(skipped: Sequence[tuple[str, str]], used: int, where: str) -> None:
    """Log how many pictures were skipped.

    Raises:
        UserError: If none is left.
    """
    if not skipped:
        return
    item_id, reason = skipped[0]
    if not used:
        raise UserError(f"none of the {len(skipped)} images in {where} can be read; the first, {item_id}: {reason}.")
    log.warning("skipped %d of %d images in %s", len(skipped), len(skipped) + used, where)
    for item_id, reason in skipped[:5]:
        log.warning("skipped %s: %s", item_id, reason)


def write_skip_report(path: str | Path, where: str, used: int | None, skipped: Sequence[tuple[str, str]]) -> None:
    """Write {"source", "used", "n_skipped", "skipped": [{"id", "reason"}]} as JSON, atomically."""
    rows = [{"id": item_id, "reason": reason} for item_id, reason in skipped]
    write_json(path, {"source": where, "used": used, "n_skipped": len(rows), "skipped": rows})


def write_skipped(dataset: Any, path: str | Path) -> None:
    """Write what a data set has skipped, if anything: by its own `write_report`, if it has one, else by its list."""
    if not (skipped := getattr(dataset, "skipped", None)):
        return
    if hasattr(dataset, "write_report"):
        dataset.write_report(path)
    else:
        write_skip_report(path, type(dataset).__name__, len(dataset) if hasattr(dataset, "__len__") else None, skipped)


def stable_ids(names: Sequence[str]) -> list[str]:
    """Give each relative name a filename-safe id: without its suffix, folders joined by "__".

    Where that is not unique (a.jpg beside a.png), not clean or too long, a hash of the full name is added.
    Ids have no dots, so that a suffix can be added or replaced, and do not depend on the order.
    """
    stems = [re.sub(r"(\.tar)?\.[^./]+$", "", name) for name in names]
    slugs = [re.sub(r"[^A-Za-z0-9_-]", "_", stem.replace("/", "__")) for stem in stems]
    # Some file systems do not tell case apart.
    count = Counter(slug.lower() for slug in slugs)
    ids = []
    for name, stem, slug in zip(names, stems, slugs, strict=True):
        if count[slug.lower()] == 1 and slug == stem.replace("/", "__") and len(slug) <= _LONGEST_ID:
            ids.append(slug)
        else:
            ids.append(f"{slug[:_LONGEST_ID]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:10]}")
    return ids
