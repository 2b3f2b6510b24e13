"""The commands as a person calls them: what they leave behind, and what they refuse, with which exit code."""

import dataclasses
import json
import os
import pwd
import resource
import subprocess
import sys
import warnings
from contextlib import closing
from pathlib import Path

import jax
import pytest
from PIL import Image

import rotjax
from experiments import command, figures, flags, report
from rotjax import processes
from rotjax.data import catalogue
from rotjax.errors import UsageError

SMALL = {"dataset": "digits", "stem": "cifar", "image_size": 8, "width": 4, "max_steps": 4}
TINY = [f"--{name}={value}" for name, value in SMALL.items()]


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Calls a command in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no-such-folder"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("COLUMNS", "200")

    def run(job, *words):
        monkeypatch.setattr(sys, "argv", [job, *words])
        try:
            code = command.main({"rotation": rotjax.Rotation, "classification": rotjax.Classification}[job])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_a_command_begins_anew_with_huge_pages_where_linux_gives_them_to_who_asks(tmp_path):
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    asked = f"experiments.HUGE_PAGES = {str(tmp_path / 'enabled')!r}; experiments._with_huge_pages()"
    begun = "print('begun', flush=True)"
    told = "print(os.environ['GLIBC_TUNABLES'], sys.argv[1:], sys.warnoptions, os.getpid())"
    words = [sys.executable, "-W", "ignore", "-c", f"import os, sys, experiments; {begun}; {asked}; {told}"]
    words += ["--one=a b", ""]
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    root = Path(__file__).parents[1]
    with subprocess.Popen(words, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        said, _ = process.communicate()
    assert said == f"begun\nbegun\nglibc.malloc.hugetlb=1 ['--one=a b', ''] ['ignore'] {process.pid}\n"


def test_a_gpu_that_jax_does_not_use_is_told(monkeypatch, notes):
    for there in (None, "/usr/bin/nvidia-smi"):
        monkeypatch.setattr("shutil.which", {"nvidia-smi": there}.get)
        command.warn_of_idle_gpu()
    assert notes == ["an NVIDIA GPU is here but JAX runs on the CPU; install jax[cuda12] (uv run --extra cuda12)"]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    command.warn_of_idle_gpu()
    assert len(notes) == 1


def test_a_command_leaves_a_workdir_that_is_in_use_alone(call, tmp_path):
    folder = tmp_path / "run"
    rows = rotjax.train(rotjax.plan(rotjax.Rotation(**SMALL)), folder)
    with closing(rows):
        next(rows)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        code, _, err = call("rotation", *TINY, f"--workdir={folder}")
        assert code == 6 and err.splitlines()[-1].startswith(f"rotjax: {folder} is in use by process {os.getpid()} on ")
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_whole_job_on_the_embedded_digits(tmp_path):
    def run(job, *words):
        line = [sys.executable, "-m", f"experiments.{job}", *words]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    said = run("rotation", *TINY)
    (workdir,) = (tmp_path / "runs").iterdir()
    assert workdir.name.startswith("rotation-digits-resnet18-")
    names = {path.name for path in workdir.iterdir() if not path.name.startswith(".")}
    assert {"recipe.json", "metrics.jsonl", "summary.json", "checkpoints"} < names
    assert {name for name in names if name.endswith((".png", ".csv"))} == set(figures.FIGURES)
    assert str(workdir.relative_to(tmp_path)) in said
    words = [word for word in TINY if "stem" not in word and "width" not in word]
    words += [f"--pretrained={workdir}", "--trainable=head", "--workdir=mine"]
    said = run("classification", *words, "--augment=device", "--steps_per_dispatch=2", "--threads=1")
    summary = json.loads((tmp_path / "mine/summary.json").read_text())
    assert 0 <= summary["accuracy"] <= 1 and summary["stem"] == "cifar" and summary["steps"] == 4
    assert "taken from rotation-digits-resnet18" in said


USAGE = [
    (["--backbone=resnet19"], "resnet18"),
    (["--dataset=nothing-like-it"], "nothing-like-it"),
    (["--dataset=./nowhere"], "nowhere"),
    (["--stem=vgg"], "imagenet"),
    (["--bachbone=resnet18"], "--bachbone"),
    (["stray"], "stray"),
    (["--epochs=-1"], "--epochs"),
    (["--epochs=0"], "--epochs"),
    (["--epochs=many"], "epochs"),
    (["--max_steps=0"], "--max_steps"),
    (["--batch_size=0"], "--batch_size"),
    (["--batch_size=1439"], "batch_size=1439"),
    (["--image_size=3000"], "--image_size"),
    (["--epochs=" + "9" * 22], "--epochs"),
    (["--mean", "nan", "0", "0", "--std", "1", "1", "1"], "--mean"),
    (["--learning_rate=nan"], "--learning_rate"),
    (["--learning_rate=0"], "--learning_rate"),
    (["--learning_rate=inf"], "--learning_rate"),
    (["--weight_decay=-0.1"], "--weight_decay"),
    (["--decay_epochs=0"], "--decay_epochs"),
    (["--seed=-1"], "--seed"),
    (["--image_size=16"], "--image_size=16"),
    (["--width=1"], "--width"),
    (["--std", "0", "1", "1", "--mean", "0", "0", "0"], "--std"),
    (["--mean", "0", "0", "0"], "--std"),
    (["--log_steps=0"], "--log_steps"),
    (["--checkpoint_seconds=nan"], "--checkpoint_seconds"),
    (["--dtype=int8"], "bfloat16"),
]


def test_what_the_library_says_of_a_field_is_said_of_a_flag():
    said = "image_size=16 is too small for the imagenet stem; use 32 or stem=cifar"
    assert flags.as_flags(said) == "--image_size=16 is too small for the imagenet stem; use 32 or --stem=cifar"
    for path in (
        "runs/lr=0.1,seed=3 is not empty",
        "seed=3/run is not empty",
        "set TFDS_DATA_DIR=data",
        "mesh=x, my_seed=1",
    ):
        assert flags.as_flags(path) == path


@pytest.mark.parametrize(("words", "named"), USAGE, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_U1_bad_usage_is_refused_with_2_and_leaves_nothing(call, tmp_path, words, named):
    dataset = [] if any("dataset" in word for word in words) else ["--dataset=digits"]
    code, out, err = call("rotation", *dataset, *words)
    assert code == 2
    assert named in out + err
    assert list(tmp_path.iterdir()) == []


def test_U1_what_does_not_go_together_is_refused_before_photographs_are_decoded(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for number in range(30):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    words = ["--dataset=~/photos", "--stem=cifar", "--image_size=8"]
    for flag, named in (("--batch_size=999", "training set of 27"), ("--workdir=~/taken", f"{tmp_path}/taken is not empty")):
        code, _, err = call("rotation", *words, "--batch_size=9", flag)
        assert code == 2 and named in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "taken"]


@pytest.mark.parametrize("words", [["--subset=0"], ["--subset=999"], ["--trainable=stage4"], ["--frozen_statistics=maybe"]])
def test_U1_bad_usage_of_the_classification_is_refused_with_2(call, tmp_path, words):
    code, out, err = call("classification", "--dataset=digits", *words)
    assert code == 2 and words[0].split("=")[0].strip("-") in out + err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["cifar10", "imagenette", "svhn_cropped"])
def test_D1_data_that_is_not_prepared_is_3_with_the_command_to_run(call, tmp_path, name):
    code, out, err = call("rotation", f"--dataset={name}")
    assert code == 3 and out == ""
    assert len(err.splitlines()) == 1 and len(err) < 300
    ours = name != "svhn_cropped"
    assert name in err and ("uv run" in err or ours)
    for words in ("python -m experiments.prepare", "MB", "--dataset=digits"):
        assert (words in err) == ours
    assert list(tmp_path.iterdir()) == []


OFFLINE = """import socket, sys
def refuse(*arguments, **options):
    raise AssertionError("the network was asked")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
"""


def test_D1_the_command_says_so_within_seconds_and_asks_no_network(tmp_path):
    """Measured against its own `--help`, as imports take as long as the machine likes."""
    (tmp_path / "sitecustomize.py").write_text(OFFLINE)
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}:{tmp_path}", "TFDS_DATA_DIR": str(tmp_path / "no-such-folder")}
    seconds = []
    for words, code in ((["--help"], 0), (["--dataset=cifar10"], 3)):
        line = [sys.executable, "-m", "experiments.rotation", *words]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "prepare cifar10 (downloads 170 MB" in done.stderr
    assert seconds[1] - seconds[0] < 5


