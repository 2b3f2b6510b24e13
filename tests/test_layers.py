"""Imports point down, each library has one home, and what is heavy is loaded by who uses it."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOMES = {
    "orbax": {"checkpoints.py"},
    "grain": {"data/batches.py"},
    "tensorflow_datasets": {"data/catalogue.py", "data/prepared.py"},
}


def imported(path):
    """The top-level names of what the module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


MODULES = {path.relative_to(ROOT / "rotjax").as_posix(): {*imported(path)} for path in (ROOT / "rotjax").rglob("*.py")}


def test_the_library_knows_neither_the_commands_nor_what_they_draw_with():
    assert len(MODULES) > 30
    assert not {path for path, names in MODULES.items() if names & {"experiments", "matplotlib", "tqdm", "tyro"}}


def test_orbax_grain_and_tfds_are_known_in_one_place():
    for library, homes in HOMES.items():
        assert {path for path, names in MODULES.items() if library in names} == homes


def test_importing_the_library_loads_neither_tfds_nor_matplotlib():
    program = "import sys, rotjax; sys.exit(bool({'tensorflow_datasets', 'matplotlib', 'tqdm'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
