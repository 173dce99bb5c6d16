"""How much faster our default is than the published way of working, on networks of the same size with random weights.

python -m eval.speed                      the paper's networks (859.5 M + 368.7 M parameters); about 15 GB of memory
python -m eval.speed --size small         small ones, to try it out
python -m eval.speed --batch 8 --repeats 3 --compile --out runs/speed8
python -m eval.speed --only sampling      without the training steps

reference  the published code's way: features one image at a time, first stage and text encoder in every step, fp32;
           sampling one image at a time, DDIM 50, two evaluations a step, the hint block in each
recompute  (--recompute) the reference's training with the published configuration's use_checkpoint: activations are
           computed again in the backward pass instead of kept
default    ours: latents and features from a cache, the prompts' embeddings kept, bf16 where the hardware has it,
           channels_last, fused AdamW, a weight average, freed memory kept (CPU); sampling in batches, the embedding
           once for each image, UniPC 6 (docs/results.md, "Sampling steps"), no guidance
light      ours with the branch that runs once per image (docs/recipe.md), in the few sampling steps that suffice after
           training with `SampleConsistency` (docs/results.md, "Sampling steps")

Each is measured in an interpreter of its own, one after the other. This is speed alone; how well each samples is the
business of eval.benchmark. Weights are random: they change no time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from eval.speed_ways import (
    OURS,
    default_sampling,
    default_training,
    networks,
    reference_sampling,
    reference_training,
    text_encoder,
)
from featinv.diffusion.architectures import ARCHITECTURES
from featinv.diffusion.convolution import convolve_plainly
from featinv.errors import UserError, exit_on_user_error
from featinv.files import given_path, write_json
from featinv.processes import keep_freed_memory, settled_objects
from featinv.training.costs import matmul_peak, peak_memory, reset_peak_memory
from featinv.training.precision import draw_in, fast_bfloat16, hasten


@dataclass(frozen=True)
class Figures:
    """What was measured of one way of working.

    Attributes:
        images_per_second: Of training steps, or drawn.
        share: Of the matrix-multiply peak in the same number format.
        gigabytes: Largest memory, weights and all.
    """

    images_per_second: float
    share: float
    gigabytes: float


@dataclass(frozen=True)
class Cost:
    """Seconds, floating-point operations and peak bytes of one piece of work."""

    seconds: float
    flops: float
    bytes: int

    def figures(self, images: int, peak: float) -> Figures:
        """Of work that handled `images` images, where the machine does `peak` operations a second."""
        return Figures(images / self.seconds, self.flops / self.seconds / peak, self.bytes / 1e9)


def measure(work: Callable[[], Any], repeats: int, device: torch.device) -> Cost:
    """Run `work` once to warm up and to count operations, then `repeats` times; the fastest counts."""
    reset_peak_memory(device)
    with FlopCounterMode(display=False) as counter:
        work()
    seconds = min(_seconds(work, device) for _ in range(repeats))
    return Cost(seconds, counter.get_total_flops(), peak_memory(device))


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def extrapolated(few: Cost, more: Cost, factor: float) -> Cost:
    """What `few` costs with `factor` times the work that `more` has beyond it."""
    # Where both take milliseconds, a busy machine can turn them round; work never takes less than none.
    seconds = max(more.seconds - few.seconds, 0.0)
    return Cost(few.seconds + factor * seconds, few.flops + factor * (more.flops - few.flops), more.bytes)


def measure_reference(
    size: str, batch: int, repeats: int, steps: int, device: torch.device, work: str, recompute: bool = False
) -> Cost:
    """Training or sampling of the reference; of its 50 sampling steps 1 and 1 + `steps` are run, the rest follows."""
    nets, text = networks("reference", size, batch, device), text_encoder(ARCHITECTURES[size].text_width, device)
    convolve_plainly(nets.inverter)
    if recompute:
        for part in (nets.inverter.unet.unet, nets.inverter.unet.branch):
            part.enable_gradient_checkpointing()  # type: ignore[operator]
    if work == "training":
        return measure(reference_training(nets, text), repeats, device)
    nets.inverter.requires_grad_(False)  # as a loaded one is
    few = measure(lambda: reference_sampling(nets, text, 1), repeats, device)
    more = measure(lambda: reference_sampling(nets, text, 1 + steps), repeats, device)
    return extrapolated(few, more, 49 / steps)


def measure_ours(
    size: str, batch: int, repeats: int, compiled: bool, device: torch.device, work: str, changes: Sequence[str]
) -> Cost:
    """Training or sampling in one of our ways."""
    keep_freed_memory()  # as our commands do
    nets = networks("convnext_base", size, batch, device, changes)
    if work == "training":
        hasten(nets.inverter, OmegaConf.create({"precision": "auto", "strategy": "auto", "compile": compiled}))
        with settled_objects():
            return measure(default_training(nets), repeats, device)
    nets.inverter.requires_grad_(False)
    if compiled:
        nets.inverter.compile_networks()
    draw_in(nets.inverter, "auto")
    return measure(lambda: default_sampling(nets), repeats, device)


def compare(
    size: str,
    batch: int,
    repeats: int,
    compiled: bool,
    reference_steps: int,
    only: str | None = None,
    recompute: bool = False,
) -> Iterator[tuple[str, Figures]]:
    """Measure every way, one after the other.

    Args:
        size: A key of `ARCHITECTURES`.
        batch: Images of a training step and of a batch of samples.
        repeats: Timed repetitions; the fastest counts.
        compiled: Whether ours goes through torch.compile.
        reference_steps: See `measure_reference`.
        only: "training" or "sampling".
        recompute: Whether the reference's training is measured that way, too.

    Yields:
        "reference training" and its figures, and so on, as they are measured: each work's reference first.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = torch.bfloat16 if fast_bfloat16() else torch.float32
    full_peak, half_peak = (matmul_peak(device, dtype) for dtype in (torch.float32, half))
    print(
        f"peak: {full_peak / 1e12:.3g} TFLOP/s in fp32, {half_peak / 1e12:.3g} in {half}, on {device.type}", flush=True
    )
    works = [only] if only else ["training", "sampling"]
    for work in works:
        cost = _alone(measure_reference, size, batch, repeats, reference_steps, device, work)
        yield f"reference {work}", cost.figures(batch if work == "training" else 1, full_peak)
        if recompute and work == "training":
            cost = _alone(measure_reference, size, batch, repeats, reference_steps, device, work, True)
            yield f"recompute {work}", cost.figures(batch, full_peak)
        for name, changes in OURS.items():
            cost = _alone(measure_ours, size, batch, repeats, compiled, device, work, changes)
            yield f"{name} {work}", cost.figures(batch, half_peak)


