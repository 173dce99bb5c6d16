"""From a configuration to an inverter, and from an inverter to a file and back."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from featinv.backbones.base import Backbone, FeatureSpec
from featinv.checkpoint import load_checkpoint, save_checkpoint
from featinv.config import instantiate, nearest, refuse_foreign, resolve_target
from featinv.data import load_part
from featinv.diffusion.prior import WEIGHTS_ROOT, DiffusionPrior, load_prior
from featinv.errors import UserError
from featinv.files import given_path
from featinv.inverters.base import Inverter, TrainableInverter
from featinv.inverters.diffusion import DiffusionInverter
from featinv.inverters.fingerprints import branch_fingerprint, fingerprint, prior_fingerprint

INVERTER_FILE = "inverter.safetensors"


def build_inverter(
    config: DictConfig,
    spec: FeatureSpec,
    backbone: Backbone | None = None,
    prior: DiffusionPrior | None = None,
    size: int | None = None,
) -> Inverter:
    """Build the inverter that `config.inverter` names.

    What its constructor asks for beyond the YAML is derived: `prior` (if it cannot do without) from config.prior,
    `encoder` from config.conditioning (built for features and latents), `lift` from config.lift (if there is one; the
    encoder is then built for its layer), `spec`, `backbone`, `dataset` (the training images of config.data), and `size`
    in pixels. With `config.branch_of` the branch is another inverter's.

    Args:
        config: With `inverter`, and where needed `prior`, `conditioning`, `lift`, `backbone`, `data` and
            `branch_of`.
        spec: Of the features to invert.
        backbone: Loaded from config.backbone if an inverter needs it and it is not given.
        prior: Loaded from config.prior if not given.
        size: Side of the pictures where the YAML does not say; by default the prior's.

    Raises:
        UserError: If a part is missing or does not fit the others.
    """
    wanted = inspect.signature(resolve_target(config.inverter.target, "inverter.target")).parameters
    given = config.inverter.get("params") or {}
    derived: dict[str, Any] = {}
    if "prior" in wanted and wanted["prior"].default is inspect.Parameter.empty:
        if config.get("prior") is None and prior is None:
            raise UserError("this inverter needs a prior; set prior=NAME_OR_PATH.")
        derived["prior"] = prior = prior or load_prior(config.prior)
    if "lift" in wanted and config.get("lift"):
        if not config.get("branch_of"):
            raise UserError("a lift draws for another inverter's encoder and branch; set branch_of=NAME_OR_PATH.")
        backbone = backbone or instantiate(config.backbone, where="backbone")
        derived["lift"] = instantiate(config.lift, where="lift", spec=spec, backbone=backbone)
    if "encoder" in wanted:
        assert prior is not None
        derived["encoder"] = instantiate(
            config.conditioning,
            where="conditioning",
            spec=derived["lift"].spec if "lift" in derived else spec,
            latent_shape=prior.latent_shape,
            embedding_channels=prior.unet.config.block_out_channels[0],
        )
    if "spec" in wanted:
        derived["spec"] = spec
    if "backbone" in wanted:
        derived["backbone"] = backbone or instantiate(config.backbone, where="backbone")
    if "dataset" in wanted and "dataset" not in given:
        derived["dataset"] = _training_images(config)
    size = size or (prior.size if prior is not None else None)
    if "size" in wanted and "size" not in given and size is not None:
        derived["size"] = size
    inverter = instantiate(config.inverter, where="inverter", **derived)
    if config.get("branch_of"):
        _borrow_branch(inverter, config.branch_of)
    return inverter


def _borrow_branch(inverter: Inverter, lender: str) -> None:
    """Let an inverter look through the branch of another one; see `DiffusionInverter.borrow_branch`."""
    if not isinstance(inverter, DiffusionInverter):
        raise UserError(f"branch_of={lender}: {type(inverter).__name__} has no branch.")
    device = inverter.null_embedding.device
    known = device.type != "meta"  # a dry run's weights have no values to compare
    state, branch = _lent(lender, prior_fingerprint(inverter.prior) if known else None)
    try:
        inverter.borrow_branch({key: value.to(device) for key, value in state.items()})
    except UserError as error:
        raise UserError(f"branch_of={lender}: {error}") from error
    if known and branch not in (None, fingerprint(*inverter.branch.parameters())):
        raise UserError(f"branch_of={lender}: it was trained with another branch than it now borrows; retrain it.")


def _lent(lender: str, prior: str | None) -> tuple[dict[str, Tensor], str | None]:
    """The state of a lender, with what it has borrowed itself, and the branch that it was trained with."""
    tree = load_checkpoint(find_inverter(lender))
    described = tree.get("featinv", {})
    if prior is not None and described.get("prior") != prior:
        raise UserError(f"branch_of={lender}: it was trained with another prior.")
    config, state = described.get("config", {}), _averaged(tree)
    if further := config.get("branch_of"):
        trained = "lift." if config.get("lift") else "encoder."
        state |= {k: v for k, v in _lent(further, prior)[0].items() if not k.startswith(trained)}
    return state, described.get("branch")


def _training_images(config: DictConfig) -> Any:
    """The training images of config.data as they are, without the crops and flips of a training."""
    if config.get("data") is None:
        raise UserError("this inverter needs training images; set data=NAME.")
    node = copy.deepcopy(config.data)
    if OmegaConf.select(node, "params.train.params.augment"):
        node.params.train.params.augment = False
    return load_part(node, "train")


def about(config: DictConfig, inverter: Inverter, spec: FeatureSpec) -> dict[str, Any]:
    """What a checkpoint must know to be loaded: resolved configuration, feature spec, and which prior.

    Raises:
        UserError: If the configuration names what no checkpoint may; see `refuse_foreign`.
    """
    prior, resolved = getattr(inverter, "prior", None), OmegaConf.to_container(config, resolve=True)
    refuse_foreign(resolved, "the configuration")
    return {
        "config": resolved,
        "spec": dataclasses.asdict(spec),
        "prior": prior_fingerprint(prior) if isinstance(prior, DiffusionPrior) else None,
        "branch": branch_fingerprint(inverter) if config.get("branch_of") else None,
    }


def save_inverter(
    path: str | Path,
    inverter: TrainableInverter,
    described: dict[str, Any],
    dtype: torch.dtype | None = None,
    note: dict[str, Any] | None = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write trained weights (apply their average first) with what `about` returned; atomically.

    Args:
        path: A .safetensors file.
        inverter: Its `trainable_state` is written where no `state` is given.
        described: From `about`.
        dtype: Round floating-point tensors, torch.float16 for weights that are shipped.
        note: How it was trained: steps, images, figures.
        state: Of an inverter whose own is split among processes.
    """
    state = inverter.trainable_state() if state is None else state
    state = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in state.items()}
    save_checkpoint(path, {"featinv": described, "state_dict": state, "note": note or {}})


