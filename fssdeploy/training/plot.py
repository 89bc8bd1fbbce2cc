"""The plot of a run, drawn from its log."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from fssdeploy.files import storage_error  # noqa: E402
from fssdeploy.training.loop import read_log  # noqa: E402

# Everything else in a log line is a loss or a progress figure.
_BOOKKEEPING = ("step", "rate", "examples_per_second", "skipped")
_LOSSES = ("loss", "final", "prior")


def plot_run(out: Path, title: str) -> Path:
    """Losses on the left, other figures on the right, over the steps; writes OUT/run.png. MachineError if it cannot."""
    lines = read_log(out)
    names = [name for name in (lines[0] if lines else {}) if name not in _BOOKKEEPING]
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), dpi=120)
    for name in names:
        panel = panels[0] if name in _LOSSES else panels[1]
        panel.plot([line["step"] for line in lines], [line[name] for line in lines], label=name, linewidth=1.3)
    for panel, what in zip(panels, ("losses", "on the training examples"), strict=True):
        panel.set_xlabel("step")
        panel.set_title(what, fontsize=10)
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    file = out / "run.png"
    try:
        figure.savefig(file)
    except OSError as error:
        raise storage_error(error, file) from error
    finally:
        plt.close(figure)
    return file
