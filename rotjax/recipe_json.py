"""Recipes as recipe.json holds them."""

import dataclasses
import json
from typing import Any

from rotjax import presets
from rotjax.errors import CheckpointError, UsageError, few
from rotjax.recipe import JOBS, Recipe, check

SCHEMA = 1
MOST = 4  # fields in a line


def to_json(recipe: Recipe) -> dict[str, Any]:
    """A dict of JSON's types with the job and the schema."""
    return {"schema": SCHEMA, "job": recipe.job} | json.loads(json.dumps(dataclasses.asdict(recipe)))


def from_json(values: dict[str, Any], where: str) -> Recipe:
    """The recipe stored `where`; fields that an older rotjax did not know have the values that it worked with.

    Raises CheckpointError for what is not a recipe, one of a newer schema, or one with values that no recipe can have.
    """
    if not isinstance(values.get("schema"), int) or values.get("job") not in list(JOBS):
        raise CheckpointError(f"{where} is not a recipe; point at a workdir that rotjax wrote")
    values = dict(values)
    schema, kind = values.pop("schema"), JOBS[values.pop("job")]
    unknown = set(values) - {f.name for f in dataclasses.fields(kind)}
    if schema > SCHEMA or unknown:
        raise CheckpointError(f"{where} was written by a newer rotjax (schema {schema}, here {SCHEMA}); upgrade rotjax")
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    recipe = kind(**(presets.REPORT[kind.job] | fields))  # what was not known was not done, whatever the preset
    try:
        check(recipe)
    except UsageError as error:
        raise CheckpointError(f"{where} is not a recipe ({error}); name another workdir") from error
    return recipe


def differences(saved: Recipe, asked: Recipe) -> str:
    """`field saved -> asked` for each field that differs, in one line; of another job, or many, the first say enough."""
    old, new = to_json(saved), to_json(asked)
    odd = [f"{k} {old.get(k)} -> {new.get(k)}" for k in old | new if old.get(k) != new.get(k)]
    return few(odd, MOST if saved.job == asked.job else 1)
