"""What a person can do to a run without losing it: `faults.json` lists it, and a test that carries its code shows it."""

import ast
from pathlib import Path

from experiments.reliability import CODE, known

HERE = Path(__file__).parent


def test_every_fault_has_a_test_of_every_run_or_a_reason_why_not():
    trees = [ast.parse(path.read_text()) for path in HERE.glob("test_*.py")]
    tests = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    asked = [test for test in tests if not any("soak" in ast.unparse(mark) for mark in test.decorator_list)]
    tested = {found[1] for test in asked if (found := CODE.match(test.name))}
    assert tested == {code for code, fault in known().items() if not fault.get("why_not")}
