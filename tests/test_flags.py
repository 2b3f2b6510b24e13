"""Every bad value of every flag of every command is refused: what is wrong and what is allowed is said, nothing is left."""

import json
import math
import re
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import rotjax
from experiments import benchmark, command, control, predict, prepare, probe, reliability, reproduce, tables
from rotjax.recipe_json import to_json
from rotjax.workdirs import TOLD

RUN = tempfile.TemporaryDirectory()  # a workdir, of which only the recipe and the summary are read before flags are refused
(Path(RUN.name) / "recipe.json").write_text(json.dumps(to_json(rotjax.Rotation(dataset="digits", image_size=32).resolved())))
(Path(RUN.name) / "summary.json").write_text(json.dumps(dict.fromkeys([*TOLD, "accuracy"], 0)))
COMMANDS = {  # and words that they need beside the flag
    "rotation": (lambda: command.main(rotjax.Rotation), ["--dataset=digits"]),
    "classification": (lambda: command.main(rotjax.Classification), ["--dataset=digits"]),
    "prepare": (prepare.main, ["imagenette"]),
    "reproduce": (reproduce.main, ["--list"]),
    "control": (control.main, ["--run=1-rotation-seed0"]),
    "probe": (probe.main, [f"--pretrained={RUN.name}"]),
    "predict": (predict.main, [f"--pretrained={RUN.name}", f"--images={RUN.name}"]),
    "tables": (tables.main, []),
    "benchmark": (benchmark.main, ["--only=e"]),
    "reliability": (reliability.main, []),
}
FREE = {"data_note": "any text"}  # flags without a bad value but the empty one, and why
WORDS = st.sampled_from(["abc", "1e", "--", "0x10", "\u0661\u00bd"])
LONG = st.sampled_from(["x" * 300, "a/" * 3000])


def numbers(values):
    return WORDS | values


def one_of(*values):
    return st.sampled_from([*values, "7", "--"])


FOLDER = LONG | st.just("file")
COUNT = numbers(st.integers(max_value=0))
TRIPLE = st.sampled_from(["1", "a b c", "1 2", "1 2 3 4", "nan 0 0", "0 inf 0"])
BAD = {
    "preset": one_of("weak", "Strong"),
    "optimizer": one_of("adam", "SGD"),
    "schedule": one_of("step", "linear"),
    "warmup_epochs": numbers(st.integers(max_value=-1) | st.integers(46, 10**6)),
    **dict.fromkeys(("cutout", "label_smoothing"), numbers(st.floats(max_value=-1e-30) | st.sampled_from([math.nan, 1.5]))),
    "validation": numbers(st.floats(max_value=-1e-30) | st.sampled_from([math.nan, 1])),
    "backbone": one_of("resnet", "RESNET18", "../resnet18"),
    "dataset": LONG | st.sampled_from(["nothing-like-it", "./nowhere", "file", "a b", "-rf", "cifar10/.."]),
    "stem": one_of("none", "Cifar"),
    "dtype": one_of("float16", "64"),
    "rotations": one_of("some", "4"),
    "trainable": one_of("stage4", "none"),
    "frozen_statistics": one_of("maybe"),
    **dict.fromkeys(("flip", "distributed", "list"), st.sampled_from(["maybe", "True", "1e"])),
    **dict.fromkeys(
        ("epochs", "max_steps", "batch_size", "decay_epochs", "log_steps", "repeats", "seeds", "neighbors"), COUNT
    ),
    "augment": one_of("gpu", "Host"),
    "steps_per_dispatch": numbers(st.integers(max_value=0) | st.integers(min_value=9)),
    "threads": numbers(st.integers(max_value=-1) | st.integers(min_value=1025)),
    "image_size": numbers(st.integers(max_value=0)),
    "subset": numbers(st.integers(max_value=0) | st.integers(1000, 10**12)),
    "learning_rate": numbers(st.floats(max_value=0) | st.sampled_from([math.nan, math.inf])),
    "weight_decay": numbers(st.floats(max_value=-1e-30) | st.sampled_from([math.nan, math.inf])),
    "checkpoint_seconds": numbers(st.floats(max_value=-1e-30) | st.just(math.nan)),
    "seed": numbers(st.integers(max_value=-1) | st.integers(min_value=2**32)),
    "width": numbers(st.integers(max_value=1)),
    "mean": TRIPLE,
    "std": TRIPLE | st.sampled_from(["0 1 1", "1 1 -1"]),
    "workdir": FOLDER,
    "workdirs": FOLDER,
    "data_dir": FOLDER,
    "results": FOLDER,
    "profile": FOLDER,
    "output": FOLDER,
    "pretrained": FOLDER | st.just("nowhere"),
    "images": FOLDER | st.just("nowhere"),
    "archive": LONG | st.sampled_from(["nowhere", "file"]),
    "only": one_of("z", "1,,2", "resnet18", ","),
    "run": one_of("1", "nope", "4-scratch-20-classification-seed0", "2b-held-classification-seed0"),
}
BESIDE = {
    ("rotation", "data_dir"): ["--dataset=cifar10"],
    ("classification", "data_dir"): ["--dataset=cifar10"],
    ("probe", "data_dir"): [f"--pretrained={RUN.name}", "--dataset=cifar10"],
    ("control", "data_dir"): ["--run=1-rotation-seed0"],
    ("reproduce", "data_dir"): [],
}
WRONG_PLACE = {"data_dir": 3, "pretrained": 4, "archive": 3}  # what a path to something else is, where it is not 2
ALLOWED = re.compile(
    r"at least|at most|above 0|finite|name|give|leave|rows are|see |more than|fetch|run: |fix|"
    r"[Ee]xpected|instantiated|base 10|helptext"  # tyro's
)


