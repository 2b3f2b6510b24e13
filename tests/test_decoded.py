"""The cache of decoded images: stored once, whole or not at all, found again, and never trusted when it is not whole."""

import hashlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import rotjax
from rotjax.data.decoded import before, decoded, fingerprint
from rotjax.errors import DataError

SIZE = 8
PIXELS = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
KEY = fingerprint("test")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "rotjax" / "decoded"


def records(start=0):
    first, last = zip(PIXELS[:3], (7, 8, 9), strict=True), zip(PIXELS[3:], (-1, 0), strict=True)
    return [*first, ("truncated", 9), *last][start:]


def never(start):
    raise AssertionError("decoded again")


def check(result):
    arrays, dropped = result
    np.testing.assert_array_equal(arrays["image"], PIXELS)
    np.testing.assert_array_equal(arrays["label"], np.array([7, 8, 9, -1, 0], np.int32))
    assert arrays["label"].dtype == np.int32
    assert not arrays["image"].flags.writeable and not arrays["label"].flags.writeable
    assert dropped == {3: "truncated"}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_stored_once_and_mapped(home, notes):
    check(decoded(KEY, 6, SIZE, records))
    assert notes == [f"decoding 6 images at 8 px into a 1.2 kB cache in {home / KEY}"]
    result = decoded(KEY, 6, SIZE, never)
    check(result)
    assert isinstance(result[0]["image"].base, np.memmap) and len(notes) == 1
    assert names(home) == [KEY]
    with pytest.raises(AssertionError, match="decoded again"):
        decoded(fingerprint("other"), 6, SIZE, never)


def test_key_depends_on_every_fact():
    facts = [("a", 1), ("a", 2), ("b", 1), ("a",), ("a", "1"), (["a", 1],)]
    assert len({fingerprint(*fact) for fact in facts}) == len(facts)
    assert fingerprint("a\udcff", {"x": 1, "y": 2}) == fingerprint("a\udcff", {"y": 2, "x": 1})


def flip(path):
    """Changes one bit, and neither the size nor the times of the file."""
    content, times = bytearray(path.read_bytes()), path.stat()
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "image.raw", 100),
        lambda folder: os.truncate(folder / "image.raw", 10_000),
        lambda folder: (folder / "image.raw").unlink(),
        lambda folder: os.truncate(folder / "label.npy", 0),
        lambda folder: os.truncate(folder / "label.npy", 140),
        lambda folder: flip(folder / "image.raw"),
        lambda folder: flip(folder / "label.npy"),
        lambda folder: flip(folder / "metadata.json"),
        lambda folder: np.save(folder / "label.npy", np.zeros(4, np.int32)),
        lambda folder: np.save(folder / "label.npy", np.zeros(5)),
        lambda folder: np.save(folder / "label.npy", np.array([{}] * 5), allow_pickle=True),
        lambda folder: (folder / "metadata.json").unlink(),
        lambda folder: (folder / "metadata.json").write_text(""),
        lambda folder: (folder / "metadata.json").write_text("[]"),
        lambda folder: (folder / "metadata.json").write_text("[" * 100_000),
        lambda folder: (folder / "metadata.json").write_text('{"count": "5", "dropped": {}}'),
        lambda folder: (folder / "metadata.json").write_text('{"count": 5, "dropped": 1}'),
    ],
)
def test_D4_damage_is_noticed_and_mended(home, damage, notes):
    check(decoded(KEY, 6, SIZE, records))
    damage(home / KEY)
    notes.clear()
    check(decoded(KEY, 6, SIZE, records))
    assert notes[0] == f"{home / KEY} is damaged, or not of this user; decoding again"
    check(decoded(KEY, 6, SIZE, never))
    assert names(home) == [KEY]


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_D4_a_cache_of_another_user_is_not_read(home, notes):
    check(decoded(KEY, 6, SIZE, records))
    os.chown(home / KEY, 12345, 12345)
    with pytest.raises(AssertionError, match="decoded again"):
        decoded(KEY, 6, SIZE, never)
    assert "not of this user" in notes[1]


def test_D4_killed_while_decoding(home, notes):
    """Another process decodes, this one waits for it, it is killed: this one decodes, and goes on with nothing unsaved."""
    program = f"""
import os, sys, threading, time, numpy as np
from rotjax.data.decoded import decoded
def records(start):
    yield np.zeros(({SIZE}, {SIZE}, 3), np.uint8), 0
    os.write(1, b"decoding\\n")  # at once: print interleaves with the other thread's
    time.sleep(600)
for key in sys.argv[1:]:
    threading.Thread(target=decoded, args=(key, 6, {SIZE}, records)).start()
"""
    keys = [KEY, fingerprint("never asked for again")]
    process = subprocess.Popen([sys.executable, "-c", program, *keys], stdout=subprocess.PIPE)
    with ThreadPoolExecutor(1) as pool:
        try:
            assert process.stdout and [process.stdout.readline() for _ in keys] == [b"decoding\n"] * 2
            result = pool.submit(decoded, KEY, 6, SIZE, records)
            deadline = time.monotonic() + 60
            while not notes and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not result.done() and {f"{key}.partial" for key in keys} <= set(names(home))
        finally:
            process.kill()
            process.communicate()
        check(result.result(60))
    assert process.returncode == -signal.SIGKILL
    assert f"in use by process {process.pid} on {socket.gethostname()}; waiting" in notes[0]
    assert "damaged" not in "".join(notes)
    left = [f"{keys[1]}.{kind}" for kind in ("lock", "partial")]  # for whoever asks for it, or needs the room
    assert names(home) == sorted([KEY, *left])


