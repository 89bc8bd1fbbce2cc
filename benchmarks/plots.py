"""Plots of result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: E402

COLOURS = {
    "torch-recompute": "#8c8c8c",
    "torch": "#e07b39",
    "torch-compile": "#c9a227",
    "onnxruntime-portable": "#8fc1d4",
    "onnxruntime": "#2a7f9e",
    "openvino": "#5b4b9a",
}
LABELS = {
    "torch-recompute": "PyTorch, support recomputed",
    "torch": "PyTorch, enrolled",
    "torch-compile": "torch.compile, enrolled",
    "onnxruntime-portable": "ONNX Runtime, portable graph, enrolled",
    "onnxruntime": "ONNX Runtime, fused attention, enrolled",
    "openvino": "OpenVINO, enrolled",
}


def plot_latency(result: dict[str, Any], path: Path) -> None:
    """Query time against the number of shots, one line per variant, both axes logarithmic."""
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=140)
    ends: list[tuple[float, str, int]] = []
    for variant, colour in COLOURS.items():
        rows = [row for row in result["rows"] if row["variant"] == variant and row["case"] == "query"]
        if rows:
            shots, times = [row["shots"] for row in rows], [row["p50_ms"] for row in rows]
            axes.plot(shots, times, "o-", color=colour, label=LABELS[variant], linewidth=2)
            ends.append((times[-1], colour, shots[-1]))
    # Labels of lines that end close together are moved apart.
    lowest = 0.0
    for time, colour, x in sorted(ends):
        height = max(time, lowest * 1.18)
        lowest = height
        axes.text(x * 1.08, height, f"{time:,.0f} ms", color=colour, fontsize=8, va="center")
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({row["shots"] for row in result["rows"] if row["case"] == "query"})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("support pictures (shots)")
    axes.set_ylabel("one query, ms (median)")
    axes.set_title(
        f"{result['artifact']}, {result['image_size']} px, {result['precision']}, "
        f"{result['machine']['cores']} cores ({result['weights']} weights)",
        fontsize=10,
    )
    axes.grid(True, which="major", alpha=0.25)
    axes.margins(x=0.18)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
