"""Better affinity maps from the same features: the query as a reference (TSR), references weighed (RR).

Source: Xiao et al., "Training-free Boosting for Few-shot Segmentation via Generalizing Semantic Mining" (2026),
equations (1) and (9) to (14). Nothing here knows a host: only the maps that it made. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fssdeploy.errors import InputError
from fssdeploy.glue.gfsam.maps import unit
from fssdeploy.glue.gsm.graph import SolverFailureError, cosine_matrix
from fssdeploy.glue.gsm.options import GsmOptions
from fssdeploy.glue.gsm.qsm import mine_query
from fssdeploy.glue.gsm.regions import adaptive_average

CHUNK = 256
# One row a reference in each of these fields of Affinity.
REFERENCE_ROWS = ("positive", "peak", "negative", "prototype_fg", "prototype_bg")


@dataclass
class Affinity:
    """What a host knows of one query and one class when its maps are made; cells are counted row by row, N = h w.

    `picture` uint8 (H, W, 3) as the encoder saw it; `grid` (h, w); `query` float32 (N, c), the features that the maps
    compare. One row for every reference (shot): `positive` (k, N) mean cosine to its foreground, `peak` (k, N) largest
    cosine to a cell of it, `negative` (k, N) mean cosine to its background; `prototype_fg`, `prototype_bg` (k, c) mean
    features of equation (10), all zero where the mask has no such cell.
    """

    picture: np.ndarray
    grid: tuple[int, int]
    query: np.ndarray
    positive: np.ndarray
    peak: np.ndarray
    negative: np.ndarray
    prototype_fg: np.ndarray
    prototype_bg: np.ndarray


@dataclass
class Boosted:
    """The maps to go on with: `positive`, `peak`, `negative`, each float32 (N,).

    `changed` is False where they are the host's own, which then needs no second pass. `weight_fg` and `weight_bg` are
    those of the shots and, last, of the proxy where there is one; `foreground` and `background` are its cells, bool
    (N,), both empty without a proxy. `skipped` says in words what could not be done.
    """

    positive: np.ndarray
    peak: np.ndarray
    negative: np.ndarray
    weight_fg: np.ndarray
    weight_bg: np.ndarray
    foreground: np.ndarray
    background: np.ndarray
    changed: bool
    skipped: list[str] = field(default_factory=list)


def boost(
    affinity: Affinity, host_mask: np.ndarray, options: GsmOptions, trace: dict[str, Any] | None = None
) -> Boosted:
    """The maps of `affinity` with the query as a further reference and all references weighed, as `options` say.

    `host_mask` bool or 0/1 (any height, any width): the host's first answer, over the same extent as the grid. `trace`,
    where given, is filled with every intermediate array by name. InputError if the shapes do not belong together.
    """
    _check(affinity, host_mask)
    trace = {} if trace is None else trace
    skipped: list[str] = []
    references = {name: getattr(affinity, name) for name in REFERENCE_ROWS}
    foreground = background = np.zeros(len(affinity.query), bool)
    proxy: dict[str, np.ndarray] = {}
    if options.tsr:
        units = unit(affinity.query)
        cosines = cosine_matrix(units) if options.qsm else None
        foreground, background = _proxy_mask(affinity, units, cosines, host_mask, options, skipped, trace)
        proxy = _reference_rows(affinity, units, cosines, foreground, background, options.own_cell)
    for name, row in proxy.items():
        references[name] = np.vstack([references[name], row])
    weights = {}
    for name in ("fg", "bg"):
        prototypes = references[f"prototype_{name}"]
        if proxy or options.rr:
            weights[name] = reference_weights(prototypes, options, trace, name)
        else:
            weights[name] = np.full(len(prototypes), 1 / len(prototypes))
        trace |= {f"prototype_{name}": prototypes, f"weight_{name}": weights[name]}

    # Read literally, equation (14) divides once more by the number of references.
    literal = options.rr and options.literal_mean
    factors = {name: each / len(each) if literal else each for name, each in weights.items()}
    changed = bool(proxy) or any((each != 1 / len(each)).any() for each in factors.values())

    def combined(maps: str, component: str) -> np.ndarray:
        return factors[component].astype(np.float32) @ references[maps] if changed else references[maps].mean(0)

    return Boosted(
        combined("positive", "fg"),
        combined("peak", "fg"),
        combined("negative", "bg"),
        weights["fg"],
        weights["bg"],
        foreground,
        background,
        changed,
        skipped,
    )


def evidence_of(affinity: Affinity, kind: str) -> np.ndarray:
    """S+ - S- of equation (6), float32 (N,): the host's mean maps, "raw" or each "aligned" to 0..1."""
    above, below = affinity.positive.mean(0), affinity.negative.mean(0)
    if kind == "aligned":
        above, below = ((values - values.min()) / (np.ptp(values) + 1e-6) for values in (above, below))
    return above - below