WORK = [
    (rotjax, "train"),
    (prepare, "fetch"),
    (control, "train"),
    (probe, "probed"),
    (predict, "predicted"),
    (benchmark, "measure"),
]


def accepted(*arguments, **options):
    raise AssertionError("a bad value was accepted")


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Calls a command in a folder with one empty file: exit code, what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no-such-folder"))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "file").touch()
    for owner, name in WORK:
        monkeypatch.setattr(owner, name, accepted)

    def run(job, *words):
        monkeypatch.setattr(sys, "argv", [job, *words])
        try:
            code = COMMANDS[job][0]()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def flags(call, job):
    found = re.findall(r"^\W*--([a-z_]+)", call(job, "--help")[1], re.MULTILINE)
    assert found, "--help lists flags in another way, and none would be tried"
    return found


@pytest.mark.parametrize("job", COMMANDS)
@settings(deadline=None, max_examples=4, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_U1_every_bad_value_of_every_flag_is_refused_and_leaves_nothing(call, tmp_path, record_property, job, data):
    asked = [flag for flag in flags(call, job) if flag not in FREE]
    record_property("trials", len(asked))  # of each example
    for flag in asked:
        value = str(data.draw(BAD[flag], label=flag))
        words = [f"--{flag}", *value.split()] if flag in ("mean", "std") else [f"--{flag}={value}"]
        beside = [word for word in BESIDE.get((job, flag), COMMANDS[job][1]) if not word.startswith(f"--{flag}=")]
        if flag in ("mean", "std"):
            beside += ["--std" if flag == "mean" else "--mean", "1", "1", "1"]
        code, out, err = call(job, *beside, *words)
        said = out + err
        assert code in (2, WRONG_PLACE.get(flag)), (words, code, said)
        assert flag in said or value[:16] in said, (words, said)
        assert ALLOWED.search(said) and "Traceback" not in said, (words, said)
        assert len(err) < 300 or "rotjax:" not in err, (words, err)
        assert [path.name for path in tmp_path.iterdir()] == ["file"], words


@pytest.mark.parametrize("job", COMMANDS)
def test_U1_an_empty_value_of_any_flag_is_refused(call, tmp_path, job):
    for flag in flags(call, job):
        for words in ([f"--{flag}="], [f"--{flag}", ""]):
            code, _, said = call(job, *COMMANDS[job][1], *words)
            assert code == 2 and said == f"rotjax: --{flag} is given an empty value; give another, or leave it out\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
