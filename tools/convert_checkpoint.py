"""Convert priors and inverters between the published code's checkpoints and diffusers' folders.

python -m tools.convert_checkpoint miniSD.ckpt --out priors/minisd               the prior, as diffusers' folders
python -m tools.convert_checkpoint featinv.ckpt --config featinv.yaml --backbone convnext_base --out runs/published
                                                                     the prior and the branch, for sample.py and eval/
python -m tools.convert_checkpoint priors/minisd --out minisd.safetensors         back: a prior, or a converted run
python -m tools.convert_checkpoint featinv.ckpt --check expected.safetensors      compare outputs with another program's
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from featinv.backbones import FeatureSpec, without_weights
from featinv.config import instantiate, load_config
from featinv.diffusion.ldm import LDM_SUFFIXES, export_config, export_ldm
from featinv.diffusion.prior import load_prior
from featinv.errors import UserError, exit_on_user_error
from featinv.files import given_path, load_safetensors, save_safetensors, write_text
from featinv.inverters.build import INVERTER_FILE, about, check_spec, load_inverter, save_inverter
from featinv.inverters.diffusion import DiffusionInverter
from featinv.inverters.ldm import export_inverter, import_ldm, parity


def to_folders(source: Path, config_path: Path | None, backbone: str | None, out: Path, half: bool) -> None:
    """Write an LDM checkpoint's prior, and with a backbone its branch as an inverter, into `out`."""
    dtype = torch.float16 if half else None
    if backbone is None:
        load_prior(source, config_path).save_pretrained(out, dtype)
        print(f"{out} holds the prior: use it as prior={out}")
        return
    config = load_config("reference", [f"backbone={backbone}"])
    inverter = import_ldm(source, config_path)
    spec = instantiate(without_weights(OmegaConf.to_container(config.backbone)), where="backbone").spec  # type: ignore[arg-type]
    encoder: Any = inverter.encoder
    check_spec(FeatureSpec(encoder.spec.channels, encoder.spec.height, encoder.spec.width, spec.layer), spec)
    inverter.prior.save_pretrained(out / "prior", dtype)
    config.prior = str((out / "prior").resolve())
    config.conditioning.params.hidden = encoder.conv1.out_channels
    config.inverter.params |= {"sampler": inverter.sampler, "num_inference_steps": inverter.num_inference_steps}
    config.inverter.params.guidance.params.scale = inverter.guidance.scale  # type: ignore[attr-defined]
    save_inverter(out / INVERTER_FILE, inverter, about(config, inverter, spec), dtype, {"source": source.name})  # type: ignore[arg-type]
    print(f"{out} holds the inverter: python sample.py inverter={out} image=PICTURE")


def to_ldm(source: Path, out: Path, half: bool) -> None:
    """Write a prior, or a run's inverter with its prior, as an LDM checkpoint with its YAML beside it."""
    if (source / INVERTER_FILE).is_file():
        inverter = load_inverter(source)
        if not isinstance(inverter, DiffusionInverter):
            raise UserError(f"{source} holds no diffusion inverter.")
        state, config = export_inverter(inverter), export_config(inverter.prior)
        spec: Any = inverter.encoder.spec
        config["control"] = {"feature_channels": spec.channels, "feature_size": [spec.height, spec.width]}
        config["schedule"] |= {"ddim_steps": inverter.num_inference_steps}
        config["schedule"] |= {"guidance_scale": getattr(inverter.guidance, "scale", 1.0)}
    else:
        prior = load_prior(source)
        state, config = export_ldm(prior), export_config(prior)
    schedule = ("betas", "alphas_cumprod")
    save_safetensors(out, {k: v.half() if half and k not in schedule else v for k, v in state.items()})
    write_text(out.with_suffix(".yaml"), OmegaConf.to_yaml(OmegaConf.create(config)))
    print(f"{out} and {out.with_suffix('.yaml')} are written, without the text encoder")


def check(source: Path, config_path: Path | None, expected: Path) -> None:
    """Print how far our outputs are from those in `expected` (see `featinv.inverters.ldm.parity`)."""
    for name, difference in parity(import_ldm(source, config_path), load_safetensors(expected)[0]).items():
        print(f"{name:32s} {difference:.1e}")


@exit_on_user_error
def main() -> None:
    """Read the command line, convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=given_path, help="an LDM checkpoint, a prior's folder or name, or a run's folder"
    )
    parser.add_argument("--config", type=given_path, help="the LDM checkpoint's YAML, if it does not lie beside it")
    parser.add_argument("--backbone", help="a name in configs/backbone: convert the branch, too")
    parser.add_argument("--out", type=given_path, help="a folder, or a .safetensors file to write an LDM checkpoint")
    parser.add_argument("--half", action="store_true", help="round the weights to half precision")
    parser.add_argument(
        "--check", type=given_path, metavar="EXPECTED", help="a .safetensors file of inputs and outputs"
    )
    args = parser.parse_args()
    if (args.out is None) == (args.check is None):
        raise UserError("say either where to write (--out) or what to compare with (--check).")
    if args.check is not None:
        check(args.source, args.config, args.check)
    elif args.source.suffix in LDM_SUFFIXES and not args.source.exists():
        raise UserError(f"there is no file {args.source}.")
    elif args.source.is_file() and args.source.suffix in LDM_SUFFIXES:
        to_folders(args.source, args.config, args.backbone, args.out, args.half)
    elif args.out.suffix == ".safetensors":
        to_ldm(args.source, args.out, args.half)
    else:
        raise UserError(f"{args.source} is in diffusers' layout already; --out must then be a .safetensors file.")


if __name__ == "__main__":
    main()
