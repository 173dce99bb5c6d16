"""What survives with depth: curves over layers from finished benchmarks, one figure, with intervals.

python -m eval.benchmark inverters=[retrieval@blocks.1,retrieval@blocks.4,retrieval@final] setting=scenes64 out=runs/r
python -m eval.layers benchmarks=[runs/r,runs/branches] out=runs/layers

Every row of every benchmark is a point at the depth of its layer; rows of one inverter on one network make a curve.
Writes layers.png, layers.csv and report.html.
"""

from __future__ import annotations

from pathlib import Path

from featinv.cli import parse_command_line
from featinv.config import CONFIG_ROOT, listed
from featinv.errors import exit_on_user_error
from featinv.files import read_json
from featinv.report.layers import layer_points, write_layers


@exit_on_user_error
def main() -> None:
    """Read the command line, draw."""
    command = parse_command_line(__doc__ or "", str(CONFIG_ROOT / "layers.yaml"))
    config, out = command.config, command.out or Path("runs/layers")
    points = [p for folder in config.benchmarks for p in layer_points(read_json(Path(folder) / "metrics.json"))]
    write_layers(out, points, listed(config.metrics) or None, config.title)
    print((out / "layers.csv").read_text())
    print(f"layers.png, layers.csv and report.html are in {out}")


if __name__ == "__main__":
    main()
