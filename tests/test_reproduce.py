"""Every row of the report as data, run by one command; the tables are made from the committed results."""

import dataclasses
import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from experiments import comparison, control, outcomes, reproduce, tables
from experiments.command import made
from experiments.rows import ROWS, STRONG, Run, runs, shortened
from rotjax import optim
from rotjax.errors import CheckpointError, DataError, UsageError
from rotjax.locks import locked
from rotjax.recipe import Classification, Rotation

SMALL = dict(dataset="digits", stem="cifar", image_size=8, width=4, batch_size=64, max_steps=3)


def short(monkeypatch, folder):
    """Settings that leave everything in `folder`, with two rows in place of the report's."""
    rotations = Run("1", "rotations", Rotation(**SMALL), published=78.99, band=(78.0, 80.0))
    fields = {name: value for name, value in SMALL.items() if name not in ("stem", "width")}
    both = [rotations, Run("3a", "classes", Classification(**fields), rotations)]
    monkeypatch.setattr(reproduce, "runs", lambda seeds, preset: both)
    monkeypatch.setattr(reproduce, "EPOCH_IMAGES", {"digits": 1438})
    return reproduce.Settings(workdirs=folder / "work", results=folder / "results", data_note="a note")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Two rows in place of the report's, of which none is carried out."""
    return short(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Settings with which both rows were carried out."""
    with pytest.MonkeyPatch.context() as patch:
        settings = short(patch, tmp_path_factory.mktemp("complete"))
        reproduce.run(settings)
    return settings


@pytest.fixture
def copied(small, complete):
    """`small`, with both rows carried out."""
    shutil.copytree(complete.workdirs, small.workdirs)
    shutil.copytree(complete.results, small.results)
    return small


def test_the_committed_tables_are_made_from_the_committed_results():
    folder = outcomes.RESULTS
    results, pictures = outcomes.load(folder), [path.name for path in folder.glob("*.png")]
    page = tables.readme(results, pictures, outcomes.controls(folder), outcomes.probes(folder))
    assert results and page == (folder / "README.md").read_text()


def test_every_row_of_the_report_is_there_and_starts_from_an_earlier_one():
    every = runs(seeds=3)
    assert {run.row for run in every} == set(ROWS)
    assert len({run.name for run in every}) == len(every)
    for number, run in enumerate(every):
        assert run.after is None or run.after in every[:number]
        assert run.after is None or run.after.recipe.job == "rotation"
    published = {(run.row, run.recipe.job): run.published for run in runs() if run.published}
    assert published == {
        ("1", "rotation"): 78.99,
        ("2a", "classification"): 62.09,
        ("2b", "classification"): 45.31,
        ("3a", "classification"): 84.11,
        ("3b", "classification"): 82.33,
        ("5a", "rotation"): 78.78,
        ("5a", "classification"): 84.85,
        ("6a", "rotation"): 59.72,
        ("6b", "classification"): 81.97,
    }


def test_the_strong_rows_are_the_tasks_of_the_reports_by_the_strong_preset():
    rows = {run.row: run for run in runs(preset="strong")}
    assert tuple(rows) == STRONG and {run.recipe.preset for run in rows.values()} == {"strong"}
    assert [run.after and run.after.row for run in rows.values()] == [None, "S1", "S1", None, None]
    assert [run.recipe.frozen for run in rows.values()] == [(), optim.FROZEN["last_block"], (), (), ()]
    with pytest.raises(UsageError, match="no row '1' among S1, S2a, S3a, S3b, S0; give --preset=report$"):
        reproduce.chosen(list(rows.values()), "1")


def test_the_strong_recipe_was_chosen_on_images_held_out_of_the_training_set():
    """The kind of classifiers' regularisation that is the preset's came out best, as it was committed."""
    kinds = [run for run in runs(preset="strong") if run.row == "S0"]
    assert {run.recipe.validation for run in kinds} == {0.1}, "no test image is scored"
    there = {one.name: one for one in outcomes.load(outcomes.RESULTS)}
    best = max(kinds, key=lambda run: there[run.name].score)
    assert {there[run.name].summary["tested_on"] for run in kinds} == {"validation images"}
    usual = Classification(preset="strong").resolved()
    assert (best.recipe.cutout, best.recipe.label_smoothing) == (usual.cutout, usual.label_smoothing)


def test_the_strong_rows_have_a_table_of_their_own():
    (result,) = (one for one in outcomes.load(outcomes.RESULTS) if (one.row, one.seed) == ("3a", 0))
    strong = dataclasses.replace(result, row="S3a", summary=result.summary | {"accuracy": 0.951})
    page = tables.readme([result, strong], (), {}, ())
    assert page.count("| S3a |") == 1 and "| S3a | classify, all trains, from row S1 | 95.5 | **95.10** | 1 |" in page
    assert page.index("## Today's recipe") > page.index("| 3a |")
    assert "| 3a |" not in page.partition("## Today's recipe")[2].partition("##")[0]


def test_a_control_by_another_recipe_is_told():
    there = {one.name: one for one in outcomes.load(outcomes.RESULTS)}
    for row, given, said in [
        ("S3b", {}, "92.40 |"),
        ("S3b", {"classes": []}, "92.40 |"),
        ("S3b", {"stem": "x"}, "92.40, by another recipe |"),
        ("S3a", {"stem": "x"}, "92.40 |"),  # which the pretrained network decides
        ("S3b", {"epochs": 200}, "92.40, by another recipe |"),
    ]:
        result = there[f"{row}-classification-seed0"]
        control = {"summary": {"accuracy": 0.924}, "recipe": result.recipe | given}
        assert f"| {result.name} | {result.score:.2f} | {said}" in tables.readme([result], (), {result.name: control}, ())


def test_what_a_row_starts_from_comes_before_it():
    names = [run.name for run in reproduce.chosen(runs(seeds=2), "3a")]
    assert names == [f"{row}-seed{seed}" for seed in (0, 1) for row in ("1-rotation", "3a-classification")]
    assert [run.name for run in reproduce.chosen(runs(), "5b-resnet50-classification-seed0")] == [
        "5b-resnet50-rotation-seed0",
        "5b-resnet50-classification-seed0",
    ]
    assert reproduce.chosen(runs(), "") == runs()
    with pytest.raises(UsageError, match="no row '7'"):
        reproduce.chosen(runs(), "1,7")


def test_one_command_runs_what_is_missing_and_then_nothing_but_not_a_changed_recipe(small, capsys, monkeypatch):
    reproduce.run(small)
    out = capsys.readouterr().out
    assert "2 of 2 done" in out
    for name, task in (("1-rotation", "rotation"), ("3a-classification", "classification")):
        (path,) = (small.results / "runs").glob(f"{name}-*.json")
        result = json.loads(path.read_text())
        assert (result["task"], result["seed"], result["data_note"]) == (task, 0, "a note")
        assert result["recipe"]["dataset"] == "digits" and result["summary"]["steps"] == 3
        assert path.with_suffix(".jsonl").read_text() == (small.workdirs / path.stem / "metrics.jsonl").read_text()
    assert result["recipe"]["pretrained"].startswith("rotation-digits-resnet18-")
    (began,) = small.workdirs.glob("1-rotation-*/summary.json")
    assert result["pretext"] == outcomes.accuracy(json.loads(began.read_text()))
    page = (small.results / "README.md").read_text()
    assert "## Trials" in page and "| 1 |" not in page, "a run that was stopped early stays out of the report's table"
    before = {path: path.stat().st_mtime_ns for path in small.results.rglob("*")}
    reproduce.run(small)
    assert {path: path.stat().st_mtime_ns for path in small.results.rglob("*")} == before
    (small.results / "README.md").unlink()  # as a signal between the last result and the page leaves it
    reproduce.run(small)
    assert (small.results / "README.md").read_text() == page
    (result,) = (small.results / "runs").glob("3a-*.json")
    result.write_text(result.read_text().replace('"accuracy": 0.', '"accuracy": 0.0'))  # of another training
    reproduce.run(small)
    assert outcomes.read_result(result)["summary"] == json.loads((small.workdirs / result.stem / "summary.json").read_text())
    metrics = small.workdirs / result.stem / "metrics.jsonl"
    kept, lost = result.read_text().replace('"accuracy": 0.', '"accuracy": 0.0'), metrics.read_bytes()
    result.write_text(kept)
    metrics.unlink()
    with pytest.raises(CheckpointError, match=f"^{metrics} cannot be read .*; bring it back, or remove {metrics.parent}:"):
        reproduce.run(small)
    assert result.read_text() == kept, "the result is not gone before there is another"
    metrics.write_bytes(lost)
    reproduce.run(small)
    (rotations, classes) = reproduce.runs(1, "report")
    changed = dataclasses.replace(classes, recipe=dataclasses.replace(classes.recipe, learning_rate=0.5))
    monkeypatch.setattr(reproduce, "runs", lambda seeds, preset: [rotations, changed])
    with pytest.raises(UsageError, match=r"holds another run \(learning_rate 0.001 -> 0.5\)"):
        reproduce.run(small)


def test_data_that_a_later_run_lacks_is_told_before_the_first_begins(small, monkeypatch, tmp_path):
    first, _ = reproduce.runs(1, "report")
    both = [first, Run("6a", "rotations", Rotation(**SMALL | {"dataset": "imagenette"}))]
    monkeypatch.setattr(reproduce, "runs", lambda seeds, preset: both)
    with pytest.raises(DataError, match="imagenette/160px-v2 is not prepared in .*experiments.prepare imagenette"):
        reproduce.run(dataclasses.replace(small, data_dir=tmp_path))
    assert not small.workdirs.exists() and not small.results.exists()


def test_what_is_left_is_shown_with_an_estimate(small, capsys):
    reproduce.run(dataclasses.replace(small, only="1"))
    capsys.readouterr()
    reproduce.run(dataclasses.replace(small, list=True))
    out = capsys.readouterr().out
    assert "1 of 2 done; left: about 0.0 hours" in out and "78.99%" in out and out.count(" left\n") == 1
    (other,) = (run.name for run in reproduce.runs(1, "report") if run.row == "3a")
    (small.workdirs / other).mkdir()
    (small.workdirs / other / "metrics.jsonl").write_text('{"step": 2}\n{"step')  # as a full disk cuts a row off
    reproduce.run(dataclasses.replace(small, list=True))
    assert " interrupted at step 2\n" in capsys.readouterr().out
    (small.workdirs / other / "checkpoints").mkdir()
    (small.workdirs / other / "checkpoints" / "25.json").touch()  # before the row of the next fifty steps
    reproduce.run(dataclasses.replace(small, list=True))
    assert " interrupted at step 25\n" in capsys.readouterr().out
    with locked(small.workdirs / other / ".lock", "the run"):
        reproduce.run(dataclasses.replace(small, list=True))
    assert " running\n" in capsys.readouterr().out
    reproduce.run(dataclasses.replace(small, list=True, results=small.results / "other"))
    assert f"complete, but not among {small.results / 'other'}\n" in capsys.readouterr().out
    (first,) = (run.name for run in reproduce.runs(1, "report") if run.row == "1")
    (small.workdirs / first / "metrics.jsonl").write_text("damaged\n\n")  # of a run that is done it is not read
    reproduce.run(dataclasses.replace(small, list=True))
    assert "1 of 2 done" in capsys.readouterr().out


def test_a_trial_is_told_from_the_run():
    run = next(run for run in runs() if run.row == "3a")
    trial = shortened(run, 5)
    assert trial.after and trial.after.recipe.max_steps == trial.recipe.max_steps == 5
    assert trial.name == "3a-classification-first5-seed0" != run.name


@pytest.mark.parametrize("steps", [1, 360])  # 0.00 and 1.00 epochs of 359 steps, in two digits
def test_a_trial_of_any_length_is_a_result(small, monkeypatch, steps):
    (rotations, _) = reproduce.runs(1, "report")
    trial = dataclasses.replace(rotations, recipe=dataclasses.replace(rotations.recipe, batch_size=4, max_steps=None))
    monkeypatch.setattr(reproduce, "runs", lambda seeds, preset: [trial])
    reproduce.run(dataclasses.replace(small, max_steps=steps))
    (one,) = outcomes.load(small.results)
    assert one.name == f"1-rotation-first{steps}-seed0" and one.epochs[-1]["step"] == steps


def test_a_run_whose_result_was_being_replaced_goes_on(copied, monkeypatch):
    (result,) = (copied.results / "runs").glob("1-rotation-*.json")
    other = json.loads(result.read_text())
    other["summary"]["wall_seconds"] += 1  # of another training
    result.write_text(json.dumps(other))

    def stopped(path, content):
        path.write_bytes(content[:-20])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(reproduce, "write", stopped)
        reproduce.run(copied)
    reproduce.run(copied)
    assert len(outcomes.load(copied.results)) == 2


def test_a_result_of_a_row_that_is_not_there_is_named_in_a_line(copied):
    (result,) = (copied.results / "runs").glob("1-rotation-*.json")
    for path in (result, result.with_suffix(".jsonl")):
        path.rename(path.with_name(path.name.replace("1-", "9-", 1)))
    other = result.with_name(result.name.replace("1-", "9-", 1))
    other.write_text(other.read_text().replace('"row": "1"', '"row": "9"'))
    with pytest.raises(CheckpointError, match="9-rotation-first3-seed0.json is no result of a run .there is no row 9"):
        reproduce.run(copied)


def test_a_result_that_is_damaged_is_told_before_anything_is_trained(small):
    (small.results / "runs").mkdir(parents=True)
    (small.results / "runs" / "2a-classification-seed0.json").write_text("{")
    with pytest.raises(CheckpointError, match="2a-classification-seed0.json cannot be read .*; remove it, and run again"):
        reproduce.run(small)
    assert not small.workdirs.exists()


def test_the_table_holds_the_mean_over_seeds_and_says_what_is_outside(tmp_path):
    results = []
    for seed, accuracy in enumerate((0.81, 0.83)):
        (result,) = (one for one in outcomes.load(outcomes.RESULTS) if (one.row, one.seed) == ("3a", 0))
        results.append(dataclasses.replace(result, seed=seed, summary=result.summary | {"accuracy": accuracy}))
    line = next(line for line in tables.readme(results, (), {}, ()).splitlines() if line.startswith("| 3a"))
    assert "**82.00 ± 1.41** | 2 | -2.11 | 83.1 to 85.1, **outside**" in line


def test_only_what_was_measured_is_in_the_tables():
    (result,) = (one for one in outcomes.load(outcomes.RESULTS) if (one.row, one.seed) == ("3a", 0))
    assert "| 3a | row 1 | 64.69 |" in tables.readme([result], (), {}, ())
    later = dataclasses.replace(result, epochs=result.epochs[1:])  # whose first row was cut off
    assert "| 3a | row 1 | 64.69 |" not in tables.readme([later], (), {}, ())
    every = [dataclasses.replace(result, name=run.name) for run in runs()]
    others = [one for one in every if one.name[:2] != "5b"]
    assert "Runs that are missing: 4 of row 5b.\n" in tables.readme(others, (), {}, ())
    assert "Every row of the report has been run.\n" in tables.readme(every, (), {}, ())
    assert tables.table(["a"], [["b|c"]]).endswith("| b\\|c |")


def test_the_curves_over_subsets_count_images_in_plain_numbers():
    figure = comparison.subset_curves(outcomes.load(outcomes.RESULTS))
    assert figure
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["200", "1,000", "4,000", "10,000", "50,000"]
    assert len(axes.get_xticklabels(minor=True)) == 0


def test_a_range_is_drawn_only_where_there_are_several_draws():
    (result,) = (one for one in outcomes.load(outcomes.RESULTS) if (one.row, one.seed) == ("3a", 0))
    scores = {20: (0.4, 0.5, 0.6), 100: (0.5, 0.6), 400: (0.7,), 1000: (0.8,)}
    drawn = [
        dataclasses.replace(
            result, row="4", variant=f"full-{count}", seed=seed, summary=result.summary | {"accuracy": score}
        )
        for count, several in scores.items()
        for seed, score in enumerate(several)
    ]
    figure = comparison.subset_curves(drawn)
    assert figure
    (axes,) = figure.axes
    mean, draws = axes.lines
    np.testing.assert_allclose(mean.get_ydata(), [50, 55, 70, 80])
    np.testing.assert_allclose(draws.get_ydata(), [40, 50, 60, 50, 60, 70, 80])
    assert max(point[0] for path in axes.collections[0].get_paths() for point in path.vertices) == 1000  # 100 of each class
    page = tables.readme(drawn, (), {}, ())
    assert "| 20 |  | 50.00 ± 10.00 (3) |  |" in page and "| 400 |  | 70.00 (1) |  |" in page


def test_the_page_says_which_runs_have_other_data_or_start_from_another_training():
    found = {one.name: one for one in outcomes.load(outcomes.RESULTS)}
    one, two = found["1-rotation-seed0"], found["3a-classification-seed0"]
    page = tables.readme([one, two], (), {}, ())
    assert f"Data: {one.data_note}." in page and "another training" not in page
    page = tables.readme([one, dataclasses.replace(two, data_note="", pretext=78.0)], (), {}, ())
    assert f"Data: {one.data_note} ({one.name}); nothing is said of cifar10 ({two.name})." in page
    assert f"From another training than the one in the table: {two.name} from {one.name} with 78.00." in page
    few = [dataclasses.replace(one, row="4", name=name, pretext=78.0) for name in ("4-full-20-classification-seed0",) * 2]
    assert f"table: row 4 from {one.name} with 78.00." in tables.readme([one, few[0]], (), {}, ())
    few[1] = dataclasses.replace(few[1], name="4-full-20-classification-seed1", pretext=one.score)
    assert f"table: {few[0].name} from {one.name} with 78.00." in tables.readme([one, *few], (), {}, ())
    few.append(dataclasses.replace(few[0], name="4-full-20-classification-seed2"))
    assert f"table: row 4 but for {few[1].name} from {one.name} with 78.00." in tables.readme([one, *few], (), {}, ())


def test_the_commit_of_a_result_tells_of_changed_code_not_of_other_results(tmp_path, monkeypatch):
    def git(*words):
        made = ["git", "-C", str(tmp_path), "-c", "user.name=one", "-c", "user.email=one@example.org", *words]
        return subprocess.run(made, capture_output=True, text=True, check=True).stdout.strip()

    code, result = tmp_path / "experiments" / "outcomes.py", tmp_path / "experiments" / "results" / "a.json"
    result.parent.mkdir(parents=True)
    monkeypatch.setattr(outcomes, "__file__", str(code))
    for path in (code, result):
        path.write_text("before")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message=one")
    head = git("rev-parse", "--short=12", "HEAD")
    result.write_text("after")
    assert outcomes.commit() == head
    (tmp_path / "notes.txt").write_text("no code")
    assert outcomes.commit() == head
    (tmp_path / "new.py").write_text("code")
    assert outcomes.commit() == f"{head}+"
    (tmp_path / "new.py").unlink()
    code.write_text("after")
    assert outcomes.commit() == f"{head}+"
    monkeypatch.setattr(outcomes, "__file__", str(tmp_path / "experiments" / "installed.py"))
    assert outcomes.commit() == "", "the clone around an installed package is another project's"


def test_a_folder_without_results_gets_no_page(tmp_path):
    with pytest.raises(UsageError, match=f"^--results={tmp_path} holds no results; name the folder"):
        tables.run(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_page_that_is_not_of_results_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    asked = f"--results={tmp_path} holds a README.md that is not of results; name another folder"
    for command in (
        lambda: tables.run(tmp_path),
        lambda: reproduce.run(reproduce.Settings(workdirs=tmp_path / "runs", results=tmp_path)),
        lambda: control.control("1-rotation-seed0", results=tmp_path),
    ):
        with pytest.raises(UsageError) as caught:
            command()
        assert str(caught.value) == asked
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"colour": "blue"}'])
def test_a_result_that_is_none_is_named_in_a_line(tmp_path, content):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text(content)
    (tmp_path / "runs" / "a.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"a\.json (cannot be read|is no result of a run)"):
        tables.write(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (
            lambda path: path.with_suffix(".jsonl").write_text(""),
            "jsonl is missing or damaged; remove it and .*json, and run",
        ),
        (
            lambda path: path.with_suffix(".jsonl").unlink(),
            "jsonl is missing or damaged; remove it and .*json, and run",
        ),
        (
            lambda path: path.with_suffix(".jsonl").write_text(path.with_suffix(".jsonl").read_text()[:9000]),
            "jsonl is missing or damaged; remove it and .*json, and run",
        ),
        (
            lambda path: [shutil.copy(p, p.with_stem(f"{p.stem} (copy)")) for p in (path, path.with_suffix(".jsonl"))],
            r"\(copy\).json is no result of a run \(but of 3b-classification-seed0\); move it elsewhere",
        ),
        (
            lambda path: path.write_text(path.read_text().replace('"accuracy": 0.', '"accuracy": 80.')),
            r"seed0.json is no result of a run \(accuracy 80..*%\); move it elsewhere",
        ),
        (
            lambda path: path.write_text(path.read_text().replace('"accuracy": 0.', '"accuracy": null, "other": 0.')),
            r"seed0.json is no result of a run \(",
        ),
        (
            lambda path: path.write_text(path.read_text().replace('"device"', '"machine"')),
            r"seed0.json is no result of a run \(it lacks device\); move it elsewhere",
        ),
        (
            lambda path: made(path.parents[1] / "controls").joinpath(path.name).write_text('{"summary": {}}'),
            r"controls/3b-classification-seed0.json is no result of a run \('accuracy'\); move it elsewhere",
        ),
        (
            lambda path: (
                made(path.parents[1] / "controls")
                .joinpath(path.name)
                .write_text('{"summary": {"accuracy": 0.5}, "recipe": null}')
            ),
            r"controls/3b-classification-seed0.json is no result of a run \(.*; move it elsewhere",
        ),
        (
            lambda path: (
                made(path.parents[1] / "probes")
                .joinpath("x.json")
                .write_text(json.dumps(dict.fromkeys(outcomes.PROBED, 1) | {"stages": [{"linear": {"random": 0.5}}]}))
            ),
            r"probes/x.json is no result of a run \('trained'\); move it elsewhere",
        ),
        (
            lambda path: path.write_text(path.read_text().replace('"wall_seconds": ', '"wall_seconds": null, "other": ')),
            r"seed0.json is no result of a run \(None is no number\); move it elsewhere",
        ),
        (
            lambda path: path.write_text(path.read_text().replace('"backbone"', '"network"')),
            r"seed0.json is no result of a run \(it lacks backbone\); move it elsewhere",
        ),
    ],
)
def test_a_result_that_is_damaged_or_there_twice_is_named_in_a_line(tmp_path, spoil, line):
    (tmp_path / "runs").mkdir()
    for path in (outcomes.RESULTS / "runs").glob("3b-classification-seed0.json*"):
        shutil.copy(path, tmp_path / "runs")
    tables.write(tmp_path)
    spoil(tmp_path / "runs" / "3b-classification-seed0.json")
    for look in (tables.check, tables.write):
        with pytest.raises(CheckpointError, match=line):
            look(tmp_path)


def test_a_result_is_replaced_while_nobody_makes_the_page(copied):
    (result,) = (copied.results / "runs").glob("1-*.json")
    before = outcomes.read_result(result)["summary"]
    result.write_text(other := result.read_text().replace('"rotation_accuracy": 0.', '"rotation_accuracy": 0.0'))
    (run,) = (run for run in reproduce.runs(1, "report") if run.row == "1")
    with ThreadPoolExecutor(1) as pool:
        with tables.claimed(copied.results):
            replaced = pool.submit(reproduce.carry_out, run, copied)
            with pytest.raises(TimeoutError):
                replaced.result(5)
            assert result.read_text() == other
        replaced.result()
    assert outcomes.read_result(result)["summary"] == before


def test_a_figure_of_results_that_are_gone_is_removed(tmp_path):
    (tmp_path / "runs").mkdir()
    for path in (outcomes.RESULTS / "runs").glob("3b-classification-seed0.json*"):
        shutil.copy(path, tmp_path / "runs")
    tables.write(tmp_path)
    assert (tmp_path / "fine-tuning.png").exists() and "fine-tuning.png" in (tmp_path / "README.md").read_text()
    for path in (tmp_path / "runs").iterdir():
        path.unlink()
    (tmp_path / "filters.png").touch()  # which a run leaves, not this page
    tables.write(tmp_path)
    assert not (tmp_path / "fine-tuning.png").exists() and (tmp_path / "filters.png").exists()
    assert "fine-tuning.png" not in (tmp_path / "README.md").read_text()


def test_pages_that_are_written_at_once_are_whole(tmp_path):
    (tmp_path / "runs").mkdir()
    for path in (outcomes.RESULTS / "runs").glob("3?-classification-seed0.json*"):
        shutil.copy(path, tmp_path / "runs")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(tables.write, [tmp_path] * 4))
    names = {path.name for path in tmp_path.iterdir()}
    assert "README.md" in names and not [name for name in names if name.endswith((".partial", ".lock"))]


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("3a-classification-seed1", "give --preset=report --seeds=3"),
        ("S1", "give --preset=strong"),
        ("S3b-classification-seed2", "give --preset=strong --seeds=3"),
        ("7", "name one, or a run that --list shows"),
    ],
)
def test_a_row_that_is_not_there_is_told_with_what_it_takes(word, remedy):
    with pytest.raises(UsageError, match=f"^--only: there is no row '{word}' among 1, 2a, .*, 5b; {remedy}$"):
        reproduce.chosen(runs(), f"1,{word}")


@pytest.mark.parametrize(
    ("name", "begun", "flags"),
    [
        ("3a-classification-seed0", "1-rotation-seed0", ""),
        ("3a-classification-seed2", "1-rotation-seed2", " --seeds=3"),
        ("6b-160px-classification-seed0", "6a-160px-rotation-seed0", ""),
        ("S3a-classification-seed1", "S1-rotation-seed1", " --preset=strong --seeds=2"),
    ],
)
def test_a_control_without_what_it_starts_from_says_how_to_make_it(tmp_path, monkeypatch, name, begun, flags):
    monkeypatch.setattr(control, "networks", lambda: None)
    remedy = f"run python -m experiments.reproduce --only={begun}{flags} --workdirs={tmp_path} first"
    with pytest.raises(UsageError, match=f"^{name} starts from {begun}, which is not complete there; {remedy}$"):
        control.control(name, workdirs=tmp_path, results=tmp_path / "results")
    every = runs(3 if flags else 1, "strong" if "strong" in flags else "report")
    assert [run.name for run in reproduce.chosen(every, begun)] == [begun]
    assert not list(tmp_path.iterdir())


def test_settings_out_of_range_are_refused(tmp_path):
    for name in ("seeds", "max_steps"):
        with pytest.raises(UsageError, match=f"--{name}=0"):
            reproduce.run(reproduce.Settings(workdirs=tmp_path, results=tmp_path, **{name: 0}))
    assert not list(Path(tmp_path).iterdir())
