"""What a person sees of a run: progress, a row per epoch, a summary, figures."""

import json
import sys
from pathlib import Path

from tqdm import tqdm


class Progress:
    """A bar over the steps on a terminal, and a line per epoch anywhere."""

    def __init__(self, plan):
        self.plan = plan

    def __enter__(self):
        self.bar = tqdm(total=self.plan.steps, unit="step", disable=None, leave=False)
        return self

    def __exit__(self, *_):
        self.bar.close()

    def note(self, line):
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def show(self, row):
        self.bar.n = row["step"]
        self.bar.refresh()
        if "test_accuracy" in row:
            self.note(
                f"epoch {row['epoch']:3d}  train loss {row['train_loss']:.4f}  accuracy {row['train_accuracy']:.4f}"
                f"  test loss {row['test_loss']:.4f}  accuracy {row['test_accuracy']:.4f}"
            )


def figures(workdir: Path, plan) -> None:
    pass


def summarise(workdir: Path) -> None:
    print(json.dumps(json.loads((workdir / "summary.json").read_text())))
