"""YAML nodes `{target: dotted.path, params: {...}}` and the objects that they name."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from featinv.errors import UserError

CONFIG_ROOT = Path(__file__).resolve().parents[1] / "configs"
FACTORIES = ("featinv.backbones.bundled.bundled_backbone",)
"""Functions that a checkpoint's configuration may name; all else are classes."""
_FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:\w+(,[^${}'\"]*)?\}")  # gives a string, a data set's root


def nearest(name: str, valid: Sequence[str]) -> str:
    """Say which valid names are closest to a wrong one, or list them all, if they are few."""
    close = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"valid: {', '.join(sorted(valid))}." if len(valid) <= 60 else f"none of {len(valid)} names is like it."


def load_group(group: str, name: str) -> DictConfig:
    """Read configs/GROUP/NAME.yaml.

    Raises:
        UserError: If there is no such file, naming the nearest.
    """
    folder = CONFIG_ROOT / group
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"no {group} {name!r}: {nearest(name, [p.stem for p in folder.glob('*.yaml')])}")
    return _read(path)


def _read(path: Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, DictConfig):
        raise UserError(f"{path} must hold a mapping.")
    return content


def load_config(experiment: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose an experiment.

    An experiment file lists `defaults: [group/name, ...]`: each file becomes the value of its group's key. The default
    `experiment/name` is another experiment to start from. Then the experiment's own keys are merged, then the
    overrides. An override `group=name` swaps a whole group's file.

    Args:
        experiment: A name in configs/experiment or a path of a YAML file.
        overrides: Words such as "training.max_steps=10".

    Raises:
        UserError: If a file, group or key does not exist, naming the nearest one.
    """
    composed, groups = _compose(experiment)
    swaps, words = _split_overrides(overrides, groups)
    for group, name in swaps.items():
        composed[group] = load_group(group, name)
    for key, value in words:
        _override(composed, key, value)
    return composed


def _compose(experiment: str | Path) -> tuple[DictConfig, set[str]]:
    """The experiment before overrides, and the groups that it took from files."""
    path = Path(experiment)
    is_file = path.suffix in (".yaml", ".yml") and path.is_file()
    own = _read(path) if is_file else load_group("experiment", str(experiment))
    composed = OmegaConf.create({})
    groups: set[str] = set()
    for place, entry in enumerate(own.pop("defaults", [])):
        group, _, name = str(entry).partition("/")
        if group == "experiment":
            if place or name == str(experiment):
                raise UserError(f"{experiment}: in `defaults`, {entry} must come first, and be another experiment.")
            composed, groups = _compose(name)
            continue
        composed[group] = load_group(group, name)  # replaced, not merged: parameters of another target would linger
        groups.add(group)
    merged = OmegaConf.merge(composed, own)
    assert isinstance(merged, DictConfig)
    return merged, groups


def _split_overrides(overrides: Sequence[str], groups: set[str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    swaps, words = {}, []
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} is not of the form key=value.")
        if key in groups:
            swaps[key] = value
        else:
            words.append((key, value))
    return swaps, words


def _override(config: DictConfig, key: str, value: str) -> None:
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    # A constructor's parameter need not be spelt out in the YAML: `instantiate` checks it against the signature.
    if not isinstance(node, DictConfig) or (last not in node and not parent.endswith("params")):
        raise UserError(f"unknown key {key!r}: {nearest(key, all_keys(config))}")
    if " #" in value and value[:1] not in "'\"[{":
        raise UserError(f"in {key}={value} YAML takes what follows the # for a comment; write '{key}=\"{value}\"'.")
    try:
        new, old = OmegaConf.create(f"v: {value}").v, OmegaConf.to_container(node, resolve=False)
        if isinstance(old.get(last), list) and isinstance(new, str | int | float):  # type: ignore[union-attr]
            new = [new]  # one word is a list of it
        # A node is replaced, as groups are: parameters of another target would linger.
        OmegaConf.update(config, key, new, merge=bool(new) and not is_node(new))
    except yaml.YAMLError as error:
        raise UserError(f"{key}={value} is not a value in YAML; quote it: '{key}=\"{value}\"'.") from error
    except OmegaConfBaseException as error:
        raise UserError(f"cannot set {key}={value}: {error}") from error


def differences(before: Mapping[Any, Any] | DictConfig, now: Mapping[Any, Any] | DictConfig) -> list[str]:
    """Leaves in which two configurations differ, as "key: before -> now"; a key that is null may be left out."""
    missing = "(absent)"
    leaves = _leaves(before), _leaves(now)
    pairs = {key: [found.get(key, missing) for found in leaves] for key in dict.fromkeys([*leaves[0], *leaves[1]])}
    nothing = ([missing, None], [None, missing])
    return [f"{key}: {old} -> {new}" for key, (old, new) in pairs.items() if old != new and [old, new] not in nothing]


def listed(value: Any) -> list[Any]:
    """The value of a key that takes a list: null is an empty one, one word or number a list of it."""
    return [value] if isinstance(value, str | int | float) else list(value or [])


def check_count(name: str, value: Any) -> None:
    """Raise UserError if the value of a key is neither a number of images nor null."""
    if value is not None and (not isinstance(value, int) or value < 1):
        raise UserError(f"{name} is a number of images, 1 or more, or null for all, not {value}.")


def all_keys(config: DictConfig) -> list[str]:
    """Dotted names of all leaves."""
    return list(_leaves(OmegaConf.to_container(config, resolve=False)))  # type: ignore[arg-type]


def _leaves(config: Mapping[Any, Any] | DictConfig, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value; a key may have dots itself, as a layer's name has: `OmegaConf.select` cannot read it."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        name = prefix + str(key)
        leaves |= _leaves(value, f"{name}.") if isinstance(value, Mapping | DictConfig) else {name: value}
    return leaves


def is_node(value: Any) -> bool:
    """Whether a value is a `{target, params}` node."""
    return isinstance(value, Mapping | DictConfig) and "target" in value


def resolve_target(target: str, where: str = "target") -> Callable[..., Any]:
    """Import the class or function that a dotted path names.

    Raises:
        UserError: If it does not exist.
    """
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, ValueError) as error:
        raise UserError(f"{where}: cannot import {target!r} ({error}).") from error
    except AttributeError as error:
        raise UserError(
            f"{where}: {module} has no {name!r}; {nearest(name, dir(importlib.import_module(module)))}"
        ) from (error)


def refuse_foreign(node: Any, where: str) -> None:
    """Check that a configuration that comes with a checkpoint builds nothing but this package's own classes.

    Any importable function could be a target, `os.system` too, or a function of ours that writes files; your own
    classes live beneath `featinv`. What would be resolved only later, `${...}`, could become anything, unless it is a
    variable of the environment.

    Raises:
        UserError: If it names anything else.
    """
    if isinstance(node, str) and "${" in _FROM_ENVIRONMENT.sub("", node):
        raise UserError(f"{where} holds {node[:80]!r}, which is resolved when it is built and could run any code.")
    if isinstance(node, list | tuple):
        for part in node:
            refuse_foreign(part, where)
    if isinstance(node, Mapping):
        for part in (*node.keys(), *node.values()):
            refuse_foreign(part, where)
        target = node.get("target")
        if isinstance(target, str) and target not in FACTORIES and not _is_own_class(target):
            raise UserError(
                f"{where} names {target!r}, which is no class of featinv's and could run any code; classes of your "
                "own belong beneath featinv/."
            )


def _is_own_class(target: str) -> bool:
    """Whether a dotted path names a class that a file of this package defines, or that it imports from another one.

    Read first, imported only if that does not find it: importing takes seconds.
    """
    package, *modules = target.split(".")[:-1] or [""]
    if package != "featinv" or not all(name.isidentifier() for name in modules):
        return False
    file, name = Path(__file__).parent.joinpath(*modules).with_suffix(".py"), target.rpartition(".")[2]
    if modules and file.is_file():
        for node in ast.parse(file.read_bytes()).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return True
    found = resolve_target(target)
    return inspect.isclass(found) and found.__module__.startswith("featinv.")


def check_params(function: Callable[..., Any], params: Sequence[str], where: str) -> None:
    """Reject parameters that a constructor does not have, naming the nearest one."""
    signature = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.values()):
        return
    for name in params:
        if name not in signature:
            raise UserError(f"{where}.{name} is unknown: {nearest(name, [n for n in signature if n != 'self'])}")


def instantiate(node: Any, *, where: str = "config", **derived: Any) -> Any:
    """Build the object that a `{target, params}` node names; nested nodes are built first.

    Args:
        node: The node.
        where: Name of the node in messages.
        **derived: Arguments computed by the caller, which the YAML must not set.

    Raises:
        UserError: If the target or a parameter does not exist, or a derived argument is also in the YAML.
    """
    try:
        node = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig | ListConfig) else node
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error
    if not is_node(node):
        raise UserError(f"{where} must have a target, not {node!r}.")
    unknown = set(node) - {"target", "params"}
    if unknown:
        raise UserError(f"{where}.{sorted(unknown)[0]} is unknown: {nearest(sorted(unknown)[0], ['target', 'params'])}")
    params = dict(node.get("params") or {})
    function = resolve_target(node["target"], f"{where}.target")
    for name in derived:
        if name in params:
            raise UserError(f"{where}.params.{name} is derived, remove it from the YAML.")
    check_params(function, [*params, *derived], f"{where}.params")
    built = {
        name: instantiate(value, where=f"{where}.params.{name}") if is_node(value) else value
        for name, value in params.items()
    }
    try:
        return function(**built, **derived)
    except TypeError as error:
        missing = [
            name
            for name, p in inspect.signature(function).parameters.items()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and name not in params | derived
        ]
        if missing:
            raise UserError(f"{where}.params.{missing[0]} is missing.") from error
        raise
