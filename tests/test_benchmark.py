"""Every row of the benchmark as data; the page is made from the committed results; a row runs by the real command."""

import json
import math
from pathlib import Path

import jax
import pytest

from experiments import benchmark, ratios, speed
from experiments.outcomes import RESULTS
from rotjax.errors import CheckpointError, RotjaxError, UsageError


def test_every_row_is_there():
    assert {row.name[0] for row in ratios.ROWS} == set("abcdefghijklm")
    assert len({row.name for row in ratios.ROWS}) == len(ratios.ROWS)


def test_the_committed_page_is_made_from_the_committed_results():
    assert benchmark.page(RESULTS / "benchmark") == (RESULTS / "performance.md").read_text()


def test_rows_are_chosen_by_letter_or_name():
    assert [row.name for row in benchmark.chosen("g,i")] == ["g-time", "g-flops", "i"]
    assert [row.name for row in benchmark.chosen("l-resnet18-512")] == ["l-resnet18-512"]
    with pytest.raises(UsageError, match="no row 'z'"):
        benchmark.chosen("a,z")


def test_a_folder_of_a_profile_that_cannot_be_made_is_told_before_anything_compiles(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "train_rate", None)
    with pytest.raises(CheckpointError, match="^cannot write in /proc/nothing"):
        benchmark.run(results=tmp_path, profile=Path("/proc/nothing/here"))


def test_a_row_is_measured_and_what_needs_a_gpu_is_not_made_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    benchmark.run("e,m", 2, tmp_path)
    (path,) = (tmp_path / "benchmark" / "cpu").iterdir()
    result = json.loads(path.read_text())
    assert path.name == "e.json" and len(result["ratios"]) == 2 and result["ours"] > result["theirs"] > 0
    assert "m                needs a GPU" in capsys.readouterr().out
    assert "| e | crop, flip and turn" in (tmp_path / "performance.md").read_text()


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, OSError, CheckpointError])
def test_a_row_that_fails_is_told_and_the_others_are_measured(tmp_path, capsys, monkeypatch, kind):
    def fails():
        raise kind("RESOURCE_EXHAUSTED: no memory\nand more")

    rows = (ratios.Row("x", "", 1.0, True, fails), ratios.Row("y", "", 1.0, True, lambda: (lambda: 2.0, lambda: 1.0)))
    monkeypatch.setattr(benchmark, "ROWS", rows)
    with pytest.raises(RotjaxError, match="rows x failed"):
        benchmark.run("", 1, tmp_path)
    assert "row x failed: RESOURCE_EXHAUSTED: no memory\n" in capsys.readouterr().err
    assert "| y | " in (tmp_path / "performance.md").read_text()


def test_without_its_peer_a_row_shows_rotjax_alone(tmp_path):
    row = ratios.Row("a", "rotjax / PyTorch", 1.0, True, lambda: (lambda: 5.0, None))
    result = benchmark.measure(row, 3)
    assert (result["ours"], result["theirs"], result["ratio"]) == (5.0, None, None)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "a.json").write_text(json.dumps(result))
    (tmp_path / "a-gpu").mkdir()  # whose rows failed
    page = benchmark.page(tmp_path)
    assert "| the other side needs torch | 5 images/s |  | " in page and "A-GPU" not in page


def test_without_its_peer_a_row_is_left_as_it_was_measured_with_it(tmp_path, capsys, monkeypatch):
    theirs = [lambda: 1.0, None]
    row = ratios.Row("y", "rotjax / PyTorch", 1.0, True, lambda: (lambda: 2.0, theirs.pop(0)))
    monkeypatch.setattr(benchmark, "ROWS", (row,))
    benchmark.run("", 1, tmp_path)
    before = (tmp_path / "benchmark" / "cpu" / "y.json").read_text()
    benchmark.run("", 1, tmp_path)
    assert (tmp_path / "benchmark" / "cpu" / "y.json").read_text() == before
    assert "is left as it was measured: the other side needs torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content"),
    [("cpu/j.json", "{"), ("tried.json", "["), ("tried.json", "[{}]"), ("cpu/j.json", json.dumps({"versions": {}}))]
    + [
        ("cpu/j.json", json.dumps(dict(ours=1, theirs=1, ratio=ratio, ratios=[], device="", versions=versions)))
        for ratio, versions in (("1", {"jax": "0"}), (1, {}))
    ],
)
def test_a_result_that_is_damaged_is_told_before_a_row_is_measured(tmp_path, monkeypatch, name, content):
    path = tmp_path / "benchmark" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    monkeypatch.setattr(benchmark, "measure", None)
    with pytest.raises(CheckpointError, match=f"^{path} "):
        benchmark.run("a", 1, tmp_path)


def test_the_median_is_that_of_the_ratios_of_each_turn():
    ours, theirs = iter([2.0, 30.0, 4.0]), iter([1.0, 10.0, 4.0])
    result = benchmark.measure(ratios.Row("x", "", 1.0, True, lambda: (lambda: next(ours), lambda: next(theirs))), 3)
    assert result["ratio"] == 2.0 and result["ratios"] == [2.0, 3.0, 1.0]


def test_the_compiled_step_of_the_last_block_has_fewer_operations():
    frozen, full = speed.frozen_and_full_flops()
    assert full and 0 < frozen() < 0.6 * full() < math.inf
