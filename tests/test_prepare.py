"""Archives, made here and read from disk or from a server on loopback, become sets that TFDS's own reader reads."""

import fcntl
import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
from contextlib import closing, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import hashing, shuffle

from experiments import archives, prepare
from experiments.archives import Archive
from rotjax.data import catalogue, prepared
from rotjax.errors import DataError, InUseError, in_bytes

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def pack(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def described(path, url="http://127.0.0.1:9/archive.tgz"):
    data = path.read_bytes()
    return Archive(url, len(data), hashlib.sha256(data).hexdigest())


@pytest.fixture(scope="module")
def cifar10():
    """Rows as CIFAR-10's binary files have them: u8 [26, 3073], the last six of them the test batch."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (26, 3073), dtype=np.uint8)
    rows[:, 0] %= 10
    return rows


@pytest.fixture
def cifar10_file(tmp_path, cifar10):
    root, batches = "cifar-10-batches-bin", [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]
    parts = dict(zip(batches, np.split(cifar10, (4, 8, 12, 16, 20)), strict=True))
    files = {f"{root}/{name}": parts[name].tobytes() for name in reversed(batches)}  # in no order, as in the real one
    files |= {f"{root}/batches.meta.txt": "\n".join([*NAMES, "", ""]).encode(), f"{root}/readme.html": b"x"}
    return pack(tmp_path / "cifar.tar.gz", files)


@pytest.fixture
def imagenette_jpegs():
    """Path in the archive -> JPEG of its own size and colour."""
    jpegs = {}
    for number in range(12):
        part, label = ("train", "val")[number % 3 == 2], ("n01440764", "n03888257")[number % 2]
        buffer = io.BytesIO()
        Image.new("RGB", (160 + number, 200), (20 * number, 0, 99)).save(buffer, "JPEG")
        jpegs[f"imagenette2-160/{part}/{label}/{label}_{number}.JPEG"] = buffer.getvalue()
    return jpegs


def official(name, split, data_dir) -> Any:
    """What TFDS itself reads, whose annotations say little."""
    return tfds.data_source(name, split=split, data_dir=data_dir, download=False)


def test_cifar10(tmp_path, cifar10, cifar10_file, notes):
    folder = prepare.prepare("cifar10", tmp_path, cifar10_file, archive=described(cifar10_file))
    assert folder == tmp_path / "cifar10" / "3.0.2"
    assert notes == [f"preparing cifar10 from {cifar10_file}"]
    pixels = cifar10[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    dataset = prepared.load("cifar10", 32, tmp_path)
    assert dataset.classes == tuple(NAMES)
    for split, offset, count, arrays in (("train", 0, 20, dataset.train), ("test", 20, 6, dataset.test)):
        source = official("cifar10", split, tmp_path)
        assert len(source) == count
        rows = [int(record["id"].decode().removeprefix(f"{split}_")) + offset for record in source]
        assert sorted(rows) == list(range(offset, offset + count))
        for read, ours in (([r["image"] for r in source], arrays["image"]), ([r["label"] for r in source], arrays["label"])):
            np.testing.assert_array_equal(np.stack(read), ours)
        np.testing.assert_array_equal(arrays["image"], pixels[rows])
        np.testing.assert_array_equal(arrays["label"], cifar10[rows, 0])
    assert "tensorflow" not in sys.modules


def test_cifar10_is_the_catalogues(tmp_path, cifar10_file):
    folder = prepare.prepare("cifar10", tmp_path, cifar10_file, archive=described(cifar10_file))
    ours, catalogues = tfds.builder_from_directory(folder), tfds.builder("cifar10", data_dir=tmp_path / "none")
    assert ours.info.full_name == catalogues.info.full_name
    assert repr(ours.info.features) == repr(catalogues.info.features)
    assert ours.info.supervised_keys == catalogues.info.supervised_keys
    assert ours.info.as_proto.module_name == catalogues.info.as_proto.module_name
    # TFDS orders by a hash of the key, salted with the split
    hasher = hashing.Hasher("train")
    keys = sorted(range(20), key=hasher.hash_key)
    assert [record["id"].decode() for record in official("cifar10", "train", tmp_path)] == [f"train_{k:05d}" for k in keys]


def test_imagenette(tmp_path, imagenette_jpegs):
    file = pack(tmp_path / "imagenette.tgz", imagenette_jpegs | {"imagenette2-160/train/n01440764/.DS_Store": b"x"})
    folder = prepare.prepare("imagenette/160px-v2", tmp_path, file, archive=described(file))
    assert folder == tmp_path / "imagenette" / "160px-v2" / "1.0.0"
    dataset = prepared.load("imagenette", 160, tmp_path)
    assert len(dataset.classes) == 10
    for split, part, arrays in (("train", "train", dataset.train), ("validation", "val", dataset.test)):
        expected = {data: path.split("/")[2] for path, data in imagenette_jpegs.items() if path.split("/")[1] == part}
        builder: Any = tfds.builder("imagenette/160px-v2", data_dir=tmp_path)
        records = list(builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}))
        assert {r["image"]: dataset.classes[r["label"]] for r in records} == expected
        assert arrays["image"].shape == (len(expected), 160, 160, 3)
        assert [dataset.classes[label] for label in arrays["label"]] == [expected[r["image"]] for r in records]
        middle: Any = [Image.open(io.BytesIO(record["image"])).getpixel((80, 80)) for record in records]
        np.testing.assert_allclose(arrays["image"][:, 80, 80], middle, atol=3)


def test_what_is_prepared_stays(tmp_path, cifar10_file):
    folder = prepare.prepare("cifar10", tmp_path, cifar10_file, archive=described(cifar10_file))
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}
    cifar10_file.unlink()
    assert prepare.prepare("cifar10", tmp_path, cifar10_file) == folder
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()} == before


def test_what_is_prepared_otherwise_is_refused(tmp_path, cifar10_file):
    folder = prepare.prepare("cifar10", tmp_path, cifar10_file, archive=described(cifar10_file))
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match=f"^{folder} has no readable dataset_info.json"):
        prepare.prepare("cifar10", tmp_path, cifar10_file, archive=described(cifar10_file))


@pytest.mark.parametrize("last", ["shuffle.Shuffler.add", "dataset_info.DatasetInfo.write_to_directory"])
def test_D7_killed_and_run_again(tmp_path, cifar10_file, last):
    """SIGKILL with the first example, and with everything written but not yet in its place."""
    archive = described(cifar10_file)
    script = (
        "import os, signal; from pathlib import Path; from experiments import prepare\n"
        "from tensorflow_datasets.core import dataset_info, shuffle\n"
        f"{last} = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"prepare.prepare('cifar10', Path({str(tmp_path)!r}), Path({str(cifar10_file)!r}), archive=prepare.{archive!r})"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert child.returncode == -signal.SIGKILL, child.stderr
    (leftover,) = (tmp_path / "cifar10").iterdir()
    assert leftover.name.startswith("incomplete.")
    with pytest.raises(DataError, match="cifar10 is not prepared"):
        prepared.load("cifar10", 32, tmp_path)
    folder = prepare.prepare("cifar10", tmp_path, cifar10_file, archive=archive)
    assert list((tmp_path / "cifar10").iterdir()) == [folder]
    assert len(official("cifar10", "train", tmp_path)) == 20


def test_sets_beyond_a_gigabyte(tmp_path, monkeypatch, cifar10_file):
    """Imagenette in full size, which TFDS would put in order by way of files that TensorFlow writes."""
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 0)
    prepare.prepare("cifar10", tmp_path, cifar10_file, archive=described(cifar10_file))
    assert len(official("cifar10", "train", tmp_path)) == 20


def test_one_at_a_time(tmp_path, cifar10_file):
    archive = described(cifar10_file)
    (tmp_path / "downloads").mkdir()
    with open(tmp_path / "downloads" / "archive.tgz.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InUseError, match="another process"):
            prepare.prepare("cifar10", tmp_path, cifar10_file, archive=archive)
    assert not (tmp_path / "cifar10").exists()


@pytest.mark.parametrize("damage", ["another", "shorter"])
def test_wrong_file(tmp_path, cifar10_file, damage):
    archive, data = described(cifar10_file), bytearray(cifar10_file.read_bytes())
    if damage == "another":
        data[100] ^= 1
        expected = f"^{cifar10_file} has the SHA-256 {hashlib.sha256(data).hexdigest()}, expected {archive.checksum}; fetch"
    else:
        del data[-1]
        expected = f"^{cifar10_file} has {len(data)} bytes, not the {archive.size} of {archive.url}; fetch"
    cifar10_file.write_bytes(data)
    with pytest.raises(DataError, match=expected):
        prepare.prepare("cifar10", tmp_path / "data", cifar10_file, archive=archive)
    assert not (tmp_path / "data").exists()
    assert cifar10_file.read_bytes() == data


def test_no_tar_file(tmp_path):
    file = tmp_path / "archive"
    file.write_bytes(b"no tar file")
    with pytest.raises(DataError, match=f"^{file} cannot be unpacked .*; fetch http"):
        prepare.prepare("cifar10", tmp_path, file, archive=described(file))
    assert list((tmp_path / "cifar10").iterdir()) == []


def test_nowhere_to_write(tmp_path, cifar10_file):
    (tmp_path / "file").touch()
    for data_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match=f"^cifar10 cannot be prepared in {data_dir}.*; name another --data_dir$"):
            prepare.prepare("cifar10", data_dir, cifar10_file, archive=described(cifar10_file))


def test_disk_too_small(tmp_path):
    with pytest.raises(DataError, match=r"\d\.\d [kMG]B are free and 2,000,000,000\.0 GB needed; make room"):
        prepare.prepare("cifar10", tmp_path / "data", archive=Archive("http://127.0.0.1:9/x", 10**18, ""))
    assert not (tmp_path / "data").exists()


def test_catalogue():
    found = {name: archives.catalogued(name.partition("/")[0], filename) for name, filename in prepare.ARCHIVES.items()}
    assert set(found) == {"cifar10", *(f"imagenette/{config}" for config in catalogue.IMAGENETTE)}
    assert {name: round(archive.size / 1e6) for name, archive in found.items()} == catalogue.MEGABYTES
    assert found["cifar10"] == Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        170052171,
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    )
    assert found["imagenette/160px-v2"].url.endswith("/imagenette2-160.tgz")
    assert all(archive.url.startswith("https://") and len(archive.checksum) == 64 for archive in found.values())


class Server(ThreadingHTTPServer):
    """Serves `data`; `cuts[n]` is how many bytes of it request n gets at most, before the connection is closed."""

    daemon_threads = False

    def __init__(self, data, cuts=(), ranges=True):
        self.data, self.cuts, self.ranges, self.asked = data, list(cuts), ranges, []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def archive(self):
        return Archive(f"http://127.0.0.1:{self.server_port}/a.tgz", len(self.data), hashlib.sha256(self.data).hexdigest())


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self):
        asked = self.headers["Range"] or ""
        self.server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-") or 0) if self.server.ranges else 0
        body = self.server.data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.server.data) - 1}/{len(self.server.data)}")
        self.end_headers()
        self.wfile.write(body[: self.server.cuts.pop(0)] if self.server.cuts else body)

    def log_message(self, format, *arguments):
        pass


@contextmanager
def serving(*arguments, **options):
    with Server(*arguments, **options) as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


DATA = np.random.default_rng(1).bytes(300_000)


def test_download(tmp_path, cifar10_file, notes):
    with serving(cifar10_file.read_bytes()) as server:
        prepare.prepare("cifar10", tmp_path, archive=server.archive)
    assert server.asked == [""]
    assert len(prepared.load("cifar10", 32, tmp_path).train["label"]) == 20
    kept = tmp_path / "downloads" / "a.tgz"
    assert kept.read_bytes() == cifar10_file.read_bytes()
    assert f"downloading {server.archive.url}, {in_bytes(server.archive.size)}" in notes
    assert f"{kept} is there; once cifar10 is prepared it may be removed" in notes


def test_a_download_is_not_repeated(tmp_path):
    with serving(DATA) as server:
        archives.fetch(server.archive, tmp_path / "a")
        archives.fetch(server.archive, tmp_path / "a")
    assert server.asked == [""]
    assert archives.lacking(server.archive, tmp_path / "a") == 0


def test_goes_on_where_the_connection_was_cut(tmp_path):
    with serving(DATA, cuts=[100_000, 50_000, 149_999]) as server:
        archives.fetch(server.archive, tmp_path / "a")
    assert server.asked == ["", "bytes=100000-", "bytes=150000-", "bytes=299999-"]
    assert (tmp_path / "a").read_bytes() == DATA


def test_goes_on_with_a_partial_file(tmp_path, notes):
    (tmp_path / "a.partial").write_bytes(DATA[:123_456])
    with serving(DATA) as server:
        assert archives.lacking(server.archive, tmp_path / "a") == 300_000 - 123_456
        archives.fetch(server.archive, tmp_path / "a")
    assert server.asked == ["bytes=123456-"]
    assert (tmp_path / "a").read_bytes() == DATA
    assert notes == [f"downloading {server.archive.url}, 123.5 kB of 300.0 kB are there"]
    assert not (tmp_path / "a.partial").exists()


def test_begins_anew_where_the_server_knows_no_ranges(tmp_path):
    (tmp_path / "a.partial").write_bytes(b"x" * 1000)
    with serving(DATA, cuts=[200_000], ranges=False) as server:
        archives.fetch(server.archive, tmp_path / "a")
    assert server.asked == ["bytes=1000-", "bytes=200000-"]
    assert (tmp_path / "a").read_bytes() == DATA


def test_gives_up_and_keeps_what_came(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "PATIENCE", (0, 0))
    with serving(DATA, cuts=[100_000, 0, 0, 0]) as server:
        with pytest.raises(
            DataError, match="closed the connection.*the same command resumes, 100.0 kB of 300.0 kB are there, or fetch"
        ):
            archives.fetch(server.archive, tmp_path / "a")
        assert len(server.asked) == 4
        assert (tmp_path / "a.partial").read_bytes() == DATA[:100_000]
        archives.fetch(server.archive, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA


def test_a_partial_file_of_something_else(tmp_path):
    (tmp_path / "a.partial").write_bytes(b"x" * 1000)
    with serving(DATA) as server:
        got = hashlib.sha256(b"x" * 1000 + DATA[1000:]).hexdigest()
        with pytest.raises(DataError, match=f"has the SHA-256 {got}, expected {server.archive.checksum}; fetch"):
            archives.fetch(server.archive, tmp_path / "a")
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "a.partial").write_bytes(b"x" * 300_001)
        archives.fetch(server.archive, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA


def test_wrong_checksum(tmp_path, cifar10_file):
    with serving(cifar10_file.read_bytes()) as server:
        archive = Archive(server.archive.url, server.archive.size, "0" * 64)
        with pytest.raises(DataError, match=f"has the SHA-256 {server.archive.checksum}, expected {'0' * 64}; fetch"):
            prepare.prepare("cifar10", tmp_path, archive=archive)
    assert not (tmp_path / "cifar10").exists()
    assert not list((tmp_path / "downloads").iterdir())


def test_another_file_at_the_url(tmp_path):
    """Such as the page that a network shows before it lets one in: what has come before stays."""
    (tmp_path / "a.partial").write_bytes(DATA[:1000])
    with (
        serving(b"<html>", ranges=False) as server,
        pytest.raises(DataError, match="sends byte 0 of 6, not byte 1000 of 300000"),
    ):
        archives.fetch(Archive(server.archive.url, 300_000, ""), tmp_path / "a")
    assert (tmp_path / "a.partial").read_bytes() == DATA[:1000]


def test_no_server(tmp_path):
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.tgz"
    expected = (
        rf"^{url} cannot be downloaded \(.*refused\); try again, or fetch that file by other means and add --archive=FILE$"
    )
    with pytest.raises(DataError, match=expected):
        prepare.prepare("cifar10", tmp_path, archive=Archive(url, 1, ""))


def test_D1_silent_server(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "TIMEOUT", 0.2)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.tgz"
        with pytest.raises(DataError, match="timed out"):
            archives.fetch(Archive(url, 1, ""), tmp_path / "a")


def test_refused_by_the_server(tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send_error(404))
    with serving(DATA) as server, pytest.raises(DataError, match="404"):
        archives.fetch(server.archive, tmp_path / "a")


def command(monkeypatch, capsys, *flags):
    """Exit code, stdout and stderr of `python -m experiments.prepare`."""
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, flags)])
    try:
        code = prepare.main()
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_command(tmp_path, monkeypatch, capsys, cifar10_file):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr(prepare, "catalogued", lambda *_: described(cifar10_file))
    data_dir = tmp_path / "data sets"
    for _ in range(2):  # the second finds it prepared
        code, out, err = command(monkeypatch, capsys, "cifar10", f"--archive={cifar10_file}", f"--data_dir={data_dir}")
        assert (code, err) == (0, "")
        use = f"python -m experiments.rotation --dataset=cifar10 --data_dir='{data_dir}'"
        assert out.splitlines()[-1] == f"cifar10 is prepared in {data_dir / 'cifar10' / '3.0.2'}; use it: {use}"


@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        (
            ["cifar10", "--archive=missing.tgz"],
            2,
            "rotjax: no file missing.tgz; give the archive from https://www.cs.toronto",
        ),
        (["cifar10", "--archive=."], 2, "rotjax: no file .; give the archive from https://www.cs.toronto"),
        (["cifar10", f"--archive={__file__}"], 3, "bytes, not the 170052171 of https://www.cs.toronto"),
        (["cifar10", "--image_size=64"], 2, "rotjax: --image_size=64"),
        (["imagenette", "--image_size=0"], 2, "rotjax: --image_size=0"),
        (["imagenette", "--image_size=224", f"--archive={__file__}"], 3, "imagenette2-320.tgz"),
        (["imagenette", f"--archive={__file__}"], 3, "imagenette2-160.tgz"),
        (["imagenette", "--image_size=321", f"--archive={__file__}"], 3, "imagenette2.tgz"),
        (["mnist"], 2, "mnist"),
    ],
)
def test_errors_of_the_command(tmp_path, monkeypatch, capsys, flags, code, expected):
    got, out, err = command(monkeypatch, capsys, *flags, f"--data_dir={tmp_path}")
    assert (got, out) == (code, "")
    assert expected in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
    if err.startswith("rotjax"):
        assert len(err.splitlines()) == 1


def test_R3_interrupted(request, tmp_path, monkeypatch, capsys, cifar10_file):
    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(prepare, "catalogued", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has jobs in the background ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    code, _, err = command(monkeypatch, capsys, "cifar10", f"--archive={cifar10_file}", f"--data_dir={tmp_path / 'data'}")
    assert (code, err) == (75, "rotjax: stopped; the same command resumes\n")