def bundled_inverters() -> list[str]:
    """Names of the inverters that come with the package."""
    paths = WEIGHTS_ROOT.glob("*/inverters/*.safetensors")
    return sorted(f"{path.parent.parent.name}/{path.stem}" for path in paths)


def find_inverter(name_or_path: str | Path) -> Path:
    """The file of a bundled name, a run's folder or a file.

    Raises:
        UserError: If there is none, naming the nearest bundled name.
    """
    family, _, name = str(name_or_path).rpartition("/")
    bundled = WEIGHTS_ROOT / family / "inverters" / f"{name}.safetensors"
    path = given_path(name_or_path)
    candidates = [path / INVERTER_FILE, path / "last.safetensors"] if path.is_dir() else [path]
    for candidate in ([bundled] if family else []) + candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise UserError(f"{path} holds no trained inverter (neither {INVERTER_FILE} nor last.safetensors).")
    known = bundled_inverters()
    hint = nearest(str(name_or_path), known) if known else "no inverters are bundled."
    raise UserError(f"no inverter {str(name_or_path)!r}: neither a file, a run's folder nor bundled; {hint}")


@dataclass(frozen=True)
class Trained:
    """A loaded inverter and what it was trained with."""

    inverter: Inverter
    config: DictConfig
    spec: FeatureSpec
    note: dict[str, Any]

    def load_backbone(self) -> Backbone:
        """The backbone whose features it inverts.

        Raises:
            UserError: If the backbone's map is not the one this inverter was built for.
        """
        backbone = instantiate(self.config.backbone, where="backbone")
        check_spec(self.spec, backbone.spec)
        return backbone


def check_spec(wanted: FeatureSpec, found: FeatureSpec) -> None:
    """Say so if a backbone's features are not those that an inverter was built for."""
    if wanted != found:
        raise UserError(f"the inverter was built for {wanted}, but the backbone gives {found}.")


