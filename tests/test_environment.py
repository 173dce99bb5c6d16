import ast
import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_lock_pins_every_requirement_within_its_bounds() -> None:
    pins = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split() if "==" in line)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_the_apps_lock_fits_the_project_and_replaces_one_pin_of_the_main_lock() -> None:
    def pins(name: str) -> dict[str, str]:
        lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
        return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if line}

    own, main = pins("requirements-app.lock"), pins("requirements.lock")
    assert {name for name in own.keys() & main.keys() if own[name] != main[name]} == {"pillow"}
    (gradio,) = map(Requirement, PROJECT["optional-dependencies"]["app"])
    assert own["gradio"] in gradio.specifier
    bounds = {canonicalize_name(r.name): r.specifier for r in map(Requirement, PROJECT["dependencies"])}
    assert own["pillow"] in bounds["pillow"]


def test_conda_environment_agrees_with_the_project() -> None:
    entries = yaml.safe_load((ROOT / "environment.yaml").read_text())["dependencies"]
    (python,) = [e for e in entries if isinstance(e, str) and re.match(r"python=", e)]
    assert python.split("=")[1] in SpecifierSet(PROJECT["requires-python"])
    (pip,) = [e["pip"] for e in entries if isinstance(e, dict)]
    assert pip == ["-r requirements.lock", "-e ."]


def test_every_third_party_import_is_required() -> None:
    names = {
        "pytorch_lightning": "pytorch-lightning",
        "PIL": "pillow",
        "yaml": "pyyaml",
        "skimage": "scikit-image",
        "sklearn": "scikit-learn",
        "open_clip": "open_clip_torch",
    }
    optional = PROJECT["optional-dependencies"]["app"]
    required = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"] + optional}
    found = set()
    for path in (ROOT / "featinv").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    import sys

    third = {n for n in found if n not in sys.stdlib_module_names and n != "featinv"}
    assert {canonicalize_name(names.get(n, n)) for n in third} <= required
