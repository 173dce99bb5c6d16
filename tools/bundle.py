"""Weights of finished runs as a bundle of the package: half precision, their logs, a model card.

python -m tools.bundle prior runs/prior_photos64 photos64 --limit 60
python -m tools.bundle inverter runs/photos64 photos64/efficientnet_lite0 --limit 60
python -m tools.bundle inverter runs/photos64_early photos64/efficientnet_lite0_early --metrics runs/photos/metrics.json
python -m tools.bundle card photos64/efficientnet_lite0 --metrics runs/photos/metrics.json     figures for what is there
python -m tools.bundle card scenes64                                                           the card alone, again

The bundle is the folder featinv/weights/NAME; nothing of it changes if it would become larger than the limit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from featinv.checkpoint import read_header
from featinv.config import CONFIG_ROOT, all_keys, nearest
from featinv.diffusion.prior import WEIGHTS_ROOT, load_prior
from featinv.errors import UserError, exit_on_user_error
from featinv.files import given_path, read_json, write_json
from featinv.inverters.build import about, find_inverter, load_trained, save_inverter
from featinv.inverters.fingerprints import branch_fingerprint, prior_fingerprint
from featinv.report.benchmark import shown_columns
from featinv.report.curves import read_log
from tools.model_card import RECORD, STAGES, bundle_files, logged_hours, probed_hours, this_machine, write_card

LOG = "probe.jsonl"


def stage_prior(run: Path, bundle: Path, staged: Path, config: Path | None, machine: str | None) -> None:
    """Put a prior, its first stage's figures and what is known of its training into `staged`.

    Raises:
        UserError: If there is no prior, or the bundle holds inverters of another one.
    """
    folder = run / "prior" if (run / "prior" / "prior.json").is_file() else run
    if not (folder / "prior.json").is_file():
        raise UserError(f"{run} holds no prior; train one: python -m tools.train_prior {bundle.name}.")
    prior = load_prior(folder)
    for path in sorted(bundle.glob("inverters/*.safetensors")):
        if read_header(path)["featinv"]["prior"] not in (None, prior_fingerprint(prior)):
            raise UserError(f"{path} was trained with another prior than the one in {folder}; remove it first.")
    prior.save_pretrained(staged, torch.float16)
    if (run / "first_stage.json").is_file():
        shutil.copy(run / "first_stage.json", staged)
    path = config or CONFIG_ROOT / "prior" / f"{bundle.name}.yaml"
    stages = {
        name: {"steps": read_header(run / name / "last.safetensors")["global_step"], "hours": logged_hours(run / name)}
        for name in STAGES
        if (run / name / "last.safetensors").is_file()
    }
    write_json(
        staged / RECORD,
        {
            "config": OmegaConf.to_container(OmegaConf.load(path), resolve=False) if path.is_file() else None,
            "stages": stages,
            "machine": machine or this_machine(),
        },
    )


def stage_inverter(
    run: Path,
    bundle: Path,
    name: str,
    staged: Path,
    changes: Sequence[str],
    machine: str | None,
    history: str | None = None,
) -> None:
    """Put a run's inverter (the weights' average) and its log into `staged`/inverters.

    Raises:
        UserError: If the bundle has no prior or another one, if an inverter in it borrows this one's branch as it was,
            or if the run's configuration names places of this machine.
    """
    if not (bundle / "prior.json").is_file():
        raise UserError(f"{bundle} has no prior yet; bundle it first: python -m tools.bundle prior RUN {bundle.name}.")
    trained = load_trained(run, load_prior(bundle))
    for path in sorted(bundle.glob("inverters/*.safetensors")):
        known = read_header(path)["featinv"]
        borrows = known["config"].get("branch_of") == f"{bundle.name}/{name}"
        if borrows and known["branch"] not in (None, branch_fingerprint(trained.inverter)):
            raise UserError(f"{path} borrows the branch of {bundle.name}/{name} as it was; remove it first.")
    described = about(trained.config, trained.inverter, trained.spec)
    described["config"] = portable(trained.config, bundle.name, changes)
    folder = run if run.is_dir() else find_inverter(run).parent
    lines = read_log(folder / LOG) if (folder / LOG).is_file() else []
    target = staged / "inverters" / f"{name}.safetensors"
    note = trained.note or (lines[-1] if lines else {})
    save_inverter(target, trained.inverter, described, torch.float16, note)  # type: ignore[arg-type]
    if lines:
        shutil.copy(folder / LOG, target.with_suffix(".jsonl"))
    # A run that goes on from another folder brings that one's probe log, not its TensorBoard files.
    known = [hours for hours in (logged_hours(folder), probed_hours(lines)) if hours is not None]
    record = {"hours": max(known, default=None), "machine": machine or this_machine(), "history": history}
    write_json(target.with_suffix(".json"), record)


def portable(config: DictConfig, bundle: str, changes: Sequence[str] = ()) -> dict[str, Any]:
    """A run's configuration for other machines: the bundle's prior, and environment variables in the place of paths.

    Args:
        config: As resolved for the run.
        bundle: Name of the prior.
        changes: Words KEY=VALUE that replace what is still bound to this machine.

    Raises:
        UserError: If a value is an absolute path, naming its key.
    """
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))  # type: ignore[assignment]
    if config.get("prior") is not None:
        config.prior = bundle
    if OmegaConf.select(config, "training.cache_root") is not None:
        config.training.cache_root = "runs/cache"
    for path in sorted((CONFIG_ROOT / "data").glob("*.yaml")):
        _restore_interpolations(config, path)
    for word in changes:
        key = word.partition("=")[0]
        if OmegaConf.select(config, key) is None:
            raise UserError(f"--set {word}: unknown key {key!r}; {nearest(key, all_keys(config))}")
        config.merge_with_dotlist([word])  # reads numbers as numbers
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
    for key, value in _leaves(plain).items():
        if any(isinstance(v, str) and os.path.isabs(v) for v in (value if isinstance(value, list) else [value])):
            raise UserError(
                f"{key} is {value!r}, a path of this machine: set the environment as it was in training, or give "
                f"--set {key}=VALUE."
            )
    return plain


def _restore_interpolations(config: DictConfig, path: Path) -> None:
    """Where the data's YAML has ${oc.env:...} and it gives what the run had, put it back."""
    template = OmegaConf.create({"data": OmegaConf.load(path)})
    for key, raw in _leaves(OmegaConf.to_container(template, resolve=False)).items():
        if not (isinstance(raw, str) and "${" in raw):
            continue
        try:
            now = OmegaConf.select(template, key)
        except OmegaConfBaseException:  # a variable without a default that is not set
            continue
        if OmegaConf.select(config, key) == now:
            OmegaConf.update(config, key, raw)


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of everything in nested dicts that is no dict."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def evaluation(metrics: Path, row: str) -> dict[str, Any]:
    """One row of a metrics.json, with its floor, ceiling, and how many images.

    Raises:
        UserError: If there is no such row, naming the nearest.
    """
    content = read_json(metrics)
    if row not in content["inverters"]:
        raise UserError(f"{metrics} has no row {row!r}: {nearest(row, list(content['inverters']))} Give it as --row.")
    columns = shown_columns(content)
    parts = {"figures": content["inverters"][row], "floor": content["floor"], "ceiling": content["ceiling"]}
    meta = {key: content["meta"].get(key) for key in ("images", "seed", "features")}
    return {"meta": meta, **{k: {m: v[m] for m in columns if m in v} for k, v in parts.items()}}