def stopped(start):
    yield from records()[start:5]
    raise KeyboardInterrupt


def stop():
    with pytest.raises(KeyboardInterrupt):
        decoded(KEY, 6, SIZE, stopped)


def test_R3_a_decode_that_is_stopped_goes_on_where_it_was(home, notes):
    asked = []

    def rest(start):
        asked.append(start)
        return records(start)

    stop()
    assert names(home) == [f"{KEY}.partial"]
    stop()
    check(decoded(KEY, 6, SIZE, rest))
    assert asked == [5] and notes[-1] == "5 of them are there already"
    check(decoded(KEY, 6, SIZE, never))
    assert names(home) == [KEY] and names(home / KEY) == ["image.raw", "label.npy", "metadata.json"]


def test_R3_a_decode_that_is_stopped_once_all_is_decoded_is_finished(home, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("rotjax.data.storage.digest", lambda path: next(stopped(5)))
        stop()
    check(decoded(KEY, 6, SIZE, lambda start: records(start)[: 6 - start]))


class Broken:
    """A SHA-256 beside which a signal arrives, just as it has taken its second record."""

    def __init__(self, digest, updates=0):
        self.digest, self.updates = digest, updates

    def copy(self):
        return Broken(self.digest.copy(), self.updates)

    def update(self, pixels):
        self.digest.update(pixels)
        self.updates += 1
        if self.updates == 2:
            raise KeyboardInterrupt

    def hexdigest(self):
        return self.digest.hexdigest()


def test_R3_a_decode_that_is_stopped_between_a_record_and_its_row_loses_none_before_it(home, monkeypatch):
    sha256 = hashlib.sha256
    home.mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "sha256", lambda content=b"": Broken(sha256(content)))
        with pytest.raises(KeyboardInterrupt):
            rotjax.data.storage.write(home / KEY, SIZE, records, ())
    asked = []
    check(decoded(KEY, 6, SIZE, lambda start: (asked.append(start), records(start))[1]))
    assert asked == [1]


def die(connection, home):
    os.environ["XDG_CACHE_HOME"] = str(home)
    rotjax.data.storage.SAVE_SECONDS = -1
    decoded(KEY, 6, SIZE, lambda start: (os.kill(os.getpid(), 9) if n == 4 else r for n, r in enumerate(records())))


def test_R1_a_decode_that_is_killed_goes_on_from_what_it_saved(start, tmp_path):
    process, _ = start(os.devnull, die, tmp_path)
    process.join()
    check(decoded(KEY, 6, SIZE, lambda start: records(start) if start == 4 else never(start)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda partial: os.truncate(partial / "image.raw", 4 * 192 - 1),
        lambda partial: (partial / "image.raw").unlink(),
        lambda partial: flip(partial / "image.raw"),
        lambda partial: (partial / "rows.json").unlink(),
        lambda partial: (partial / "rows.json").write_text('[7, 8, 9, "trunc'),
        lambda partial: (partial / "rows.json").write_text("[7, 8, 9, null, -1]"),
        lambda partial: (partial / "rows.json").write_text("7"),
        lambda partial: (partial / "rows.json").write_text('{"rows": [7, 8, 9, null, -1]}'),
        lambda partial: (partial / "rows.json").write_text('{"rows": [7, 8, 9, "truncated", -1]}'),
    ],
)
def test_D4_what_a_stopped_decode_left_is_not_trusted_where_it_is_damaged(home, damage):
    stop()
    damage(home / f"{KEY}.partial")
    check(decoded(KEY, 6, SIZE, lambda start: never(start) if start else records()))


def test_pixels_without_a_row_are_cut_off(home):
    stop()
    with open(home / f"{KEY}.partial" / "image.raw", "ab") as file:
        file.write(b"\1" * 100)
    check(decoded(KEY, 6, SIZE, records))


def test_what_others_left_goes_where_room_is_short_or_its_source_has_another_state(home, monkeypatch):
    usage, source = namedtuple("usage", "total used free"), "0" * 32
    decoded(f"{source}-{KEY}", 6, SIZE, records)
    (home / f"{source}-{'1' * 32}.partial").mkdir()
    stop()
    decoded(f"{source}-{'2' * 32}", 6, SIZE, records)
    assert names(home) == sorted([f"{source}-{'2' * 32}", f"{KEY}.partial"])
    free = iter([0, 10**9])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, next(free)))
    decoded(fingerprint("large"), 6, SIZE, records)
    assert names(home) == sorted([f"{source}-{'2' * 32}", fingerprint("large")])