def _alone(measurement: Callable[..., Cost], *arguments: Any) -> Cost:
    """Measure in a new interpreter: what one way leaves in memory, or in the allocator, is not another's cost."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measurement, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(
                "a measurement's process was killed, most likely for want of memory; take a smaller --batch or --size."
            ) from error


@exit_on_user_error
def main() -> None:
    """Read the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(ARCHITECTURES), default="minisd")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--repeats",
        type=int,
        default=8,
        help="the fastest counts; a process's first training steps are slower",
    )
    parser.add_argument("--reference-steps", type=int, default=3, help="of the reference's 50 that are timed")
    parser.add_argument("--only", choices=["training", "sampling"], help="leave the other out")
    parser.add_argument("--recompute", action="store_true", help="also the reference with recomputed activations")
    parser.add_argument("--compile", action="store_true", help="torch.compile our networks")
    parser.add_argument("--out", type=given_path, default=Path("runs/speed"))
    args = parser.parse_args()
    print(f"{'':22s}{'images/s':>10s}{'ratio':>8s}{'of peak':>9s}{'memory':>10s}")
    found: dict[str, Figures] = {}
    ways = compare(args.size, args.batch, args.repeats, args.compile, args.reference_steps, args.only, args.recompute)
    for name, figures in ways:
        found[name] = figures
        ratio = figures.images_per_second / found[f"reference {name.split()[1]}"].images_per_second
        print(
            f"{name:22s}{figures.images_per_second:10.4g}{ratio:7.1f}x{figures.share:9.1%}{figures.gigabytes:7.2f} GB",
            flush=True,
        )
    about = {key: str(value) for key, value in vars(args).items()}
    write_json(args.out / "speed.json", {"about": about, "figures": {k: asdict(v) for k, v in found.items()}})


if __name__ == "__main__":
    main()
