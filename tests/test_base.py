import ast
import errno
import os
from pathlib import Path

import pytest
import torch
import yaml
from forks import in_a_process
from omegaconf import OmegaConf

from featinv.checkpoint import load_checkpoint, save_checkpoint
from featinv.cli import parse_command_line
from featinv.config import check_params, instantiate, listed, load_config, resolve_target
from featinv.errors import UserError
from featinv.files import atomic_write, load_safetensors, read_json, read_state, run_lock, write_text
from featinv.image import load_png, make_grid, save_png, seeded_noise
from tools import train_prior

ROOT = Path(__file__).parents[1]
BASE = ("errors", "config", "image", "checkpoint", "files", "processes")
ROOMS = ("data", "backbones", "conditioning", "diffusion", "inverters", "metrics", "training", "attribution")
ROOMS += ("applications", "report")


def test_a_room_imports_only_from_rooms_above_it() -> None:
    for path in (ROOT / "featinv").rglob("*.py"):
        own = path.relative_to(ROOT / "featinv").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom | ast.Import):
                continue
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for name in names:
                if not name.startswith("featinv."):
                    assert name.split(".")[0] not in ("eval", "tools", "train", "sample"), (path, name)
                    continue
                other = name.split(".")[1]
                if other in BASE:
                    continue
                assert own in ROOMS, f"{path}: a base module imports the room {other}"
                assert ROOMS.index(other) <= ROOMS.index(own), f"{path} imports {other}, which is below it"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_is_locked_for_one_process(tmp_path) -> None:
    def enter() -> None:
        with run_lock(tmp_path):
            pass

    def enter_in_vain() -> None:
        with pytest.raises(UserError, match="another process"):
            enter()

    with run_lock(tmp_path):
        in_a_process(enter_in_vain)
    in_a_process(enter)


def test_checkpoint_holds_nested_structures_and_never_code(tmp_path) -> None:
    tree = {"state": {0: {"exp": torch.randn(3), "step": 2}}, "list": [1, (2.5, None)], "name": "x", "on": True}
    save_checkpoint(tmp_path / "c.safetensors", tree)
    again = load_checkpoint(tmp_path / "c.safetensors")
    assert torch.equal(again["state"][0].pop("exp"), tree["state"][0].pop("exp")) and again == tree
    whole = torch.arange(6.0).view(2, 3)
    save_checkpoint(tmp_path / "c.safetensors", {"a": whole, "b": whole, "row": whole[1], "turned": whole.T})
    again = load_checkpoint(tmp_path / "c.safetensors")
    assert torch.equal(again["a"], again["b"]) and torch.equal(again["row"], whole[1])
    assert torch.equal(again["turned"], whole.T)
    dotted = {"model": {"x.y": torch.zeros(1)}, "model.x": {"y": torch.ones(1)}}
    save_checkpoint(tmp_path / "c.safetensors", dotted)
    assert load_checkpoint(tmp_path / "c.safetensors") == dotted
    with pytest.raises(UserError, match="cannot hold"):
        save_checkpoint(tmp_path / "d.safetensors", {"f": print})


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04\x95"])
def test_damaged_checkpoints_are_refused(tmp_path, content: bytes) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_safetensors(path)
    with pytest.raises(UserError, match="no file"):
        load_checkpoint(tmp_path / "absent.safetensors")


def test_png_round_trip_is_lossless_and_damage_is_named(tmp_path) -> None:
    image = torch.randint(0, 256, (3, 7, 5)).float() / 255
    save_png(tmp_path / "a.png", image)
    assert torch.allclose(load_png(tmp_path / "a.png"), image, atol=1e-6)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(UserError, match="a.png"):
        load_png(tmp_path / "a.png")


def test_grid_places_every_picture() -> None:
    rows = [torch.full((2, 3, 4, 4), 0.2), torch.full((3, 3, 4, 4), 0.7)]
    grid = make_grid(rows, labels=["a", "b"], scale=2, pad=1, label_width=30)
    assert grid.shape == (3, 18, 30 + 27)
    assert grid[0, 3, 31] == pytest.approx(0.2) and grid[0, 12, 30 + 20] == pytest.approx(0.7)


