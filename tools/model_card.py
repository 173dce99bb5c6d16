"""The model card of a bundle, MODEL_CARD.md, from the bundle's own files."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from featinv.checkpoint import read_header
from featinv.config import CONFIG_ROOT
from featinv.files import read_json, write_text
from featinv.report.curves import read_log

CARD, RECORD = "MODEL_CARD.md", "training.json"
STAGES = {
    "first_stage": "first_stage.module",
    "finish": "first_stage.finishing",
    "decoder": "first_stage.polish",
    "unet": "unet.module",
}
"""Subfolders of a prior's run, and where its YAML describes them."""

IMAGENET = """\
The photographs are ImageNet's (ILSVRC-2012; at 64 pixels, Tiny ImageNet). None of them is in here. They belong to their
owners; ImageNet offers them to researchers for non-commercial research and educational use (image-net.org/download).
Whether weights that were trained on them are bound by those terms is not settled: for other uses ask a lawyer, or train
on pictures of your own. The package's licence, Apache-2.0, covers what its authors can license: code and weights."""
RENDERED = "All training images were rendered by `featinv.data.scenes`: nobody else's rights are in them. Apache-2.0."
UNKNOWN = "Apache-2.0, as far as the rights in the training images (above) allow."


def bundle_files(folder: Path) -> dict[str, int]:
    """Relative name -> bytes of every file, hidden ones left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def this_machine() -> str:
    """Number and model of processors, and the GPU if there is one."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    text = f"{os.cpu_count()} x {models[0] if models else platform.processor() or platform.machine()}"
    return f"{text}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else text


def logged_hours(run: Path) -> float | None:
    """Hours that a run trained, over all its sessions, by its TensorBoard files; None if there are none."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    seconds = 0.0
    for path in run.glob("tensorboard/events.*"):
        times = [event.wall_time for event in EventFileLoader(str(path)).Load()]
        seconds += max(times) - min(times) if times else 0.0
    return round(seconds / 3600, 2) if seconds else None


def probed_hours(lines: list[dict[str, Any]]) -> float | None:
    """The same by a probe log, whose clock starts again with every session; what followed its last line is missing."""
    minutes = [*(line["minutes"] for line in lines), 0.0]
    ends = [now for now, later in pairwise(minutes) if later < now]
    return round(sum(ends) / 60, 2) if ends else None


def _hours(hours: float | None) -> str:
    return "not recorded" if hours is None else f"{hours:.2f}"


def prior_record(bundle: Path) -> dict[str, Any]:
    """What `tools.bundle` recorded of the prior's training; without a record, its YAML in configs/prior."""
    if (bundle / RECORD).is_file():
        return read_json(bundle / RECORD)
    path = CONFIG_ROOT / "prior" / f"{bundle.name}.yaml"
    config = OmegaConf.to_container(OmegaConf.load(path), resolve=False) if path.is_file() else None
    return {"config": config, "stages": {}, "machine": "not recorded"}


def prior_section(bundle: Path) -> list[str]:
    """Data, stages and figures of the prior."""
    record = prior_record(bundle)
    info = read_json(bundle / "prior.json")
    lines = ["## Prior", "", f"Pictures of {info['size']} px. Trained on: {record['machine']}.", ""]
    if record["config"] is not None:
        lines += [f"Data: {data_text(record['config'].get('data'))}.", "", *_stage_table(record), ""]
    if (bundle / "first_stage.json").is_file():
        f = read_json(bundle / "first_stage.json")
        lines += [
            f"Round trip of {f['images']} held-out images through the first stage: {f['psnr']:.1f} dB, feature cosine "
            f"{f['cosine']:.3f} (shuffled pairs {f['floor']:.3f}).",
            "",
        ]
    return lines


