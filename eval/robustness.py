"""Inversion under corruptions, attacks and foreign pictures: robustness.json, table.md, curves.png, report.html.

python -m eval.robustness inverter=runs/convnext_base n=50
python -m eval.robustness inverter=retrieval setting=scenes64 corruptions=[gaussian_noise,fog] severities=[1,3,5]

Each condition compares the reconstruction with the picture whose features were given and with the clean one, and these
two with each other. Interrupted, the same command makes the rest; torchrun shares the work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

from eval.benchmark import chosen_data, contestants, load_all, shared_setting
from featinv.attribution.adversarial import fgsm, pgd
from featinv.attribution.transfer import predict
from featinv.backbones.base import Backbone
from featinv.cli import parse_command_line
from featinv.config import CONFIG_ROOT, instantiate, listed, nearest
from featinv.data.corruptions import CORRUPTIONS, corrupt
from featinv.data.outliers import OUTLIERS, outlier, sketch
from featinv.data.scenes import ScenesDataset
from featinv.errors import UserError, exit_on_user_error
from featinv.metrics.collection import class_count, classes_needed
from featinv.metrics.robustness import Condition, Robustness
from featinv.metrics.views import classifies
from featinv.processes import own_device, process_group, process_rank
from featinv.report.robustness import write_robustness

ATTACKS: dict[str, Callable[..., Tensor]] = {"fgsm": fgsm, "pgd": pgd}


def corruption(name: str, severity: int, seed: int) -> Condition:
    """A corruption of ImageNet-C."""

    def picture(index: int, clean: Tensor) -> Tensor:
        return corrupt(clean, name, severity, seed + index)

    return Condition(f"{name}-{severity}", "corruption", picture, severity)


def attack(name: str, eps: float, backbone: Backbone) -> Condition:
    """An adversarial picture that leads the backbone away from what it sees in the clean one."""
    if name not in ATTACKS:
        raise UserError(f"no attack {name!r}: {nearest(name, list(ATTACKS))}")

    def picture(index: int, clean: Tensor) -> Tensor:
        return ATTACKS[name](backbone, clean[None], predict(backbone, clean[None]), eps=eps / 255)[0].cpu()

    return Condition(f"{name}-{eps:g}of255", "attack", picture)


def foreign(name: str, size: int) -> Condition:
    """A set of pictures of another kind; sketches are drawn after the clean ones."""
    if name == "sketches":
        return Condition(name, "ood", lambda _index, clean: sketch(clean))
    return Condition(name, "ood", lambda index, _clean: outlier(name, index, size), has_clean=False)


def chosen_conditions(config: DictConfig, backbone: Backbone, size: int, scenes: bool) -> list[Condition]:
    """What the command line asks for, the clean pictures first; no attack on a backbone without a classifier."""
    corruptions = list(CORRUPTIONS) if config.corruptions is None else listed(config.corruptions)
    attacks = config.attacks if classifies(backbone) else []
    own = "scenes" if scenes else "photos"
    sets = [*(n for n in OUTLIERS if n != own), "sketches"] if config.ood is None else listed(config.ood)
    return [
        Condition("clean", "clean", lambda _index, clean: clean),
        *(corruption(name, severity, config.seed) for name in corruptions for severity in config.severities),
        *(attack(name, eps, backbone) for name in attacks for eps in config.eps),
        *(foreign(name, size) for name in sets),
    ]


def left_out(config: DictConfig, backbone: Backbone, referee: Backbone | None) -> list[str]:
    """What is not measured, and why."""
    found = ["frost (pastes photographs of frost, which are not here)"] if config.corruptions is None else []
    classes = class_count(backbone)
    if classes == 0:
        found.append(f"{', '.join(['class agreement', *config.attacks])} (the backbone has no classifier)")
    elif classes < classes_needed("top5_agreement"):
        found.append(f"top5_agreement (the backbone has too few classes, {classes})")
    if referee is not None and not classifies(referee):
        found.append("the referee's class agreement (it has no classifier)")
    return found


@exit_on_user_error
def main() -> None:
    """Read the command line, evaluate, print the table."""
    command = parse_command_line(__doc__ or "", str(CONFIG_ROOT / "robustness.yaml"))
    config, out = command.config, command.out or Path("runs/robustness")
    device = own_device()
    with process_group():
        loaded = load_all([config.inverter])
        setting = shared_setting(config.setting, loaded, device)
        ((name, row),) = contestants(loaded, setting, config).items()
        backbone = row.backbone or setting.backbone
        data = chosen_data(config, setting)
        conditions = chosen_conditions(config, backbone, setting.size, isinstance(data.dataset, ScenesDataset))
        referee = instantiate(config.referee, where="referee").to(device) if config.referee else None
        robustness = Robustness(
            row.inverter,
            backbone,
            data,
            out,
            referee=referee,
            seed=config.seed,
            batch_size=config.batch_size,
            about=row.about,
        )
        skipped = left_out(config, backbone, referee)
        content = robustness.run(conditions, {"inverter": name, "layer": backbone.layer, "skipped": skipped})
        if process_rank()[0] == 0:
            write_robustness(out, content, f"Robustness of {name}")
            print((out / "table.md").read_text())
            print(f"robustness.json, table.md, curves.png and report.html are in {out}")


if __name__ == "__main__":
    main()