def test_a_long_label_is_not_cut() -> None:
    rows = [torch.zeros(1, 3, 16, 16)]
    short, long = (make_grid(rows, labels=[text], label_width=30) for text in ("a", "deviation of features" * 2))
    assert short.shape[2] == 30 + 2 * 16 + 2
    label = long[:, :, : long.shape[2] - 34]
    assert label[..., -2:].min() == 1 and label[..., -12:].min() < 0.5  # ends in paper, right after ink


def test_noise_is_per_seed() -> None:
    noise = seeded_noise([4, 5, 4], (2, 3))
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1:2], seeded_noise([5], (2, 3)))


def test_instantiate_builds_nested_nodes_and_names_mistakes() -> None:
    guidance = {"target": "featinv.diffusion.guidance.ClassifierFreeGuidance", "params": {"scale": 2}}
    assert instantiate(guidance).scale == 2
    with pytest.raises(UserError, match=r"params.scal is unknown: did you mean scale"):
        instantiate({**guidance, "params": {"scal": 2}})
    with pytest.raises(UserError, match="has no 'ClassifierFreeGuidanc'"):
        instantiate({"target": guidance["target"][:-1]})
    with pytest.raises(UserError, match="derived"):
        instantiate(guidance, scale=3)
    whitening = "featinv.conditioning.encoders.Whitening"
    with pytest.raises(UserError, match="components is missing"):
        instantiate({"target": whitening, "params": {"channels": 3}})


