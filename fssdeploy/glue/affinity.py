"""How alike rows of references are to the cells of a query: asked of a stage, for any number of rows.

A row is a vector of the encoder's channels: of one cell, or a mean over cells, scaled by what it weighs.
"""

from __future__ import annotations

import numpy as np

from fssdeploy.pipeline import require_stage, run_in_chunks
from fssdeploy.protocol import Engine

AFFINITY = "affinity"
# Rows at a time: graphs are exported for so many at most.
CHUNK = 1024


def cosines(engine: Engine, rows: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Inner products float32 (n, m N) of rows (n, C), n at least 1, with the unit vectors of features (m N, C).

    The features are of the N cells of each of m pictures. For rows of length one the products are cosines; a cell whose
    features are zero has the product 0. InputError where an artifact was exported without the stage.
    """
    spec = require_stage(engine.specs, AFFINITY)
    pictures = features.reshape(-1, 1, int(spec.inputs[1].shape[1]), features.shape[-1])
    found = [run_in_chunks(engine, spec, {"rows": rows, "features": each}, CHUNK)["cosine"] for each in pictures]
    return found[0] if len(found) == 1 else np.concatenate(found, 1)
