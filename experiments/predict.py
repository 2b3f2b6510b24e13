"""What a trained network sees in new images: `python -m experiments.predict --help`."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np

import rotjax
from experiments import command, figures, plots
from experiments.flags import default
from experiments.report import complain, say
from rotjax import files, processes
from rotjax.data import photographs
from rotjax.data.folders import shown
from rotjax.errors import DataError, UsageError, few

TOGETHER, ROOM = 1024, 2**28  # images in memory at once, and bytes of them
LISTED = 20  # classes in the printed summary


def main() -> int:
    """Parses the flags and predicts; returns the exit code."""
    return command.cli(run, "predict", resumes=False)


def run(pretrained: Path, images: Path, output: Annotated[Path | None, default("the workdir")] = None) -> None:
    """Say which class a trained network sees in each image of a folder; if it was trained on rotations, which turn.

    It leaves a table, predictions-<folder>.csv: each file, the prediction, its probability, and that of every class;
    and predictions-<folder>.png, some of the images with what was predicted. A hash in the name tells folders apart.
    Turns are counter-clockwise: what is predicted as 90° is upright once turned clockwise by as much.

    Args:
        pretrained: Workdir of the run whose network it is.
        images: Folder of images, also in folders below it, of any size; they are scaled and cut as in training.
        output: Folder, outside the images', that gets the table and the picture.
    """
    command.check_folder("images", images, there=True)
    command.check_folder("output", output)
    if output and output.resolve().is_relative_to(images.resolve()):
        where = f"--output={shown(output)} lies in --images={shown(images)}"
        raise UsageError(f"{where}, and its picture would be among them next time; name a folder outside")
    processes.check_devices()
    command.cache_compilations()
    model, variables, recipe = rotjax.load(pretrained)
    names = photographs.listed(images)
    stem = f"predictions-{images.resolve().name[:40]}-{command.mark(images)}"
    folder = command.made(output or pretrained, "name another folder, --output")
    table, sheet = (folder / f"{stem}.{kind}" for kind in ("csv", "png"))
    spread = figures.evenly(len(names))
    guesses, drawn, unreadable = Counter[int](), [], []

    def rows() -> Iterator[list[str]]:
        yield ["file", "prediction", "probability", *recipe.classes]
        seen = command.decoding(predicted(model, variables, recipe, images, names), total=len(names))
        for number, (name, (pixels, given)) in enumerate(zip(names, seen, strict=True)):
            if given is None:
                unreadable.append(f"{shown(name)} ({shown(pixels)})")
                yield [name, *[""] * (2 + len(recipe.classes))]
                continue
            guess = int(given.argmax())
            guesses[guess] += 1
            if number in spread or not drawn:
                drawn.append((pixels, guess, given[guess]))
            yield [name, recipe.classes[guess], *(f"{value:.6f}" for value in (given[guess], *given))]
        if not guesses:
            raise DataError(f"none of the {len(names):,} images in {shown(images)} can be read: {few(unreadable)}")

    files.write_csv(table, rows())
    _draw(sheet, drawn, recipe, guesses.total(), images)
    if unreadable:
        what = f"{len(unreadable):,} of {len(names):,} images cannot be read and have no prediction"
        complain(f"{what}: {few(unreadable)}")
    for guess, count in guesses.most_common(LISTED):
        say(f"{count:9,}  {shown(recipe.classes[guess])}")
    if len(guesses) > LISTED:
        say(f"{'':9}  and {len(guesses) - LISTED} more")
    say(f"\n{shown(table)}\n{shown(sheet)}")


def predicted(
    model: rotjax.Classifier, variables: dict, recipe: rotjax.Recipe, folder: Path, names: Sequence[str]
) -> Iterator[tuple[np.ndarray | str, np.ndarray | None]]:
    """Of each of `names` in `folder` the pixels and the probabilities f32 `[C]`, or why it cannot be read and None."""
    size = recipe.image_size
    together = max(1, min(TOGETHER, ROOM // (3 * size**2)))
    batch_size = min(recipe.batch_size, together, len(names))
    together -= together % batch_size
    for begin in range(0, len(names), together):
        squares = photographs.squares(folder, names[begin : begin + together], size)
        read = [square for square in squares if not isinstance(square, str)]
        read += [np.zeros((size, size, 3), np.uint8)] * (-len(read) % batch_size)  # or a smaller batch would compile anew
        given = iter(rotjax.probabilities(model, variables, np.stack(read), batch_size=batch_size) if read else ())
        for square in squares:
            yield square, None if isinstance(square, str) else next(given)


def _draw(path: Path, drawn: Sequence[tuple], recipe: rotjax.Recipe, count: int, folder: Path) -> None:
    """Draws some of `count` images in `folder`: of each the pixels, the prediction and its probability."""
    images, guesses, sure = zip(*drawn, strict=True)
    title = f"Predicted {figures.what(recipe)}"
    caption = f"{plots.short(folder.resolve().name, 40)}: {figures.shown_of(len(drawn), count, 'images')}"
    with plots.styled():
        plots.save(plots.predictions(images, guesses, guesses, sure, recipe.classes, title, caption), path)


if __name__ == "__main__":
    sys.exit(main())
