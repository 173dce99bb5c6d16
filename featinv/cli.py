"""Command lines of the form `script.py experiment=NAME key=value --flag`, with a --help that lists every key."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from featinv.config import CONFIG_ROOT, is_node, load_config
from featinv.errors import UserError
from featinv.files import given_path


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line: the composed configuration, `out=FOLDER`, and the flags that were set."""

    config: DictConfig
    name: str
    out: Path | None
    flags: frozenset[str]


def parse_command_line(
    description: str, default: str, flags: dict[str, str] | None = None, argv: Sequence[str] | None = None
) -> CommandLine:
    """Compose a script's configuration from its command line; `--help` prints it with every key and exits.

    Args:
        description: The script's docstring.
        default: The configuration if no `experiment=` is given: a name in configs/experiment; or a script's own file,
            beside which there is no choice of an experiment.
        flags: Name -> meaning of `--name` switches.
        argv: Instead of sys.argv[1:].

    Raises:
        UserError: If a flag or a key is unknown, naming the nearest; if the folder in `out=` is empty.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    flags = {"help": "print this and the configuration that the other words make", **(flags or {})}
    words = ["--help" if word in ("-h", "help") else word for word in words]
    given = {word for word in words if word.startswith("-")}
    words = [word for word in words if word not in given]
    for flag in given - {f"--{name}" for name in flags}:
        known = ", ".join(f"--{name}" for name in flags)
        raise UserError(f"unknown flag {flag}; there are {known}, and values are set by key=value.")
    own = default.endswith(".yaml")  # a script's own file
    chosen = [] if own else [word.partition("=")[2] for word in words if word.startswith("experiment=")]
    words = [word for word in words if own or not word.startswith("experiment=")]
    words, out = split_out(words)
    name = os.path.expanduser(chosen[-1]) if chosen else default
    config = load_config(name, words)
    if "--help" in given:
        chooser = "experiment" if not own else "setting" if "setting" in config else None
        print(_help(description, name, config, flags, chooser))
        raise SystemExit(0)
    _quieten()
    return CommandLine(config, Path(name).stem, out, frozenset(flag.removeprefix("--") for flag in given))


def split_out(words: Sequence[str]) -> tuple[list[str], Path | None]:
    """Split a command line's words into those that set keys and the folder of the last `out=FOLDER`.

    Raises:
        UserError: If no folder stands there.
    """
    folders = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    if "" in folders:
        raise UserError("out= names no folder; is a variable of the shell not set?")
    rest = [word for word in words if not word.startswith("out=")]
    return rest, given_path(folders[-1]) if folders else None


def _help(description: str, name: str, config: DictConfig, flags: dict[str, str], chooser: str | None) -> str:
    """`chooser`: the word that takes an experiment, if one does."""
    experiments = sorted(path.stem for path in (CONFIG_ROOT / "experiment").glob("*.yaml"))
    groups = sorted(path.name for path in CONFIG_ROOT.iterdir() if path.is_dir() and is_node(config.get(path.name)))
    swaps = [
        f"  {g}=NAME  one of {', '.join(sorted(p.stem for p in (CONFIG_ROOT / g).glob('*.yaml')))}" for g in groups
    ]
    switches = [f"  --{flag}  {meaning}" for flag, meaning in flags.items()]
    parts = [
        description.strip(),
        "\nflags:\n" + "\n".join(switches),
        "\nout=FOLDER chooses where the run goes.",
        *([f"\nexperiments ({chooser}=NAME or a YAML file): {', '.join(experiments)}"] if chooser else []),
        *(["\nwhole groups that can be swapped:\n" + "\n".join(swaps)] if swaps else []),
        f"\nkeys and values in {name} (key.subkey=value; beneath `params` every argument of the target is a key):\n",
        OmegaConf.to_yaml(config),
    ]
    return "\n".join(parts)


def _quieten() -> None:
    """Show our own messages; hide other libraries' advertisements and deprecations from the terminal."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("pytorch_lightning", "lightning", "httpx", "timm", "open_clip"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|diffusers|torch|timm|lightning")
