"""Moves a named part of one network's variables into another's: dicts in, new dicts out."""

import jax
import numpy as np

from rotjax.errors import UsageError


def part(variables: dict, name: str) -> dict:
    """The subtree `name`, `'backbone'` or `'head'`, of each collection of `variables`, whose arrays it shares.

    Raises UsageError where none has it.
    """
    found = {collection: tree[name] for collection, tree in variables.items() if name in tree}
    if not found:
        there = sorted({name for tree in variables.values() for name in tree})
        raise UsageError(f"the variables have no part {name!r}; there are {', '.join(there)}")
    return found


def joined(parts: dict[str, dict]) -> dict:
    """The variables made of `parts` by name, the inverse of `part`."""
    collections = dict.fromkeys(collection for tree in parts.values() for collection in tree)
    return {c: {name: tree[c] for name, tree in parts.items() if c in tree} for c in collections}


def graft(variables: dict, name: str, donor: dict) -> dict:
    """`variables` with the part `name` replaced by `donor`, the same `part` of another network.

    The arrays are those of both: a step to which their state is donated deletes them; `init_state` copies. Raises UsageError
    unless both have the same paths, shapes and dtypes.
    """
    mine, theirs = _shapes(part(variables, name)), _shapes(donor)
    if mine != theirs:
        odd = sorted(path for path in mine | theirs if mine.get(path) != theirs.get(path))
        path = odd[0]
        raise UsageError(
            f"the {name}s differ in {len(odd)} arrays, first {path}: "
            f"{_say(theirs.get(path))} in the donor, {_say(mine.get(path))} here"
        )
    return {c: {**tree, **({name: donor[c]} if c in donor else {})} for c, tree in variables.items()}


def _shapes(tree: dict) -> dict[str, tuple]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): (np.shape(x), np.dtype(x.dtype)) for p, x in leaves}


def _say(leaf: tuple | None) -> str:
    return "absent" if leaf is None else f"{leaf[1]}{list(leaf[0])}"