def test_a_pretrained_run_that_is_not_there_is_4(call, tmp_path):
    code, _, err = call("classification", "--dataset=digits", "--pretrained=nowhere")
    assert code == 4 and "nowhere" in err and len(err.splitlines()) == 1
    (tmp_path / "empty").mkdir()
    code, _, err = call("classification", "--dataset=digits", "--pretrained=empty")
    assert code == 4 and "no recipe.json" in err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.fixture
def cache(tmp_path):
    """A folder for compiled programs; JAX goes back to the tests' own."""
    before = jax.config.jax_compilation_cache_dir
    folder = tmp_path / "rotjax" / "compiled"
    folder.mkdir(parents=True, mode=0o700)
    yield folder
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("how", ["writable", "owned"])
def test_F5_a_folder_of_programs_that_others_can_write_is_not_used(monkeypatch, tmp_path, cache, notes, asked, how):
    if how == "owned" and os.getuid() != 0:
        pytest.skip("only root gives files away")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    if asked:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    command.cache_compilations()
    assert notes == [] and jax.config.jax_compilation_cache_dir == str(cache)
    if how == "owned":
        os.chown(cache, 12345, 12345)
    else:
        cache.chmod(0o777)
    command.cache_compilations()
    assert notes == [f"no compilation cache: {cache} can be written by others"]
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize(("asked", "kept"), [(None, 0.1), ("0", 0.0)])
def test_programs_of_a_tenth_of_a_second_are_kept_unless_the_user_says_otherwise(monkeypatch, cache, asked, kept):
    least = "jax_persistent_cache_min_compile_time_secs"
    monkeypatch.delenv(least.upper())
    if asked:
        monkeypatch.setenv(least.upper(), asked)
    before = jax.config.values[least]
    try:
        command.cache_compilations()
        assert jax.config.values[least] == kept
    finally:
        jax.config.update(least, before)