FACTS = [(f"{number}.png", number, True) for number in range(6)]
SOURCE = "0" * 32
OTHER = f"{SOURCE}-{'1' * 32}"


def test_what_another_state_of_a_source_gave_is_known_by_its_facts(home):
    decoded(f"{SOURCE}-{KEY}", 6, SIZE, records, FACTS)
    given = before(OTHER, SIZE, [*FACTS, ("new.png", 6, True)])
    assert list(given) == [*FACTS[:3], *FACTS[4:]], "of a record without pixels there are none to be known"
    np.testing.assert_array_equal(np.stack([*given.values()]), PIXELS)
    assert list(before(OTHER, SIZE, FACTS[4:5])) == FACTS[4:5] and before(OTHER, SIZE, []) == {}
    for key, size in ((f"{SOURCE}-{KEY}", SIZE), (f"{'1' * 32}-{KEY}", SIZE), (KEY, SIZE), (OTHER, 2 * SIZE)):
        assert before(key, size, FACTS) == {}, "its own, another source's, of another size"
    decoded(OTHER, 6, SIZE, records)
    assert names(home) == [OTHER] and before(f"{SOURCE}-{KEY}", SIZE, FACTS) == {}, "which was decoded without facts"


def begin(folder):
    """Of what is finished what a process that is stopped before its last record leaves."""
    shutil.rmtree(folder)
    with pytest.raises(KeyboardInterrupt):
        decoded(folder.name, 6, SIZE, stopped, FACTS)
    return folder.with_name(f"{folder.name}.partial")


def test_what_a_stopped_decode_of_another_state_gave_is_known_by_its_facts(home):
    decoded(f"{SOURCE}-{KEY}", 6, SIZE, records, FACTS)
    begin(home / f"{SOURCE}-{KEY}")
    given = before(OTHER, SIZE, FACTS)
    assert list(given) == [*FACTS[:3], FACTS[4]]
    np.testing.assert_array_equal(np.stack([*given.values()]), PIXELS[:4])


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "image.raw"),
        lambda folder: (folder / "facts.json").unlink(),
        lambda folder: (folder / "facts.json").write_text("{}"),
        lambda folder: (folder / "facts.json").write_text(str([[[number]] for number in range(6)])),
        lambda folder: os.truncate(folder / "facts.json", 100),
        lambda folder: [(folder / name).write_text("[]") for name in ("metadata.json", "rows.json")],
    ],
)
def test_D4_what_another_state_gave_is_not_trusted_where_it_is_damaged(home, damage, finished):
    folder = home / f"{SOURCE}-{KEY}"
    decoded(folder.name, 6, SIZE, records, FACTS)
    damage(folder if finished else begin(folder))
    assert before(OTHER, SIZE, FACTS) == {}


def test_D4_what_another_state_gave_is_not_trusted_where_other_facts_may_be_meant(home):
    decoded(f"{SOURCE}-{KEY}", 6, SIZE, records, FACTS)
    flip(home / f"{SOURCE}-{KEY}" / "facts.json")
    assert before(OTHER, SIZE, FACTS) == {}


def test_D4_two_at_once_decode_once():
    both, asked = threading.Barrier(2), []

    def counted(start):
        asked.append(1)
        return records(start)

    def ask():
        both.wait()
        return decoded(KEY, 6, SIZE, counted)

    with ThreadPoolExecutor(2) as pool:
        for result in [pool.submit(ask) for _ in range(2)]:
            check(result.result())
    assert len(asked) == 1


def test_a_failed_decode_leaves_nothing(home):
    def failing(start):
        yield PIXELS[0], 0
        raise DataError("the archive is damaged")

    with pytest.raises(DataError, match="archive"):
        decoded(KEY, 6, SIZE, failing)
    with pytest.raises(ValueError, match=r"record 0 is float64 .*not uint8"):
        decoded(KEY, 6, SIZE, lambda start: [(np.zeros((SIZE, SIZE, 3)), 0)])
    assert names(home) == []


def test_too_little_room(home, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2_000_000_000))
    with pytest.raises(DataError, match=r"100,000 images at 224 px needs 15\.1 GB in .*, where 2\.0 GB are free"):
        decoded(KEY, 100_000, 224, never)
    assert names(home) == []


def test_disk_that_fills_up(home):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot decode into"):
            decoded(KEY, 1000, SIZE, lambda start: ((PIXELS[0], 0) for _ in range(1000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(home) == []


def test_F4_no_cache_folder(tmp_path, monkeypatch, notes):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        notes.clear()
        check(decoded(KEY, 6, SIZE, records))
        assert len(notes) == 1 and "kB of memory" in notes[0]
    with pytest.raises(DataError, match=r"no cache for 10,000 images at 224 px .*XDG_CACHE_HOME.*1\.5 GB"):
        decoded(KEY, 10_000, 224, never)


def test_nothing_readable():
    for source in (lambda start: [("empty", 0), ("empty", 1)][start:], never):
        arrays, dropped = decoded(KEY, 2, SIZE, source)
        assert arrays["image"].shape == (0, SIZE, SIZE, 3) and arrays["label"].shape == (0,)
        assert dropped == {0: "empty", 1: "empty"}