def _stage_table(record: Mapping[str, Any]) -> list[str]:
    rows = ["| stage | image-steps | batch | settings | hours |", "|---|---|---|---|---|"]
    for name, key in STAGES.items():
        node, parent = OmegaConf.select(OmegaConf.create(record["config"]), key), key.partition(".")[0]
        if node is None:
            continue
        batch = record["config"][parent]["batch_size"]
        params = {k: v for k, v in node.params.items() if k != "max_steps"}
        found = record["stages"].get(name, {})
        images = found.get("steps", node.params.max_steps) * batch
        settings = ", ".join(f"{k} {v}" for k, v in params.items())
        rows.append(f"| {name} | {images:,} | {batch} | {settings} | {_hours(found.get('hours'))} |")
    return [*rows, "", "Seeds: 0 for the first stage and the order of the images, 1 for the UNet's weights."]


def data_text(node: Mapping[str, Any] | None) -> str:
    """A data set's node in words; of a data module its training set."""
    if not node:
        return "not recorded"
    params = node.get("params") or {}
    if "train" in params:
        return data_text(params["train"])
    listed = ", ".join(f"{k} `{v}`" for k, v in params.items())
    return f"`{node['target'].rpartition('.')[2]}`, {listed}"


def inverter_section(path: Path) -> list[str]:
    """Settings, log and figures of one inverter."""
    header = read_header(path)
    config, spec, note = header["featinv"]["config"], header["featinv"]["spec"], header.get("note") or {}
    log_path = path.with_suffix(".jsonl")
    log = read_log(log_path) if log_path.is_file() else []
    record = read_json(path.with_suffix(".json")) if path.with_suffix(".json").is_file() else {}
    training, last = config.get("training") or {}, log[-1] if log else note
    module = (training.get("module") or {}).get("params") or {}
    hours, drawing = record.get("hours"), config["inverter"].get("params") or {}
    rows = {
        "features": f"{spec['channels']} x {spec['height']} x {spec['width']} of `{spec['layer']}`, "
        f"{(config['backbone'].get('params') or {}).get('name', config['backbone']['target'])}",
        "inverter": config["inverter"]["target"].rpartition(".")[2],
        "data": data_text(config.get("data")),
        "image-steps": f"{last['images']:,}" if "images" in last else "not recorded",
        "batch": training.get("batch_size"),
        "settings": ", ".join(f"{k} {_short(v)}" for k, v in module.items()),
        "sampling": ", ".join(f"{k} {v}" for k, v in drawing.items() if k in ("sampler", "num_inference_steps")),
        "seed": training.get("seed"),
        "hours": _hours(hours if hours is not None else probed_hours(log)),
        "history": record.get("history") or "one run",
        "machine": record.get("machine", "not recorded"),
    }
    if lender := config.get("branch_of"):
        kind = "a lift to the features" if config.get("lift") else "an encoder in front of the branch"
        rows["inverter"] += f", {kind} of `{lender}`, which must be there"
    if config.get("lift"):
        rows["lift"] = _short(config["lift"])
    lines = [f"## Inverter `{path.parent.parent.name}/{path.stem}`", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()] + [""]
    if "share" in last:
        lines += [
            f"Last line of its log: share {last['share']:.3f}, cosine {last['cosine']:.3f} in its own layer (floor "
            f"{last['floor']:.3f}, ceiling {last['ceiling']:.3f}; share = (cosine - floor) / (ceiling - floor)).",
            "",
        ]
    return lines + (_evaluation_table(record["evaluation"]) if "evaluation" in record else [])


def _short(value: Any) -> str:
    """A setting; of a {target, params} node its class and parameters."""
    if not isinstance(value, dict):
        return str(value)
    params = ", ".join(f"{k} {v}" for k, v in (value.get("params") or {}).items())
    return f"{value['target'].rpartition('.')[2]} ({params})"


def _evaluation_table(found: Mapping[str, Any]) -> list[str]:
    features = found["meta"]["features"] or {}
    judged = f"judged in `{features.get('layer')}` of {features.get('network')}" if features else "judged as given"
    lines = [f"`eval.benchmark`, {found['meta']['images']} images, {judged}, 95 % intervals:", ""]
    lines += ["| | value | floor | ceiling |", "|---|---|---|---|"]
    for metric, figure in found["figures"].items():
        others = [_number(found[side].get(metric)) for side in ("floor", "ceiling")]
        lines.append(f"| {metric} | {_number(figure, bounds=True)} | {' | '.join(others)} |")
    return [*lines, ""]


