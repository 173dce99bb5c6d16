import torch

from featinv.cli import parse_command_line
from featinv.report.benchmark import table_rows, write_tables
from featinv.report.page import figure_table, figure_text, picture_table, write_page


def _figure(value, low=None, high=None):
    return {"value": value, "low": low, "high": high, "n": 3}


def test_a_page_holds_its_pictures_and_escapes_its_text(tmp_path) -> None:
    rows = {
        "<original>": torch.rand(2, 3, 4, 4),
        "other": torch.stack([torch.rand(3, 4, 4), torch.full((3, 4, 4), torch.nan)]),
    }
    write_page(tmp_path / "page.html", "a & b", [("pictures", picture_table(rows))])
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 3  # a NaN picture stays blank
    assert "<original>" not in page and "a &amp; b" in page and 'src="http' not in page


def test_figures_are_shown_with_intervals_and_gaps() -> None:
    assert figure_text(None) == figure_text(_figure(None)) == "–"
    assert figure_text(_figure(0.5)) == "0.500" and "[0.400, 0.600]" in figure_text(_figure(0.5, 0.4, 0.6))
    table = figure_table({"a": {"psnr": _figure(20.0)}}, ["psnr", "kid_mobilenetv2"])
    assert "kid_mobilenetv2&nbsp;↓" in table and "psnr&nbsp;↓" not in table


def test_tables_hold_every_row(tmp_path) -> None:
    content = {
        "floor": {"cosine": _figure(0.3)},
        "ceiling": {"cosine": _figure(0.9)},
        "inverters": {"x": {"cosine": _figure(0.6)}},
    }
    write_tables(tmp_path, content)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(table_rows(content)) and lines[-1] == "| x | 0.600 | 3 |"
    assert (tmp_path / "table.csv").read_text().count("\n") == 4


def test_out_is_taken_from_the_command_line() -> None:
    command = parse_command_line("", "scenes64", {"dry-run": ""}, ["out=a/b", "training.max_steps=3", "--dry-run"])
    assert str(command.out) == "a/b" and command.config.training.max_steps == 3 and "dry-run" in command.flags
