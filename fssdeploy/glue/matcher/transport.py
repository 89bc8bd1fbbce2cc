"""Exact optimal transport between sets of equally weighted patches: how alike an object and a mask are as wholes.

Source: Liu et al., "Matcher" (2023), section 3.3 (the earth mover's distance of eq. 7); Cuturi, "Sinkhorn Distances"
(2013), for prices close to the best ones.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import csc_array

from fssdeploy.errors import MachineError

# Up to these many units of equal mass, and copies of a row or column, an assignment of units is the fastest solver.
MAX_UNITS, MAX_COPIES = 600, 4
# Entropy of the plan that gives the first prices, in units of similarity, and its iterations.
_ENTROPY, _SINKHORN_ROUNDS = 0.02, 200
# Pairs of each row and each column that enter the linear program at a time.
_NEIGHBOURS = 8
# A pair that beats the prices by less could add no more than this to the value: what float32 resolves of a cosine.
_TOLERANCE = 1e-7


def transport_value(similarity: np.ndarray) -> float:
    """The largest mean of `similarity` (r, p) over all ways to move 1/r from every row so that 1/p reaches each column.

    Exact to the precision of float32, for similarities from -1 to 1. MachineError "transport_failed" if the solver
    gives up.
    """
    rows, columns = similarity.shape
    units = int(np.lcm(rows, columns))
    if units > min(MAX_UNITS, MAX_COPIES * max(rows, columns)):
        return linear_program(similarity.astype(np.float64))
    # Rows and columns split into units of equal mass: an assignment of units is an optimal plan.
    split = np.repeat(np.repeat(similarity, units // rows, 0), units // columns, 1)
    return float(split[linear_sum_assignment(split, maximize=True)].mean(dtype=np.float64))


def linear_program(similarity: np.ndarray) -> float:
    """`transport_value` as a linear program over few pairs, to which pairs that its prices reject are added.

    It begins with the pairs that an entropic plan all but uses, and those of one feasible plan. The program over the
    chosen pairs has prices for all rows and columns; where no other pair beats them, none could improve the plan, so
    that the optimum over few pairs is the one over all.
    """
    rows, columns = similarity.shape
    chosen = _best_of_rows_and_columns(_entropic_gain(similarity))
    chosen[_northwest_corner(rows, columns)] = True
    # Whole masses: every row holds `columns`, every column takes `rows`.
    mass = np.concatenate([np.full(rows, columns, float), np.full(columns, rows, float)])
    while True:
        i, j = np.nonzero(chosen)
        pair = np.arange(len(i))
        incidence = csc_array(
            (np.ones(2 * len(i)), (np.concatenate([i, rows + j]), np.concatenate([pair, pair]))),
            shape=(rows + columns, len(i)),
        )
        solved = linprog(-similarity[i, j], A_eq=incidence, b_eq=mass, method="highs-ds", options={"presolve": False})
        if solved.status != 0:
            raise MachineError("transport_failed", "a mask could not be compared with the object", solved.message)
        prices = -solved.eqlin.marginals
        gain = similarity - prices[:rows, None] - prices[rows:]
        better = (gain > _TOLERANCE) & ~chosen
        if not better.any():
            return float(-solved.fun / (rows * columns))
        chosen |= better & _best_of_rows_and_columns(np.where(better, gain, -np.inf))


def _entropic_gain(similarity: np.ndarray) -> np.ndarray:
    """What is left of the similarity of each pair after the prices of the plan of given entropy, but for a constant."""
    rows, columns = similarity.shape
    kernel = np.exp((similarity - 1) / _ENTROPY)  # of similarities from -1 to 1 no row or column vanishes
    across = np.ones(columns)
    for _ in range(_SINKHORN_ROUNDS):
        down = 1 / (rows * (kernel @ across))
        across = 1 / (columns * (down @ kernel))
    return similarity + _ENTROPY * (np.log(down)[:, None] + np.log(across))


def _best_of_rows_and_columns(values: np.ndarray) -> np.ndarray:
    """The largest few values of each row and of each column, bool as `values`."""
    best = np.zeros(values.shape, bool)
    for axis in (0, 1):
        count = min(_NEIGHBOURS, values.shape[axis])
        np.put_along_axis(best, (-values).argpartition(count - 1, axis).take(range(count), axis), True, axis)
    return best


def _northwest_corner(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of one feasible plan: both sides laid end to end on a line, and cut wherever either ends."""
    ends = np.union1d(np.arange(1, rows + 1) * columns, np.arange(1, columns + 1) * rows)
    starts = np.concatenate([[0], ends[:-1]])
    return starts // columns, starts // rows