def check_backbone(name: str, trained: Trained, given: Trained) -> None:
    """Say so if an inverter was trained on another network than the one whose features it is to be given.

    Networks with other weights have maps of the same shape and layer, so that the spec alone does not tell.

    Args:
        name: Of the inverter, for the message.
        trained: The inverter.
        given: The one whose backbone gives the features.

    Raises:
        UserError: If the backbones' features or configurations differ.
    """
    check_spec(trained.spec, given.spec)
    if trained.config.backbone != given.config.backbone:
        own, other = (dict(each.config.backbone.get("params") or {}) for each in (trained, given))
        raise UserError(
            f"{name} was trained on another backbone ({own}) than the one that gives the features ({other}); "
            "choose inverters of one backbone."
        )


def load_trained(name_or_path: str | Path, prior: DiffusionPrior | None = None) -> Trained:
    """Load an inverter with its configuration.

    Args:
        name_or_path: A bundled name ("scenes64/efficientnet_lite0"), a run's folder, or a checkpoint. Of a training
            checkpoint the averaged weights are taken.
        prior: Used instead of the one that the configuration names; it must be the same.

    Raises:
        UserError: If it is missing, damaged, or does not fit its prior.
    """
    path = find_inverter(name_or_path)
    tree = load_checkpoint(path)
    described = description(tree, path)
    config, spec = OmegaConf.create(described["config"]), FeatureSpec(**described["spec"])
    assert isinstance(config, DictConfig)
    inverter = build_inverter(config, spec, prior=prior)
    found = getattr(inverter, "prior", None)
    if isinstance(found, DiffusionPrior) and described["prior"] != prior_fingerprint(found):
        raise UserError(
            f"{path} was trained with another prior than {config.prior!r}; retrain it or restore that prior."
        )
    if config.get("branch_of") and described["branch"] != branch_fingerprint(inverter):
        raise UserError(f"{path} was trained with another branch than that of {config.branch_of!r} now; retrain it.")
    if isinstance(inverter, TrainableInverter):
        _restore(inverter, _averaged(tree), path)
    elif tree["state_dict"]:
        raise UserError(
            f"{path} holds weights, and {type(inverter).__name__} has no place for them: it lacks a method of "
            "TrainableInverter (docs/add-an-inverter.md)."
        )
    if isinstance(inverter, torch.nn.Module):
        inverter.eval().requires_grad_(False)
    return Trained(inverter, config, spec, tree.get("note") or {})


def description(tree: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """What a checkpoint, or its header, says of its inverter: "config", "spec", and of which "prior" and "branch".

    Raises:
        UserError: If there is no inverter in it, or its configuration names what is not this package's.
    """
    if "featinv" not in tree:
        raise UserError(f"{path} is a checkpoint of another kind (no inverter in it).")
    refuse_foreign(tree["featinv"]["config"], str(path))
    return tree["featinv"]


def load_inverter(name_or_path: str | Path) -> Inverter:
    """Load an inverter: `load_inverter(name).invert(features, seeds=...) -> images`; see `load_trained`."""
    return load_trained(name_or_path).inverter


def take_over(inverter: TrainableInverter, name_or_path: str | Path) -> tuple[list[str], list[str]]:
    """Start an inverter from the (averaged) weights of another one, part by part: branch, encoder, gate.

    A part all of whose tensors are there in equal shapes is taken, others stay fresh: a branch trained on one layer
    serves another layer, whose encoder does not fit.

    Args:
        inverter: Changed in place.
        name_or_path: As for `load_trained`.

    Returns:
        Names of the parts that were taken and of those that were not.

    Raises:
        UserError: If no part fits.
    """
    path = find_inverter(name_or_path)
    given, own = _averaged(load_checkpoint(path)), inverter.trainable_state()
    misfits = {key.partition(".")[0] for key in own if key not in given or given[key].shape != own[key].shape}
    taken = {key: given[key] for key in own if key.partition(".")[0] not in misfits}
    if not taken:
        raise UserError(f"nothing in {path} fits this inverter: its tensors have other names or shapes.")
    inverter.load_state_dict(taken, strict=False)
    return sorted({key.partition(".")[0] for key in taken}), sorted(misfits)


def _averaged(tree: dict[str, Any]) -> dict[str, Tensor]:
    averages = (tree.get("ema") or {}).get("averages") or {}
    state = {**tree["state_dict"], **averages}
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def _restore(inverter: TrainableInverter, state: dict[str, Tensor], path: Path) -> None:
    own = inverter.trainable_state()
    wrong = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        raise UserError(f"{path} does not fit its own configuration: it differs in {wrong[0]!r}; the file is damaged.")
    inverter.load_state_dict(state, strict=False)
