"""The app in a browser: samples, posterior maps, steering, composites and methods side by side.

python -m tools.app                                    bundled inverters and those in runs/
python -m tools.app --inverter runs/scenes64 --port 8000
python -m tools.app --backbone resnet50 --pictures my_folder
"""

from __future__ import annotations

import argparse
import importlib.util

from featinv.errors import UserError, exit_on_user_error


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--inverter", action="append", default=[], help="bundled name, run's folder or file; repeat for more")
    add("--backbone", action="append", default=[], help="a further one, for the optimisation inverter; repeat for more")
    add("--port", type=int, default=7860)
    add("--share", action="store_true", help="also a public link: whoever has it uses this machine")
    add("--steps", type=int, default=200, help="of the optimisation inverter")
    add("--size", type=int, default=64, help="side of its pictures in pixels")
    add("--pictures", default=None, help="a folder in which concepts are found; rendered scenes if not given")
    add("--examples", type=int, default=300, help="how many of them")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Read the command line, serve until interrupted."""
    options = arguments(argv)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the app needs gradio; run make app, or pip install -r requirements-app.lock.")
    from featinv.report.app.layout import serve
    from featinv.report.app.models import Models, found_inverters
    from featinv.report.app.session import Session

    models = Models(
        options.inverter or found_inverters(),
        options.backbone,
        options.steps,
        options.size,
        options.examples,
        options.pictures,
    )
    page, address = serve(Session(models), options.port, options.share, wait=False)
    print(f"the app is at {address} (Ctrl-C ends it)")
    if page.share_url:
        print(f"and for everybody at {page.share_url}")
    page.block_thread()


if __name__ == "__main__":
    main()