def damaged(connection, folder):
    """Compiles, damages what is cached of it, compiles again, as several runs of one process: sends both results."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)

    def run(function):
        command.cache_compilations()
        return jax.jit(function)(jax.numpy.arange(5.0)).tolist()

    with report.listening():
        for number in range(2):
            connection.send([run(function) for function in (jax.numpy.sin, jax.numpy.cos, jax.numpy.tan)])
            if not number:
                jax.clear_caches()
                for entry in folder.glob("*-cache"):
                    os.truncate(entry, 100)


def test_F5_a_damaged_program_is_compiled_again_to_the_same_bits(start, tmp_path):
    (tmp_path / "compiled").mkdir(mode=0o700)
    process, connection = start(tmp_path / "log", damaged, tmp_path / "compiled")
    first, second = connection.recv(), connection.recv()
    process.join(timeout=600)
    assert first == second and process.exitcode == 0
    line = f"rotjax: {tmp_path / 'compiled'} is damaged; remove it, or every run compiles again\n"
    assert (tmp_path / "log").read_text() == line


def test_F4_a_cache_that_cannot_be_written_is_told_once(monkeypatch, cache, notes):
    command._say_once.cache_clear()
    monkeypatch.setattr(warnings, "showwarning", lambda *_: None)  # put back with what replaces it
    for _ in range(2):
        command.cache_compilations()
        warnings.showwarning("Error writing persistent compilation cache entry for 'x'", UserWarning, "compiler.py", 1)
    folder = jax.config.jax_compilation_cache_dir
    assert notes == [f"{folder} cannot be written; make room, or every run compiles again"]
    command._say_once.cache_clear()


def test_F4_no_home_and_no_cache_folder(monkeypatch, tmp_path, cache, notes):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    command.cache_compilations()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # nor does /etc/passwd know this user
    command.cache_compilations()
    assert [note.startswith("no compilation cache: ") for note in notes] == [True, True]
    with pytest.raises(UsageError, match="no home folder.*data_dir=FOLDER$"):
        catalogue.home(None)


NOBODY = "import pwd\ndef getpwuid(number): raise KeyError(number)\npwd.getpwuid = getpwuid\n"


@pytest.mark.parametrize("lacking", ["streams", "home"])
def test_F4_the_command_needs_no_streams_and_no_home(tmp_path, lacking):
    root = str(Path(__file__).parents[1])
    line = [sys.executable, "-m", "experiments.rotation", *TINY, f"--workdir={tmp_path / 'run'}"]
    if lacking == "streams":
        line, environment = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *line], os.environ | {"PYTHONPATH": root}
    else:
        (tmp_path / "sitecustomize.py").write_text(NOBODY)
        environment = os.environ | {"PYTHONPATH": f"{root}:{tmp_path}", "LC_ALL": "C"}
        for name in ("HOME", "XDG_CACHE_HOME"):
            environment.pop(name, None)
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "run/summary.json").exists() and (tmp_path / "run/confusion.png").exists()


def test_P6_a_device_that_is_not_there_is_refused(tmp_path):
    """One that no machine has: this one's GPU, if any, is not asked for."""
    line = [sys.executable, "-m", "experiments.rotation", *TINY]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "abacus"}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and list(tmp_path.iterdir()) == []
    assert len(done.stderr.splitlines()) == 1 and len(done.stderr) < 300
    assert "JAX finds no device for JAX_PLATFORMS=abacus (Unable to" in done.stderr and "jax[cuda12]" in done.stderr