def add_evaluation(bundle: Path, name: str, metrics: Path, row: str | None) -> None:
    """Write a benchmark's figures of a bundled inverter beside its weights."""
    path = bundle / "inverters" / f"{name}.json"
    if not path.with_suffix(".safetensors").is_file():
        raise UserError(f"{bundle} holds no inverter {name!r}.")
    known = read_json(path) if path.is_file() else {}
    write_json(path, known | {"evaluation": evaluation(metrics, row or f"{bundle.name}-{name}")})


def install(staged: Path, bundle: Path, limit: float) -> None:
    """Move staged files into the bundle, print its sizes.

    Raises:
        UserError: If the bundle would be larger than `limit` megabytes; it is left as it was.
    """
    new = bundle_files(staged)
    sizes = (bundle_files(bundle) if bundle.is_dir() else {}) | new
    total = sum(sizes.values()) / 1e6
    for name, size in sizes.items():
        print(f"{size / 1e6:8.2f} MB  {name}{'  (new)' if name in new else ''}")
    print(f"{total:8.2f} MB  in all, of {limit:g}")
    if total > limit:
        raise UserError(f"{bundle} would have {total:.1f} MB, more than --limit {limit:g}; nothing was changed.")
    for name in new:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / name, bundle / name)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, text in {
        "prior": "a folder that tools.train_prior made",
        "inverter": "a folder that train.py made",
        "card": "write the model card again",
    }.items():
        one = kinds.add_parser(kind, help=text)
        if kind != "card":
            one.add_argument("run", type=given_path, help=text)
            one.add_argument("--limit", type=float, default=60, help="megabytes that the bundle may have")
            one.add_argument("--machine", help="what it was trained on; by default this machine")
        one.add_argument("name", help="photos64 for a prior, photos64/efficientnet_lite0 for an inverter")
        one.add_argument("--into", type=given_path, default=WEIGHTS_ROOT, help="folder of all bundles")
        if kind == "prior":
            one.add_argument("--config", type=given_path, help="its YAML; by default configs/prior/NAME.yaml")
        else:
            one.add_argument(
                "--metrics", type=given_path, help="metrics.json of a benchmark that has the inverter as a row"
            )
            one.add_argument("--row", help="its row; by default the run's name as eval.benchmark writes it")
        if kind == "inverter":
            one.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes in its configuration")
            one.add_argument("--history", help="how it was trained, if not by one run with these settings")
    return parser.parse_args(argv)


@exit_on_user_error
def main() -> None:
    """Read the command line, bundle."""
    args = arguments()
    family, _, name = args.name.partition("/")
    bundle = args.into / family
    if (args.kind == "inverter") != bool(name) and args.kind != "card":
        raise UserError("a prior is named FAMILY, an inverter FAMILY/NAME, as in photos64/efficientnet_lite0.")
    if args.kind == "card" and not bundle.is_dir():
        raise UserError(f"there is no bundle {bundle}.")
    if args.kind != "card":
        args.into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.into, prefix=f".{family}.") as temporary:
            if args.kind == "prior":
                stage_prior(args.run, bundle, Path(temporary), args.config, args.machine)
            else:
                stage_inverter(args.run, bundle, name, Path(temporary), args.set, args.machine, args.history)
            install(Path(temporary), bundle, args.limit)
    if name and args.metrics is not None:
        default = str(args.run).strip("/").removeprefix("runs/").replace("/", "-") if args.kind == "inverter" else None
        add_evaluation(bundle, name, args.metrics, args.row or default)
    print(write_card(bundle))


if __name__ == "__main__":
    main()