def test_experiments_compose_and_overrides_are_checked(tmp_path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("defaults: [data/scenes]\ndata: {params: {batch_size: 7}}\ntraining: {max_steps: 5}\n")
    config = load_config(path, ["training.max_steps=9"])
    assert config.data.params.batch_size == 7 and config.training.max_steps == 9
    assert config.data.params.train.target.endswith("ScenesDataset")
    assert load_config(path, ["data=cifar10"]).data.params.train.target.endswith("CIFAR10")
    with pytest.raises(UserError, match="did you mean training.max_steps"):
        load_config(path, ["training.max_step=9"])
    with pytest.raises(UserError, match="did you mean scenes"):
        load_config(path, ["data=scene"])
    with pytest.raises(UserError, match="key=value"):
        load_config(path, ["max_steps"])


def test_an_override_replaces_nodes_merges_mappings_and_makes_lists_of_words(tmp_path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("judge: {target: a.B, params: {name: x, size: 3}}\nlimits: {a: 1, b: 2}\nrows: [one]\n")
    config = load_config(path, ["judge={target: c.D, params: {name: y}}", "limits={b: 5}", "rows=runs/photos"])
    assert config == {
        "judge": {"target": "c.D", "params": {"name": "y"}},
        "limits": {"a": 1, "b": 5},
        "rows": ["runs/photos"],
    }
    emptied = load_config(path, ["limits={}", "rows=[]", "judge=null"])
    assert emptied == {"judge": None, "limits": {}, "rows": []} and load_config(path, ["rows=null"]).rows is None
    assert [listed(x) for x in (None, "final", 3, ("a", "b"))] == [[], ["final"], [3], ["a", "b"]]


def test_a_variable_that_is_not_set_is_named(tmp_path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("data: {target: featinv.data.cifar.CIFAR10, params: {root: '${oc.env:NO_SUCH_PLACE}'}}\n")
    with pytest.raises(UserError, match="data: .*'NO_SUCH_PLACE' not found"):
        instantiate(load_config(path).data, where="data")
    with pytest.raises(UserError, match="unknown key 'dat.params.root': did you mean data.params.root"):
        load_config(path, ["dat.params.root=x"])


@pytest.mark.parametrize("value", ["a: b", "[x", "*.tar", "{000..003}.tar", "@x", "[2024] holiday.jpg", "my photos #1"])
def test_a_value_that_yaml_reads_otherwise_is_named(tmp_path, value: str) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("root: null\n")
    with pytest.raises(UserError, match="root="):
        load_config(path, [f"root={value}"])
    assert load_config(path, [f'root="{value}"']).root == value


@pytest.mark.parametrize("content", ["a: [", "a: 1\na: 2", "- a", "defaults: [data/scenes, experiment/demo]"])
def test_a_broken_experiment_is_named(tmp_path, content: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match="mine.yaml"):
        load_config(path)
    path.write_text(f"defaults: [experiment/{path}]")
    with pytest.raises(UserError, match="another experiment"):
        load_config(path)


def test_flags_are_checked_and_help_has_three_spellings(capsys) -> None:
    for word in ("-dry-run", "--dry_run", "-v"):
        with pytest.raises(UserError, match=f"unknown flag {word}"):
            parse_command_line("", "demo", {"dry-run": ""}, [word])
    for word in ("help", "-h", "--help"):
        with pytest.raises(SystemExit):
            parse_command_line("what it does", "demo", None, [word])
        assert "what it does" in capsys.readouterr().out


def test_words_that_name_files_may_start_at_home(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("defaults: [experiment/demo]\ntraining: {max_steps: 7}\n")
    command = parse_command_line("", "demo", None, ["experiment=~/mine.yaml", "out=~/runs"])
    assert command.out == tmp_path / "runs" and command.config.training.max_steps == 7 and command.name == "mine"
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    save_checkpoint(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    write_text(tmp_path / "a.json", "[1]")
    assert list(read_state("~/a.pth")) == ["a"] and read_state("~/a.safetensors") and read_json("~/a.json") == [1]


def test_an_empty_out_is_refused_and_home_is_no_folder_of_that_name(monkeypatch, tmp_path, capsys) -> None:
    """`out=$NOWHERE` of a shell would otherwise be the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match="out= names no folder"):
        parse_command_line("", "demo", None, ["out="])
    for word, message in (("out=", "out= names no folder"), ("out=~/x", "cannot write into")):
        (tmp_path / "home").write_text("a file, so that the run ends where it would begin")
        monkeypatch.setattr("sys.argv", ["train_prior", "scenes64", word])
        with pytest.raises(SystemExit, match="2"):
            train_prior.main()
        assert message in capsys.readouterr().err and os.listdir() == ["home"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_nothing_can_be_locked_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, caplog, number) -> None:
    def flock(*_) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("featinv.files.fcntl.flock", flock)
    for wait in (False, True):
        caplog.clear()
        with run_lock(tmp_path, wait):
            write_text(tmp_path / "a.txt", "whole")
        assert f"{tmp_path} cannot be locked ({os.strerror(number)})" in caplog.text


def test_a_folder_that_cannot_be_written_into_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "beneath"):
        with pytest.raises(UserError, match="cannot write into"), run_lock(folder):
            pass


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_what_is_no_state_dict_is_named(tmp_path, content) -> None:
    if content is None:
        torch.save([torch.zeros(1)], tmp_path / "a.pth")
    else:
        (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pth"):
        read_state(tmp_path / "a.pth")


def test_mistakes_about_the_default_backbone_are_named() -> None:
    node = {"target": "featinv.backbones.bundled.bundled_backbone", "params": {"name": "mobilenetv3"}}
    with pytest.raises(UserError, match="mobilenetv2"):
        instantiate(node)
    with pytest.raises(UserError, match="did you mean input_size"):
        instantiate({**node, "params": {"name": "mobilenetv2", "inputsize": 64}})


def _nodes(content):
    if isinstance(content, dict):
        if "target" in content:
            yield content
        for value in content.values():
            yield from _nodes(value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_config_names_real_constructors_and_parameters(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    if path.parent.name == "experiment":
        content = OmegaConf.to_container(load_config(path.stem))
    nodes = list(_nodes(content))
    assert nodes or path.parent.name == "configs"  # a task of eval or tools may have only plain keys
    for node in nodes:
        check_params(resolve_target(node["target"]), list(node.get("params") or {}), str(path))