def _number(figure: Mapping[str, Any] | None, bounds: bool = False) -> str:
    if not figure or figure.get("value") is None:
        return ""
    text = f"{figure['value']:.3f}"
    return f"{text} [{figure['low']:.3f}, {figure['high']:.3f}]" if bounds and figure.get("low") is not None else text


def limits(size: int, rendered: bool) -> list[str]:
    """What the weights are not for."""
    kind = "rendered scenes" if rendered else "photographs like those it was trained on"
    return [
        "## Limits",
        "",
        f"- Draws {size} x {size} pixels; other pictures are cropped and shrunk to that first.",
        f"- Knows {kind}; of other pictures it draws the nearest it knows.",
        "- Samples are draws: where the features leave room, what they show is invented. Compare several, and do not",
        "  take one for evidence of what a picture showed, least of all of who was in it.",
        "- An inverter reads the features of its own backbone, layer and input size only.",
        "- What a picture lacks may be lost in the features, in the prior or in the branch; floor and ceiling tell how",
        "  much is the first stage's, no figure here tells the other two apart.",
        "",
    ]


def licence(configs: Sequence[Mapping[str, Any] | None]) -> str:
    """The note that fits the data of the prior and of every inverter: their configurations, None if not recorded."""
    text = json.dumps(list(configs), default=str)
    if any(word in text for word in ("wnids", "ImageNetFolder", "PHOTOS_ROOT", "imagenet")):
        return IMAGENET
    # What training started from has seen pictures of its own.
    known = all(config and not config.get("start") and _rendered(config.get("data")) for config in configs)
    return RENDERED if known else UNKNOWN


def _rendered(node: Any) -> bool:
    """Whether a data set's node, of a data module its training set, is known to be of rendered scenes."""
    if not isinstance(node, Mapping):
        return False
    params = node.get("params") or {}
    if "train" in params:
        return _rendered(params["train"])
    package, _, name = str(node.get("target")).rpartition(".")
    return name == "ScenesDataset" and package.partition(".")[0] == "featinv"


def bundle_licence(bundle: Path) -> str:
    """The same, of the prior and the inverters of a bundle."""
    configs = [read_header(path)["featinv"]["config"] for path in bundle.glob("inverters/*.safetensors")]
    seen = [{"data": c.get("data"), "start": (c.get("training") or {}).get("start")} for c in configs]
    return licence([prior_record(bundle)["config"], *seen])


def write_card(bundle: Path) -> Path:
    """Write MODEL_CARD.md; atomically.

    Args:
        bundle: Folder with a prior, and inverters in `inverters`.

    Returns:
        The card.

    Raises:
        UserError: If the bundle has no prior or a damaged file.
    """
    size = read_json(bundle / "prior.json")["size"]
    paths = sorted(bundle.glob("inverters/*.safetensors"))
    note = bundle_licence(bundle)
    sizes = {name: bytes_ for name, bytes_ in bundle_files(bundle).items() if name != CARD}
    lines = [
        f"# {bundle.name}",
        "",
        f"A latent-diffusion prior of pictures of {size} px; inverters of features that draw with it: {len(paths)}. "
        f"Half precision, safetensors, {sum(sizes.values()) / 1e6:.1f} MB. "
        f"Written by `python -m tools.bundle card {bundle.name}`.",
        "",
        "```python",
        f'prior = featinv.load_prior("{bundle.name}")',
        *(f'inverter = featinv.load_inverter("{bundle.name}/{path.stem}")' for path in paths),
        "```",
        "",
        *prior_section(bundle),
        *(line for path in paths for line in inverter_section(path)),
        *limits(size, note == RENDERED),
        *("## Licence", "", note, ""),
        *("## Files", "", "| file | MB |", "|---|---|"),
        *(f"| {name} | {bytes_ / 1e6:.2f} |" for name, bytes_ in sizes.items()),
    ]
    write_text(bundle / CARD, "\n".join(lines) + "\n")
    return bundle / CARD