def reference_weights(prototypes: np.ndarray, options: GsmOptions, trace: dict[str, Any], component: str) -> np.ndarray:
    """Equations (11) to (13): prototypes (n, c) to weights float64 (n,) that sum to 1.

    A reference whose mask has no cell has a prototype of zeros and weighs 0. Without RR the others weigh the same. One
    reference, and two, always do.
    """
    seen = np.linalg.norm(prototypes, axis=1) > 0
    if not seen.any():
        return np.full(len(prototypes), 1 / len(prototypes))
    weights = np.where(seen, 1 / seen.sum(), 0.0)
    if not options.rr:
        return weights
    units = unit(prototypes[seen].astype(np.float64))
    alike = units @ units.T
    others = max(len(units) - 1, 1)
    mean = (alike.sum(1) - alike.diagonal()) / others
    trace |= {f"c_{component}": alike, f"mean_{component}": mean}
    if len(units) > 2:  # of two, both see only the other: equal weights, which rounding must not touch
        scores = np.exp((mean - mean.max()) / options.temperature)
        weights[seen] = scores / scores.sum()
    return weights


def _proxy_mask(
    affinity: Affinity,
    units: np.ndarray,
    cosines: np.ndarray | None,
    host_mask: np.ndarray,
    options: GsmOptions,
    skipped: list[str],
    trace: dict[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    """Equation (9): cells of the query that are foreground, and background, beyond doubt; both empty if the first is.

    `cosines` (N, N) only where the query is to be mined. What could not be done is said in `skipped`.
    """
    coverage = adaptive_average(host_mask, affinity.grid).ravel()
    predicted = coverage > (0.5 if options.mask_to_grid == "area" else 0)
    trace["m_pred_grid"] = predicted
    mined = predicted
    if cosines is not None:
        evidence = evidence_of(affinity, options.evidence)
        try:
            found = mine_query(affinity.picture, units, cosines, affinity.grid, evidence, predicted, options, trace)
        except SolverFailureError as error:
            found = None
            skipped.append(f"QSM: {error}; the proxy mask is the host's mask")
        else:
            if found is None:
                skipped.append("QSM: all cells fell into one cluster; the proxy mask is the host's mask")
        mined = predicted if found is None else found
    foreground, background = mined & predicted, ~mined & ~predicted
    trace |= {"m_pos": foreground, "m_neg": background}
    if not foreground.any():
        skipped.append("TSR: the proxy mask has no foreground cell; the query is no reference")
        return foreground, foreground
    if not background.any():
        skipped.append("TSR: the proxy mask has no background cell; the query is a reference for the foreground only")
    return foreground, background


def _reference_rows(
    affinity: Affinity,
    units: np.ndarray,
    cosines: np.ndarray | None,
    foreground: np.ndarray,
    background: np.ndarray,
    own_cell: bool,
) -> dict[str, np.ndarray]:
    """TSR: what the query with these cells as its mask adds to each of REFERENCE_ROWS."""
    rows = {}
    if foreground.any():
        rows["positive"] = units @ units[foreground].mean(0)
        rows["peak"] = _peak_map(units, cosines, foreground, own_cell)
        rows["prototype_fg"] = affinity.query[foreground].mean(0)
    if background.any():
        rows["negative"] = units @ units[background].mean(0)
        rows["prototype_bg"] = affinity.query[background].mean(0)
    return rows


def _peak_map(units: np.ndarray, cosines: np.ndarray | None, cells: np.ndarray, own_cell: bool) -> np.ndarray:
    """Largest of m_j cos(j, i) over all cells j, as for a shot; `own_cell` False leaves j = i out."""
    chosen = np.flatnonzero(cells)
    peak = np.full(len(units), -np.inf if cells.all() else 0, np.float32)
    for start in range(0, len(chosen), CHUNK):
        rows = chosen[start : start + CHUNK]
        block = units[rows] @ units.T if cosines is None else cosines[rows]
        if not own_cell:
            block[np.arange(len(rows)), rows] = -1
        np.maximum(peak, block.max(0), out=peak)
    return peak


def _check(affinity: Affinity, host_mask: np.ndarray) -> None:
    cells = affinity.grid[0] * affinity.grid[1]
    shots = len(affinity.positive)
    maps = (affinity.positive, affinity.peak, affinity.negative)
    prototypes = (affinity.prototype_fg, affinity.prototype_bg)
    fits = (
        shots > 0
        and len(affinity.query) == cells
        and all(array.shape == (shots, cells) for array in maps)
        and all(array.shape == (shots, affinity.query.shape[1]) for array in prototypes)
    )
    if not fits:
        raise InputError("wrong_shape", "the maps given to gsm do not belong together", f"the grid has {cells} cells")
    if host_mask.ndim != 2 or 0 in host_mask.shape:
        raise InputError("mask_size", f"a mask of shape {host_mask.shape} was given to gsm", "it needs (height, width)")
