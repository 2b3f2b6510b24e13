"""The page about what can go wrong with a run, made from a run of the tests: `python -m experiments.reliability --help`."""

import json
import math
import platform
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import tyro

from experiments import command
from experiments.flags import ResultsDir, default
from experiments.outcomes import RESULTS, read_result
from experiments.report import say
from experiments.tables import table
from rotjax.errors import DataError, UsageError, reason
from rotjax.files import write, write_json
from rotjax.run import versions

FAULTS = Path(__file__).parents[1] / "tests" / "faults.json"
CODE = re.compile(r"test_([A-Z]\d+)_")  # how the name of a test begins that shows a row
COUNTS = ("tests", "trials", "passed", "failed", "skipped")


def main() -> int:
    """Parses the flags and writes the page; returns the exit code."""
    return command.cli(run, "reliability", resumes=False)


def run(
    xml: Annotated[tyro.conf.Positional[tuple[Path, ...]], default("those of the last page")] = (),
    results: ResultsDir = RESULTS,
) -> None:
    """Write the page about faults from what a run of the tests left.

    Args:
        xml: Files of `pytest --junitxml=FILE`.
        results: Folder of the results.
    """
    faults, counts, to = known(), results / "reliability.json", results / "reliability.md"
    command.check_folder("results", results, there=True)
    if xml:
        write_json(counts, outcome(xml))
    if not counts.is_file():
        raise UsageError(f"there is no {counts} yet; name the file that pytest --junitxml=FILE wrote")
    write(to, page(read_result(counts, "rows", "versions"), faults))
    say(str(to))


def known(path: Path = FAULTS) -> dict[str, dict]:
    """Every fault by its code: what is `expected`, `why_not` where no test shows it, failures `found` and fixed."""
    if not path.is_file():
        raise UsageError(f"there is no {path}; this page is made in a clone of the repository")
    return {
        code: {"expected": fault} if isinstance(fault, str) else fault
        for code, fault in json.loads(path.read_text()).items()
    }


def outcome(files: Iterable[Path]) -> dict:
    """What became of the tests in `files`, by the row that their names begin with; raises UsageError or DataError."""
    rows: defaultdict[str, Counter] = defaultdict(Counter)
    for name, counts in (case for path in files for case in _cases(path)):
        if found := CODE.match(name):
            rows[found[1]].update(counts)
    if not rows:
        raise DataError("no test of a fault is in what pytest left; run those in tests/")
    numbers = {
        code: {key: rows[code][key] for key in COUNTS} | {"seconds": round(rows[code]["seconds"], 1)} for code in rows
    }
    about = {"python": platform.python_version()} | versions("rotjax", "jax", "jaxlib", "orbax-checkpoint", "grain")
    return {"versions": about, "rows": dict(sorted(numbers.items(), key=lambda row: (row[0][0], int(row[0][1:]))))}


def _cases(path: Path) -> list[tuple[str, dict[str, float]]]:
    """The name and the counts of each test in `path`."""
    try:
        return [(case.get("name", ""), _counted(case)) for case in ElementTree.parse(path).iter("testcase")]
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({reason(error)}); name what pytest --junitxml=FILE wrote") from error
    except (ElementTree.ParseError, ValueError) as error:  # of a number that is none
        raise DataError(f"{path} is not what pytest --junitxml=FILE writes ({error}); run the tests again") from error


def _counted(case: ElementTree.Element) -> dict[str, float]:
    """A test's part in the counts; one that repeats what it does has said how often as its property `trials`."""
    skipped = case.find("skipped") is not None
    failed = case.find("failure") is not None or case.find("error") is not None
    said = [int(one.get("value", 1)) for one in case.iter("property") if one.get("name") == "trials"]
    return {
        "tests": 1,
        "trials": 0 if skipped else sum(said) or 1,
        "passed": int(not skipped and not failed),
        "failed": int(failed),
        "skipped": int(skipped),
        "seconds": float(case.get("time", 0)),
    }


def page(counts: Mapping, faults: Mapping[str, Mapping]) -> str:
    """The page about `faults` and what `counts`, as `outcome` makes them, say of each."""
    rows = counts["rows"]
    total = {key: sum(row[key] for row in rows.values()) for key in COUNTS}
    seconds = math.fsum(row["seconds"] for row in rows.values())  # the same sum on every Python
    shown = [(code, fault["expected"], *_line(rows.get(code))) for code, fault in faults.items() if "why_not" not in fault]
    without = [(code, fault["expected"], fault["why_not"]) for code, fault in faults.items() if "why_not" in fault]
    found = [(code, failure) for code, fault in faults.items() for failure in fault.get("found", ())]
    parts = [
        "# Reliability\n\nMade by `python -m experiments.reliability` from a run of the tests and `tests/faults.json`:\n"
        "what can go wrong with a run, what rotjax does then, and the tests whose names begin with the row's code.\n"
        "A trial is one injected fault, or one drawn input.",
        f"{total['passed']:,} of {total['tests']:,} tests passed, {total['failed']:,} failed, {total['skipped']:,} "
        f"skipped; {total['trials']:,} trials in {seconds:,.0f} s of tests; {_versions(counts['versions'])}.",
        table(("row", "expected", "tests", "trials", "outcome", "seconds"), shown),
        "## Rows without a test",
        table(("row", "expected", "why not"), without),
        "## Failures found and fixed",
        table(("row", "failure"), found),
    ]
    return "\n\n".join(parts) + "\n"


def _line(row: Mapping | None) -> tuple:
    """Tests, trials, outcome and seconds of a row."""
    if row is None:
        return 0, 0, "**not run**", ""
    passed = "passed" if row["passed"] == row["tests"] else f"{row['passed']} passed"
    others = [f"**{row['failed']} failed**"] if row["failed"] else []
    others += [f"{row['skipped']} skipped"] if row["skipped"] else []
    return row["tests"], row["trials"], ", ".join([passed, *others]), f"{row['seconds']:.1f}"


def _versions(about: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in about.items())


if __name__ == "__main__":
    sys.exit(main())
