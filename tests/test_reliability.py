"""The page about faults: made from what pytest leaves, and the committed one shows every row that is promised."""

import json

import pytest

from experiments import reliability
from experiments.outcomes import RESULTS
from rotjax.errors import DataError, UsageError

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_R1_killed" time="2.5">
<properties><property name="trials" value="20"/></properties></testcase>
<testcase classname="tests.test_a" name="test_R1_again[x]" time="0.5"/>
<testcase classname="tests.test_a" name="test_C2_cut" time="1"><failure message="no"/></testcase>
<testcase classname="tests.test_a" name="test_C10_full" time="0"><skipped message="not root"/></testcase>
<testcase classname="tests.test_a" name="test_of_no_row" time="9"/>
</testsuite></testsuites>"""

FAULTS = {
    "R1": {"expected": "goes on", "found": ["it did not"]},
    "C2": {"expected": "is noticed"},
    "C10": {"expected": "is refused"},
    "D1": {"expected": "is said"},
    "D8": {"expected": "is waited for", "why_not": "there is none"},
}


@pytest.fixture
def xml(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(JUNIT)
    return path


def test_what_pytest_left_is_counted_by_row(xml):
    rows = reliability.outcome([xml, xml])["rows"]
    assert list(rows) == ["C2", "C10", "R1"]
    assert rows["R1"] == dict(tests=4, trials=42, passed=4, failed=0, skipped=0, seconds=6.0)
    assert rows["C2"] == dict(tests=2, trials=2, passed=0, failed=2, skipped=0, seconds=2.0)
    assert rows["C10"] == dict(tests=2, trials=0, passed=0, failed=0, skipped=2, seconds=0.0)


def test_the_page_hides_no_failure_and_nothing_that_was_skipped_or_not_run(xml):
    text = reliability.page(reliability.outcome([xml]), FAULTS)
    for line in (
        "| R1 | goes on | 2 | 21 | passed | 3.0 |",
        "| C2 | is noticed | 1 | 1 | 0 passed, **1 failed** | 1.0 |",
        "| C10 | is refused | 1 | 0 | 0 passed, 1 skipped | 0.0 |",
        "| D1 | is said | 0 | 0 | **not run** |  |",
        "| D8 | is waited for | there is none |",
        "| R1 | it did not |",
    ):
        assert line in text.splitlines()
    assert "2 of 4 tests passed, 1 failed, 1 skipped; 22 trials" in text


def test_the_command_makes_the_page_and_makes_it_anew(xml, tmp_path):
    with pytest.raises(UsageError, match="no .*reliability.json yet"):
        reliability.run((), tmp_path)
    reliability.run((xml,), tmp_path)
    page = (tmp_path / "reliability.md").read_text()
    (tmp_path / "reliability.md").unlink()
    reliability.run((), tmp_path)
    assert (tmp_path / "reliability.md").read_text() == page


def test_what_is_no_run_of_the_tests_is_refused(tmp_path):
    (tmp_path / "cut.xml").write_text(JUNIT[:99])
    (tmp_path / "other.xml").write_text("<testsuites/>")
    (tmp_path / "odd.xml").write_text('<testsuites><testcase name="test_R1_x" time=""/></testsuites>')
    for name, error, message in (
        ("absent.xml", UsageError, "cannot be read"),
        ("cut.xml", DataError, "is not what pytest"),
        ("odd.xml", DataError, "is not what pytest"),
        ("other.xml", DataError, "no test of a fault"),
    ):
        with pytest.raises(error, match=message):
            reliability.outcome([tmp_path / name])
    with pytest.raises(UsageError, match="made in a clone"):
        reliability.known(tmp_path / "faults.json")


def test_the_committed_page_is_made_from_the_committed_counts_and_shows_every_row():
    counts, faults = json.loads((RESULTS / "reliability.json").read_text()), reliability.known()
    assert reliability.page(counts, faults) == (RESULTS / "reliability.md").read_text()
    shown = {code for code, row in counts["rows"].items() if row["passed"] and not row["failed"]}
    assert shown >= {code for code, fault in faults.items() if "why_not" not in fault}
