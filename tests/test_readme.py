"""The README's Python runs as it stands, and its numbers are those of the runs that it names."""

import json
import re
from pathlib import Path

import jax
import numpy as np

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


def test_the_ten_lines_train_on_the_callers_own_arrays():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    rng = np.random.default_rng(0)
    images = np.linspace(0, 200, 32).astype(np.uint8).repeat(32).reshape(1, 32, 32, 1) + rng.integers(
        0, 40, (64, 32, 32, 3), dtype=np.uint8
    )
    names = {"images": images, "labels": np.zeros(64, np.int32)}
    exec(code.replace('stem="cifar"', 'stem="cifar", width=4'), names)
    assert int(names["state"].step) == 40 and float(names["metrics"]["accuracy"]) > 0.5  # a ramp shows which way is up
    for a, b in zip(
        jax.tree.leaves(names["variables"]["params"]["backbone"]),
        jax.tree.leaves(names["state"].variables["params"]["backbone"]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
