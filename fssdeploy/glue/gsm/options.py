"""Every choice that the GSM text leaves open, by name, and the switches of its three parts.

What each choice means, why its default is what it is: docs/gsm.md, whose rows the numbers in brackets are.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from fssdeploy.errors import InputError

ALLOWED: dict[str, tuple[Any, ...]] = {
    "evidence": ("raw", "aligned"),
    "broadcast": ("product", "geometric", "mean", "row", "column", "none"),
    "negative": ("shift", "clip", "exp", "keep"),
    "edge_resize": ("area", "bilinear"),
    "edge_cells": ("nearest", "watershed", "own", "single"),
    "connectivity": (4, 8),
    "laplacian": ("symmetric", "random_walk"),
    "assign": ("pivoted_qr", "kmeans"),
    "assign_binary": ("pivoted_qr", "kmeans", "sign"),
    "binary": ("cluster", "evidence"),
    "foreground": ("evidence", "overlap", "smaller"),
    "mask_to_grid": ("area", "any"),
}
# Parts on or off: the rows of the ablation table of the paper.
ABLATION: dict[str, dict[str, Any]] = {
    "A": {"tsr": False, "qsm": False, "rr": False},
    "B": {"tsr": True, "qsm": False, "rr": False},
    "C": {"tsr": True, "qsm": True, "rr": False},
    "D": {"tsr": False, "qsm": False, "rr": True},
    "E": {"tsr": True, "qsm": False, "rr": True},
    "F": {"tsr": True, "qsm": True, "rr": True},
}


@dataclass(frozen=True)
class GsmOptions:
    """The parts that are switched on, and the open choices; numbers are rows of docs/gsm.md."""

    tsr: bool = True
    qsm: bool = True
    rr: bool = True
    evidence: str = "raw"  # [1]
    gain: float | str = "auto"  # [2] a number, or "auto": 0.75 / standard deviation of S+ - S-
    broadcast: str = "product"  # [3]
    negative: str = "shift"  # [5]
    sigma: float | str = "auto"  # [6] cells, or "auto": 2, on grids above 37 in proportion
    edge_threshold: float | str = "mean"  # [8] "mean", "otsu" or a quantile, 0 to 1
    edge_resize: str = "area"  # [9]
    edge_cells: str = "nearest"  # [10]
    connectivity: int = 4  # [11]
    regions: int = 8  # [12]
    laplacian: str = "symmetric"  # [13]
    normalise_rows: bool = True  # [14] for k-means only
    assign: str = "pivoted_qr"  # [14]
    assign_binary: str = "pivoted_qr"  # [14]
    keep_diagonal: bool = True  # [15]
    foreground: str = "evidence"  # [16]
    binary: str = "cluster"  # [17]
    literal_mean: bool = False  # [19]
    temperature: float = 1.0  # [20]
    mask_to_grid: str = "area"  # [23]
    own_cell: bool = True  # [29]

    def __post_init__(self) -> None:
        for name, allowed in ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                choices = " or ".join(map(str, allowed))
                raise InputError("option_unknown", f"gsm {name} cannot be '{value}'", "", f"Choose {choices}.")
        if self.qsm and not self.tsr:
            raise InputError(
                "option_unknown", "gsm qsm needs tsr", "the mined regions are the proxy mask of tsr", "Switch tsr on."
            )
        self._check_number("gain", self.gain, 0, math.inf, words=("auto",))
        self._check_number("sigma", self.sigma, 0.1, 1000, words=("auto",))
        self._check_number("edge_threshold", self.edge_threshold, 0, 1, words=("mean", "otsu"))
        self._check_number("temperature", self.temperature, 1e-3, math.inf)
        self._check_number("regions", self.regions, 2, 256)

    @staticmethod
    def _check_number(name: str, value: float | str, least: float, most: float, words: tuple[str, ...] = ()) -> None:
        if value in words or (isinstance(value, int | float) and least <= value <= most):
            return
        choices = [*(f"'{word}'" for word in words), f"a number from {least:g} to {most:g}"]
        raise InputError("option_unknown", f"gsm {name} cannot be '{value}'", "", f"Give {' or '.join(choices)}.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> GsmOptions:
        """InputError for a name that is no option."""
        unknown = sorted(set(data) - {field.name for field in fields(GsmOptions)})
        if unknown:
            raise InputError("option_unknown", f"gsm has no option '{unknown[0]}'", "", "See docs/gsm.md.")
        return GsmOptions(**data)
