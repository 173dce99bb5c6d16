"""Quality against sampling steps, and against training images: curves.png, curves.json, report.html.

python -m eval.curves                                                    the bundled branch, and its training
python -m eval.curves inverter=runs/photos64 steps=[2,5,10,20,50] n=500 out=runs/curves
python -m eval.curves inverter=null runs=[runs/photos64,runs/photos64_pooled]                  training alone

Sampling steps: a benchmark in OUT/steps (see eval.benchmark), one row for each number of steps, the same images and
seeds. Training: the share of held-out images by each run's own log. Interrupted, or called with more steps, the same
command makes what is missing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from eval.benchmark import build_benchmark, load_all, matched_contestant, shared_setting, trained_contestant
from featinv.applications.matching import split_name
from featinv.cli import parse_command_line
from featinv.config import CONFIG_ROOT, listed
from featinv.errors import UserError, exit_on_user_error
from featinv.files import given_path
from featinv.inverters.build import find_inverter
from featinv.inverters.diffusion import DiffusionInverter
from featinv.metrics.benchmark import Contestant
from featinv.metrics.names import distinct
from featinv.processes import own_device, process_group, process_rank
from featinv.report.curves import read_log, row_name, write_curves


def with_steps(inverter: DiffusionInverter, steps: int) -> DiffusionInverter:
    """The inverter with so many sampling steps: a shallow copy, which shares every weight."""
    other = copy.copy(inverter)
    other.num_inference_steps = steps
    return other


def step_rows(name: str, row: Contestant, steps: Sequence[int]) -> dict[str, Contestant]:
    """One row for each number of sampling steps.

    Raises:
        UserError: If the inverter has no sampling steps, or a number makes no sense.
    """
    inverter = row.inverter
    if not isinstance(inverter, DiffusionInverter):
        raise UserError(
            f"{name} is a {type(inverter).__name__}, which has no sampling steps; give a diffusion inverter."
        )
    most = inverter.prior.scheduler.config.num_train_timesteps
    if not steps or len(set(steps)) < len(steps) or not all(isinstance(k, int) and 1 <= k <= most for k in steps):
        raise UserError(f"steps must be different whole numbers from 1 to {most}, not {list(steps)}.")
    about = {**row.about, "sampler": inverter.sampler}
    return {
        row_name(k): Contestant(with_steps(inverter, k), None, {**about, "num_inference_steps": k}, row.backbone)
        for k in steps
    }


def measure_steps(config: DictConfig, out: Path) -> dict[str, Any]:
    """The benchmark over numbers of sampling steps.

    Returns:
        The content of its metrics.json.
    """
    device = own_device()
    loaded = load_all([config.inverter])
    setting = shared_setting(None, loaded, device)
    trained = loaded[config.inverter]
    assert trained is not None  # else there is no setting
    row = trained_contestant(config.inverter, trained, setting, None, {})
    rows = step_rows(config.inverter, row, list(config.steps))
    rows = {name: matched_contestant(config.inverter, each, setting, {}) for name, each in rows.items()}
    return build_benchmark(config, setting, out / "steps", device).run(rows)


def log_of(name: str) -> Path:
    """The probe log of a run's folder, a .jsonl file or a bundled inverter."""
    path = given_path(name)
    if path.suffix == ".jsonl" or path.is_dir():
        return path / "probe.jsonl" if path.is_dir() else path
    return find_inverter(split_name(name)[0]).with_suffix(".jsonl")


def chosen_logs(config: DictConfig) -> list[str]:
    """The runs that are asked for; if none are, the inverter itself where it has a log."""
    if config.runs is not None or config.inverter is None:
        return listed(config.runs)
    return [config.inverter] if log_of(config.inverter).is_file() else []


@exit_on_user_error
def main() -> None:
    """Read the command line, measure, draw."""
    command = parse_command_line(__doc__ or "", str(CONFIG_ROOT / "curves.yaml"))
    config, out = command.config, command.out or Path("runs/curves")
    runs = distinct({name: name.strip("/").removeprefix("runs/") for name in chosen_logs(config)})
    logs = {run: read_log(log_of(name)) for name, run in runs.items()}
    with process_group():
        content = measure_steps(config, out) if config.inverter is not None else None
        if process_rank()[0] == 0:
            title = f"Quality of {config.inverter}" if content else "Quality over training"
            write_curves(out, content, logs, title, listed(config.metrics) or None)
            print(f"curves.png, curves.json and report.html are in {out}")


if __name__ == "__main__":
    main()
