"""What a person can do to a run without losing it: `faults.json` lists it, and a test that carries its code shows it."""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_fault_has_a_test_or_a_reason_why_not():
    faults = json.loads((HERE / "faults.json").read_text())
    code = "\n".join(path.read_text() for path in HERE.glob("test_*.py"))
    tested = set(re.findall(r"^def test_([A-Z]\d+)_", code, re.MULTILINE))
    excused = {name for name, fault in faults.items() if isinstance(fault, dict) and fault["why_not"]}
    assert tested == set(faults) - excused