def test_P6_a_gpu_that_jax_does_not_see_is_refused(monkeypatch):
    def devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(UsageError, match=r"\(it sees none\); install jax\[cuda12\]"):
        processes.check_devices()


def starved(connection, workdir, memory):
    """The command, on a device that is too small unless there is `memory`."""

    def fit(*arguments, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes." * 9)
        yield

    if not memory:
        rotjax.training.fit = fit
    sys.argv = ["rotation", *TINY, f"--workdir={workdir}"]
    return command.main(rotjax.Rotation)


def test_P6_out_of_memory_is_a_line_and_the_same_command_goes_on(start, tmp_path):
    for memory, code in ((False, 2), (True, 0)):
        process, _ = start(tmp_path / str(memory), starved, tmp_path / "run", memory)
        process.join(timeout=600)
        assert process.exitcode == code
    last = (tmp_path / "False").read_text().splitlines()[-1]
    assert last.startswith("rotjax: out of memory (RESOURCE_EXHAUSTED: ") and last.endswith(
        "; lower --batch_size, or say --augment=host"
    )
    assert len(last) < 300 and "Traceback" not in (tmp_path / "False").read_text()


def test_help_says_the_defaults_of_the_presets_and_of_the_data_sets(call):
    code, out, _ = call("rotation", "--help")
    assert code == 0
    for words in (
        "--learning_rate",
        "0.01; digits 0.001; sgd 0.1 for a batch of 128",
        "(default: 45; digits 8; strong 100)",
        "--rotations",
        "--workdir",
    ):
        assert words in " ".join(out.split()), words
    assert "None" not in out and "--classes" not in out


def test_a_reader_of_the_help_may_go(tmp_path):
    words = [sys.executable, "-m", "experiments.rotation", "--help"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_thin_batches_of_several_devices_are_told(monkeypatch, notes):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    command.warn_of_thin_batches(64)
    assert notes == []
    command.warn_of_thin_batches(63)
    assert [note.partition(";")[0] for note in notes] == ["each of 2 devices gets 31 images of a batch"]


def test_a_run_of_few_steps_is_told(images, notes):
    data, recipe = (
        rotjax.Dataset("pets", ("a", "b", "c"), images, images),
        rotjax.Rotation(stem="cifar", width=4, batch_size=8),
    )
    for options in (dict(epochs=50), dict(epochs=3, max_steps=2), dict(epochs=3)):
        assert notes == []
        command.warn_of_few_steps(rotjax.plan(dataclasses.replace(recipe, **options), data=data))
    few = rotjax.Classification(stem="cifar", width=4, batch_size=32, epochs=50, subset=11)
    command.warn_of_few_steps(rotjax.plan(few, data=data))
    assert notes == [
        "only 18 steps in all (3 epochs of 6), which may be too few; raise --epochs",
        "only 50 steps in all (50 epochs of 1), which may be too few; lower --batch_size to 8",
    ]
