"""Files that are either whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pickle
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from featinv.errors import UserError

log = logging.getLogger(__name__)


def given_path(name: str | Path) -> Path:
    """The path that a user gave; the shell leaves the ~ in key=~/runs and in a YAML file alone.

    Raises:
        UserError: If it is empty, which would mean the current folder.
    """
    if not str(name):
        raise UserError("a path is empty; is a variable of the shell not set?")
    return Path(os.path.expanduser(name))


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it becomes `path`, on failure it is removed.

    Raises:
        UserError: If the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.stem[:80]}.{socket.gethostname()}-{os.getpid()}."
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what killed processes of this machine had begun to write."""
    pattern = re.compile(rf"\..*\.{re.escape(socket.gethostname())}-(\d+)\.[^.]+(\..*)?")
    for path in folder.rglob(".*"):
        found = pattern.fullmatch(path.name)
        if found and not _alive(int(found[1])):
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: If it is missing or damaged.
    """
    try:
        return json.loads(given_path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; make it first.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run again.") from error


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors and string metadata atomically."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, dict(metadata or {}))
        except SafetensorError as error:
            raise OSError(str(error)) from error


@contextlib.contextmanager
def _open_safetensors(path: str | Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}.") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); restore it or delete it.") from error


def load_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata; the format cannot hold code.

    Raises:
        UserError: If the file is missing, truncated or of another kind.
    """
    with _open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read a safetensors file's metadata alone.

    Raises:
        UserError: As `load_safetensors`.
    """
    with _open_safetensors(path) as file:
        return dict(file.metadata() or {})


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors or a torch file, on the CPU, never unpickling code.

    Raises:
        UserError: If the file is missing, damaged, or holds objects that are no plain tensors.
    """
    path = given_path(path)
    if path.suffix == ".safetensors":
        return load_safetensors(path)[0]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}.") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged or holds Python objects beside tensors; these could run code and are never unpickled: "
            "get the weights as .safetensors."
        ) from error
    except Exception as error:  # torch raises many kinds on damaged files
        raise UserError(f"{path} is not a readable state dict ({first_line(error)}).") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a state dict: it holds a {type(state).__name__}.")
    return state


@contextlib.contextmanager
def run_lock(folder: str | Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder for one process; a dead process's lock is gone with it, and its unfinished files are removed.

    Where the file system knows no locks (NFS without a lock daemon, Lustre mounted without flock), a warning says so.

    Args:
        folder: The folder.
        wait: Wait for another process to finish instead of giving up.

    Raises:
        UserError: If another process holds it, or it cannot be written into.
    """
    path = Path(folder) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = open(path, "a+")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror}); choose another folder.") from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"another process is working in {folder}; wait for it or choose another folder.") from error
        except OSError as error:
            log.warning("%s cannot be locked (%s): start no second process that works in it", folder, error.strerror)
        _sweep(path.parent)
        yield
