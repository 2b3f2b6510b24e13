"""The README's Python runs as it stands, and its numbers are those of the runs that it names."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

import rotjax
from experiments import outcomes

ROOT = Path(__file__).parents[1]


def test_every_number_of_the_table_is_that_of_committed_runs():
    rows = re.findall(
        r"^\| \w+ \|.*\| ([\d.± ]+) \| (\d+) \| (\d+) \| \[.*\]\((.*)\) \|$",
        (ROOT / "README.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) == 17
    known = {one.name: one for one in outcomes.load(outcomes.RESULTS)}
    for accuracy, seeds, epochs, path in rows:
        assert (ROOT / path).is_file()
        first = known[Path(path).stem]
        group = [one for one in known.values() if one.key == first.key]
        said = (outcomes.mean_and_spread([one.score for one in group]), str(len(group)), str(first.summary["epochs"]))
        assert (accuracy, seeds, epochs) == said


def test_the_numbers_of_the_first_command_are_those_of_its_summary():
    summary = json.loads((outcomes.RESULTS / "digits.json").read_text())
    text = " ".join((ROOT / "README.md").read_text().split())
    seconds = f"{summary['wall_seconds']:.0f} seconds of training"
    assert f"ends with {outcomes.accuracy(summary):.1f} % of the turns right, after {seconds}" in text


def test_every_number_of_a_control_is_that_of_its_result():
    text, controls = (ROOT / "README.md").read_text(), outcomes.controls(outcomes.RESULTS)
    said = re.findall(r"([\d.]+) \(`python -m experiments.control --run=(\S+)`\)", text)
    assert said and said == [(f"{outcomes.accuracy(controls[name]['summary']):.2f}", name) for _, name in said]


def test_what_pretraining_is_worth_is_the_difference_of_the_tables_rows():
    text = " ".join((ROOT / "README.md").read_text().split())
    scores = {}
    for one in outcomes.load(outcomes.RESULTS):
        scores.setdefault(one.name.rsplit("-seed")[0], []).append(one.score)
    pairs = ("4-full-20", "4-scratch-20"), ("3a", "3b"), ("S3a", "S3b")
    few, all_, today = (
        statistics.mean(scores[f"{one}-classification"]) - statistics.mean(scores[f"{other}-classification"])
        for one, other in pairs
    )
    assert f"worth {few:.1f} points with 20 labels a class and {all_:.1f} with all 5,000" in text
    assert f"by today's, with all of them, {today:.1f}." in text


def blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_loop_trains_on_the_callers_own_arrays():
    code, _ = blocks()
    rng = np.random.default_rng(0)
    images = np.linspace(0, 200, 32).astype(np.uint8).repeat(32).reshape(1, 32, 32, 1) + rng.integers(
        0, 40, (64, 32, 32, 3), dtype=np.uint8
    )
    assert 'stem="cifar"' in code
    names: dict[str, Any] = {"images": images, "labels": np.arange(64, dtype=np.int32) % 2}
    exec(code.replace('stem="cifar"', 'stem="cifar", width=4'), names)
    turned = rotjax.train_batches(names["data"], rotjax.random_turn, 64, 1, seed=1)[0]
    guessed = rotjax.probabilities(names["pretext"], names["rotations"], turned["image"]).argmax(-1)
    assert (guessed == turned["label"]).mean() > 0.5  # a ramp shows which way is up
    jax.tree.map(
        np.testing.assert_array_equal,
        rotjax.part(names["grafted"], "backbone"),
        rotjax.part(names["rotations"], "backbone"),
    )
    assert names["classes"]["params"]["head"]["kernel"].shape[-1] == 10


def test_a_whole_run_in_python_is_as_it_says(tmp_path):
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "photo.png")
    names: dict[str, Any] = {"rotjax": rotjax, "workdir": tmp_path / "run", "paths": [tmp_path / "photo.png"] * 3}
    _, code = blocks()
    assert 'dataset="digits"' in code
    code = code.replace('dataset="digits"', 'dataset="digits", width=4, epochs=1, max_steps=2')
    shown = code.replace("rotjax.probabilities", "made = rotjax.probabilities").replace(
        "rotjax.features", "maps = rotjax.features"
    )
    exec(shown, names)
    assert names["made"].shape == (3, len(names["recipe"].classes))
    assert list(names["maps"]) == ["stem", "stage1", "stage2", "stage3", "stage4"]
