"""Images in folders: ImageNet's layout (a folder for each class) and any other."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from featinv.data.image_list import Entry, ImageList, Verify, stable_ids
from featinv.data.reading import IMAGE_SUFFIXES, UnreadableImage, check_image
from featinv.errors import UserError

CLASS_INDEX_FILES = ("LOC_synset_mapping.txt", "imagenet_class_index.json", "wnids.json", "wnids.txt")
_SPLITS = {"train", "val", "valid", "validation", "test"}


class ImageNetFolder(ImageList):
    """Images at root/split/CLASS/**/FILE, the layout of ILSVRC; labels follow the class index.

    Args:
        root: Folder of the data set.
        split: Subfolder that holds the class folders, such as `train` or `val`; None if they lie in `root`.
        size: Side of the images in pixels.
        augment: False, True or the arguments of `TrainTransform`.
        verify: `none`, `header` or `full`; see `ImageList`.
        per_class: Keep only the first N readable files of each class, in the order of their names.
        class_index: File that orders the classes: a line for each (its first word counts), a JSON list, or a
            JSON dict as {"0": ["n01440764", "tench"], ...}. By default one of `CLASS_INDEX_FILES` in the
            split's folder or the root; without one, ILSVRC's 1000 classes if all folders are among them (a
            part of ImageNet keeps its labels), else the sorted folder names.

    Attributes:
        classes: Folder name of each label.

    Raises:
        UserError: If a folder is missing, empty or not in the class index, or no image can be read.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str | None = None,
        size: int = 256,
        *,
        augment: bool | Mapping[str, Any] = False,
        verify: Verify = "header",
        per_class: int | None = None,
        class_index: str | os.PathLike[str] | None = None,
    ):
        root = Path(root).expanduser()
        folder = _existing_folder(root / split if split else root)
        files = {path.name: list_images(path) for path in _subfolders(folder)}
        folders = sorted(name for name, found in files.items() if found)
        if not folders:
            raise UserError(
                f"{folder} has no class folders with images (expected {folder}/CLASS/FILE.JPEG); "
                "for images that lie flat use FlatFolder."
            )
        if not split and set(folders) <= _SPLITS:
            raise UserError(f"{folder} holds splits, not classes; set split to one of {', '.join(folders)}.")
        self.classes = _class_order(folders, class_index, (folder, root))
        label = {name: number for number, name in enumerate(self.classes)}
        if unknown := [name for name in folders if name not in label]:
            raise UserError(f"the folder {folder / unknown[0]} is not in the class index; rename or remove it.")
        # By label, not by name: an index may order the classes otherwise.
        ordered = sorted(folders, key=label.__getitem__)
        names = [f"{name}/{file}" for name in ordered for file in files[name]]
        ids = stable_ids(names)
        entries = [
            Entry(item_id, label[name.split("/", 1)[0]], str(folder / name))
            for item_id, name in zip(ids, names, strict=True)
        ]
        super().__init__(entries, size, augment=augment, verify=verify, per_class=per_class, where=str(folder))


class FlatFolder(ImageList):
    """All images of a folder, in the order of their names, with label -1.

    Args:
        root: Folder.
        size: Side of the images in pixels.
        recursive: Look into subfolders too.
        augment: False, True or the arguments of `TrainTransform`.
        verify: `none`, `header` or `full`; see `ImageList`.

    Raises:
        UserError: If the folder is missing or empty, or no image can be read.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int = 256,
        recursive: bool = True,
        *,
        augment: bool | Mapping[str, Any] = False,
        verify: Verify = "header",
    ):
        folder = _existing_folder(Path(root))
        names = list_images(folder, recursive)
        entries = [
            Entry(item_id, -1, str(folder / name)) for item_id, name in zip(stable_ids(names), names, strict=True)
        ]
        super().__init__(entries, size, augment=augment, verify=verify, where=str(folder))


def pictures(path: str | os.PathLike[str], size: int) -> ImageList:
    """One picture, or all pictures of a folder, cropped to `size`; unreadable ones of a folder are left out.

    Raises:
        UserError: If there is no such file or folder, or nothing in it can be read.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{path} is a {type(path).__name__}, not a path; a folder of that name is ./{path}.")
    path = Path(path).expanduser()  # the shell leaves the ~ in image=~/my.jpg alone
    if path.is_dir():
        return FlatFolder(path, size)
    if not path.is_file():
        raise UserError(f"there is no picture or folder {path}.")
    if (reason := check_image(path, how="full")) is not None:
        raise UnreadableImage(str(path), reason)
    (name,) = stable_ids([path.name])
    return ImageList([Entry(name, -1, str(path))], size, verify="none", where=str(path))


def list_images(folder: Path, recursive: bool = True) -> list[str]:
    """List image files (by suffix, hidden ones left out) as sorted paths relative to `folder`.

    Links to other folders are followed, and each folder is read once, whatever leads to it. A link into the folder
    itself, or to one above it or above where the link lies, is left out.
    """
    found = _walk(folder, recursive, set(), os.path.realpath(folder))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _walk(folder: Path, recursive: bool, seen: set[str], root: str) -> Iterator[Path]:
    links = []
    for parent, folders, files in os.walk(folder):
        real = os.path.realpath(parent)
        seen.add(real)
        visible = (name for name in folders if recursive and not name.startswith("."))
        # A link read before may have led into the middle of this tree.
        folders[:] = sorted(name for name in visible if os.path.join(real, name) not in seen)
        links += [path for name in folders if (path := Path(parent) / name).is_symlink()]
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield Path(parent) / name
    for link in links:
        real = os.path.realpath(link)
        upwards = any(Path(place).is_relative_to(real) for place in (root, os.path.realpath(link.parent)))
        if real not in seen and not upwards:
            yield from _walk(link, recursive, seen, root)


def has_class_folders(folder: Path) -> bool:
    """Tell whether a folder holds its images in subfolders only."""
    return not list_images(folder, recursive=False) and any(list_images(path) for path in _subfolders(folder))


def ilsvrc_synsets() -> list[str]:
    """Return the 1000 synsets of ILSVRC-2012 in the order of their class indices."""
    from timm.data import ImageNetInfo

    return list(ImageNetInfo().label_names())


def read_class_index(path: str | os.PathLike[str]) -> list[str]:
    """Read class names in the order of their labels; see `ImageNetFolder` for the formats.

    Raises:
        UserError: If the file is missing, of another format, or names a class twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            content = json.loads(text)
            if isinstance(content, dict):
                content = [content[str(i)] for i in range(len(content))]
            names = [name if isinstance(name, str) else name[0] for name in content]
        else:
            names = [line.split()[0] for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"cannot read the class index {path}: {error!r}.") from error
    if len(set(map(str, names))) != len(names) or not names:
        raise UserError(f"the class index {path} is empty or names a class twice.")
    return [str(name) for name in names]


def _class_order(folders: list[str], class_index: str | os.PathLike[str] | None, places: tuple[Path, ...]) -> list[str]:
    if class_index is not None:
        return read_class_index(class_index)
    for place in places:
        for name in CLASS_INDEX_FILES:
            if (place / name).is_file():
                return read_class_index(place / name)
    if all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in folders):
        synsets = ilsvrc_synsets()
        if set(folders) <= set(synsets):
            return synsets
    return folders


def _existing_folder(folder: Path) -> Path:
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the path of your images.")
    return folder


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
