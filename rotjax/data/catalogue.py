"""Where a prepared data set lies, or what to type to have it. Import it where needed: TFDS takes a while."""

import difflib
import os
import re
import shlex
from pathlib import Path

import tensorflow_datasets as tfds

from rotjax.errors import DataError, RotjaxError, UsageError, launcher, reason

MEGABYTES = {  # that experiments.prepare downloads
    "cifar10": 170, "imagenette/160px-v2": 99, "imagenette/320px-v2": 342, "imagenette/full-size-v2": 1557,
}  # fmt: skip
IMAGENETTE = {"160px-v2": 160, "320px-v2": 320, "full-size-v2": 512}  # the shorter sides in pixels, of the last about
NAME = re.compile(r"[A-Za-z_]\w*(/\w[\w.+-]*)?", re.ASCII)


def home(data_dir: str | Path | None) -> Path:
    """TFDS's folder of prepared data sets: `data_dir`, `$TFDS_DATA_DIR` or `~/tensorflow_datasets`; raises UsageError."""
    try:
        return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    except RuntimeError as error:
        raise UsageError(f"this user has no home folder ({error}); name the folder of data sets, data_dir=FOLDER") from error


def qualified(name: str, image_size: int) -> str:
    """`name`, with the smallest config that has enough pixels where it is imagenette."""
    if name != "imagenette":
        return name
    return f"{name}/{next((config for config, side in IMAGENETTE.items() if side >= image_size), 'full-size-v2')}"


def command(name: str, data_dir: Path) -> str:
    """What to type to have `name` prepared in `data_dir`."""
    kind, _, config = name.partition("/")
    elsewhere = data_dir != home(None)
    if name in MEGABYTES:
        size = f" --image_size={IMAGENETTE[config]}" if config not in ("", "160px-v2") else ""
        return f"{launcher()}python -m experiments.prepare {kind}{size}" + (
            f" --data_dir={shlex.quote(str(data_dir))}" if elsewhere else ""
        )
    where = f"TFDS_DATA_DIR={shlex.quote(str(data_dir))} " if elsewhere else ""
    packages = "--with=tensorflow-datasets,tensorflow,importlib-resources"
    script = f"import tensorflow_datasets as t;t.builder('{name}',file_format='array_record').download_and_prepare()"
    return f'{where}uv run --no-project -p3.12 {packages} python -c "{script}"'  # `tfds build` asks for more packages


def newest(name: str, data_dir: Path) -> Path:
    """The folder of the newest version of `name`, of its default config where it has configs and none is named.

    Raises UsageError for a name that is none, DataError for a set that is not prepared, saying what to type.
    """
    if not NAME.fullmatch(name):
        raise _unknown(name)
    versions = _versions(data_dir / name)
    if not versions and "/" not in name and (configs := _configs(name)):
        name = f"{name}/{configs[0]}"
        versions = _versions(data_dir / name)
    if not versions:
        raise _absent(name, data_dir)
    return data_dir / name / max(versions, key=tfds.core.Version)


def _versions(folder: Path) -> list[str]:
    """Names of the versions in `folder`; what a preparation that broke off has left is called otherwise."""
    return [name for name in _folders(folder) if tfds.core.Version.is_valid(name)]


def _folders(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({reason(error)}); name another data_dir") from error


def _configs(kind: str) -> list[str] | None:
    """Names of the configs of TFDS's set `kind`, the default one first, None where they cannot be looked up; raises
    UsageError where TFDS knows no such set.
    """
    if kind not in _catalogue():
        raise _unknown(kind)
    try:
        builder = tfds.builder_cls(kind)
    except ImportError:  # of a package that only preparing it takes
        return None
    default = builder.default_builder_config
    return sorted(builder.builder_configs, key=lambda config: config != default.name) if default else []


def _catalogue() -> list[str]:
    return tfds.list_builders(with_community_datasets=False)  # the community's would be asked for over the network


def _unknown(name: str) -> UsageError:
    known = ["digits", *_catalogue()]
    nearest = difflib.get_close_matches(name.lower().partition("/")[0], known)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    return UsageError(f"{name!r} is neither a folder nor a data set that TFDS knows{hint}; name one, or an existing folder")


def _absent(name: str, data_dir: Path) -> RotjaxError:
    kind, _, config = name.partition("/")
    configs = _configs(kind)
    if config and configs is not None and config not in configs:
        nearest = difflib.get_close_matches(config, configs) or configs[:5]
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ", it has none"
        return UsageError(f"{config!r} is no config of {kind}{hint}")
    there = [f"{kind}/{other}" for other in _folders(data_dir / kind) if _versions(data_dir / kind / other)]
    where = str(data_dir) if data_dir.is_dir() else f"{data_dir}, which does not exist"
    others = f" ({', '.join(there)} is)" if there else ""
    todo = f"run: {command(name, data_dir)}"
    if name in MEGABYTES:
        todo += f" (downloads {MEGABYTES[name]} MB; dataset=digits needs nothing)"
    elif data_dir != home(None):  # the command, which is long, says where
        return DataError(f"{name} is not prepared{others}; {todo}")
    return DataError(f"{name} is not prepared in {where}{others}; {todo}")
