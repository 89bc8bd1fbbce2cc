"""Proof that an exported system computes what PyTorch computes: tensors stage by stage, then masks end to end.

Every stage first gets the reference's own inputs, so that the first stage out of tolerance is the one that drifts; then
the exported stages are chained through the same pipeline that deployment uses, and the masks are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fssdeploy.errors import MachineError
from fssdeploy.glue.sam import LABELS
from fssdeploy.images.geometry import fit_picture, place
from fssdeploy.pipeline import StagedSystem, run_in_chunks
from fssdeploy.protocol import Engine, StageSpec, TensorSpec
from fssdeploy.report import Report, Table

ODD_BATCH = 3


@dataclass(frozen=True)
class Tolerance:
    """Limits against float32 PyTorch. Differences are divided by the standard deviation of the reference tensor."""

    max_abs_over_std: float
    one_minus_cosine: float
    mask_iou: float
    flipped: float  # share of the pixels


# Origin: docs/export.md, "Tolerances": worst over pictures of a 12-block network with outlier channels, with margin.
TOLERANCES = {
    "fp32": Tolerance(1e-4, 1e-9, 0.9995, 1e-4),
    "fp16": Tolerance(0.05, 1e-5, 0.99, 5e-3),
    "bf16": Tolerance(0.25, 5e-4, 0.97, 2e-2),
}
ORIGIN = "measured on natural pictures against float64 with lively weights; docs/export.md, section Tolerances"


@dataclass(frozen=True)
class TensorResult:
    """One output of one stage, on one batch. `holds` says whether both limits are kept."""

    engine: str
    stage: str
    output: str
    inputs: str
    batch: int
    max_abs: float
    max_relative: float
    max_abs_over_std: float
    one_minus_cosine: float
    holds: bool


@dataclass(frozen=True)
class MaskResult:
    """One mask, cut at logit 0 and at the median logit (harsher: no easy background)."""

    engine: str
    query: str
    shots: int
    cut: str
    iou: float
    flipped: float
    foreground: float
    holds: bool


def natural_pictures() -> dict[str, np.ndarray]:
    """Photographs that come with scikit-image. MachineError if it is not installed."""
    try:
        from skimage import data
    except ImportError as error:
        raise MachineError(
            "package_missing",
            "parity needs natural pictures",
            "scikit-image is not installed",
            "Run: pip install 'fssdeploy[export]'",
        ) from error
    return {name: getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}


def check_parity(
    reference: Engine,
    candidates: Mapping[str, Engine],
    specs: Mapping[str, StageSpec],
    preprocessing: Mapping[str, Any],
    precision: str,
    progress: Callable[[str], None] = lambda _: None,
    system: type[StagedSystem] = StagedSystem,
) -> dict[str, Any]:
    """Compare every candidate with the reference; the result is what ``parity.json`` holds.

    Its entry `holds` is the verdict, `first_drift` the first stage and output over tolerance.
    """
    tolerance = TOLERANCES[precision]
    pictures = natural_pictures()
    tensors: list[TensorResult] = []
    masks: list[MaskResult] = []
    progress("parity: the reference")
    known = _reference_values(reference, preprocessing, pictures)
    for name, engine in candidates.items():
        for stage, spec in specs.items():
            progress(f"parity: {stage} on {name}")
            tensors.extend(_compare_stage(engine, name, spec, known, tolerance))
    if set(reference.specs) <= set(specs):
        systems = {
            name: system("parity", specs, engine, preprocessing, "")
            for name, engine in {"": reference, **candidates}.items()
        }
        progress("parity: masks")
        masks.extend(_compare_masks(systems, pictures, tolerance))
    drift = next((f"{r.stage}.{r.output} on {r.engine}" for r in tensors if not r.holds), None)
    if drift is None:
        drift = next((f"mask of '{r.query}' on {r.engine}" for r in masks if not r.holds), None)
    return {
        "holds": drift is None,
        "first_drift": drift,
        "precision": precision,
        "reference": {**reference.describe(), "precision": "fp32"},
        "engines": {name: engine.describe() for name, engine in candidates.items()},
        "tolerance": {**asdict(tolerance), "origin": ORIGIN},
        "pictures": [*pictures, "constant", "noise", "empty mask"],
        "tensors": [asdict(result) for result in tensors],
        "masks": [asdict(result) for result in masks],
    }


def parity_report(result: Mapping[str, Any]) -> Report:
    """The worst figure of every output and of the masks, as text."""
    limits = result["tolerance"]
    worst = Table(
        "tensors, worst case", ["engine", "stage", "output", "max abs", "max rel", "max/std", "1-cos", "ok"], []
    )
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in result["tensors"]:
        groups.setdefault((row["engine"], row["stage"], row["output"]), []).append(row)
    for key, rows in groups.items():
        figures = ("max_abs", "max_relative", "max_abs_over_std", "one_minus_cosine")
        columns = [f"{max(row[figure] for row in rows):.1e}" for figure in figures]
        worst.rows.append([*key, *columns, "yes" if all(row["holds"] for row in rows) else "NO"])
    masks = Table("masks", ["engine", "cut", "masks", "lowest IoU", "most flipped", "foreground", "ok"], [])
    cuts: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in result["masks"]:
        cuts.setdefault((row["engine"], row["cut"]), []).append(row)
    for (engine, cut), rows in cuts.items():
        spread = f"{min(row['foreground'] for row in rows):.0%} to {max(row['foreground'] for row in rows):.0%}"
        masks.rows.append(
            [
                engine,
                cut,
                len(rows),
                f"{min(row['iou'] for row in rows):.4f}",
                f"{max(row['flipped'] for row in rows):.1e}",
                spread,
                "yes" if all(row["holds"] for row in rows) else "NO",
            ]
        )
    facts = {
        "verdict": "holds" if result["holds"] else f"FAILS, first drift: {result['first_drift']}",
        "precision": result["precision"],
        "limits": f"max/std {limits['max_abs_over_std']:g}, 1-cos {limits['one_minus_cosine']:g}, "
        f"IoU {limits['mask_iou']:g}, flipped {limits['flipped']:g}",
        "origin of the limits": limits["origin"],
    }
    return Report("parity with PyTorch float32", facts, [worst, masks], [], dict(result))


def _reference_values(
    reference: Engine, preprocessing: Mapping[str, Any], pictures: Mapping[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """Every tensor that enters or leaves a stage, by name, for each kind of input; ODD_BATCH rows each."""
    canvas = preprocessing["canvas"]

    def fit(picture: np.ndarray) -> np.ndarray:
        where = place(picture.shape[0], picture.shape[1], canvas, preprocessing["geometry"])
        return fit_picture(picture, where).transpose(2, 0, 1)

    natural = [fit(picture) for picture in list(pictures.values())[:ODD_BATCH]]
    noise = np.random.default_rng(0).integers(0, 256, (3, canvas, canvas), np.uint8)
    constant = np.full((3, canvas, canvas), 255, np.uint8)
    # The last mask of the degenerate rows is empty: enrolment refuses it, but the graph must still give numbers.
    boxes = np.zeros((ODD_BATCH, 1, canvas, canvas), np.float32)
    for row in range(ODD_BATCH - 1):
        boxes[row, 0, canvas // 4 : canvas // 2, canvas // 4 : canvas - canvas // (row + 3)] = 1
    filled = boxes.copy()
    filled[-1, 0, canvas // 3 :, : canvas // 2] = 1
    values = {
        "natural": {"picture": np.stack(natural), "mask": filled},
        "degenerate": {"picture": np.stack([constant, noise, natural[0]]), "mask": boxes},
    }
    for known in values.values():
        for spec in reference.specs.values():
            for tensor in spec.inputs:
                known.setdefault(tensor.name, _input(tensor, known["picture"]))
            outputs = run_in_chunks(reference, spec, _rows(spec, known, ODD_BATCH), chunk=1)
            # Later stages ask by name alone; several stages may give an output the same name.
            known.update(outputs)
            known.update({f"{spec.name}.{name}": array for name, array in outputs.items()})
    return values


def _input(tensor: TensorSpec, pictures: np.ndarray) -> np.ndarray:
    """ODD_BATCH rows of an input that comes from no stage.

    The same pictures on another canvas, every label in turn, places and sizes on the canvas, noise.
    """
    shape, canvas = (ODD_BATCH, *(int(side) for side in tensor.shape[1:])), pictures.shape[-1]
    if tensor.dtype == "uint8":
        nearest = np.arange(shape[-1]) * canvas // shape[-1]
        return np.ascontiguousarray(pictures[..., nearest[:, None], nearest])
    if tensor.name == "labels":
        return (np.arange(math.prod(shape)).reshape(shape) % len(LABELS) + min(LABELS)).astype(tensor.dtype)
    rng = np.random.default_rng(0)
    if tensor.dtype == "int32":
        return rng.integers(1, canvas, shape, tensor.dtype, endpoint=True)
    if tensor.name == "points":
        return rng.uniform(0, canvas, shape).astype(tensor.dtype)
    return rng.standard_normal(shape).astype(tensor.dtype)


def _rows(spec: StageSpec, values: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The first `count` rows of every input of a stage; of what its rows share, the first alone."""
    return {tensor.name: values[tensor.name][: 1 if tensor.name in spec.shared else count] for tensor in spec.inputs}


def _compare_stage(
    engine: Engine,
    name: str,
    spec: StageSpec,
    known: Mapping[str, Mapping[str, np.ndarray]],
    tolerance: Tolerance,
) -> Iterable[TensorResult]:
    """Batch 1 and an odd batch on natural pictures, the odd batch on degenerate ones."""
    for kind, values in known.items():
        for batch in (1, ODD_BATCH) if kind == "natural" else (ODD_BATCH,):
            inputs = _rows(spec, values, batch)
            for output, array in run_in_chunks(engine, spec, inputs, chunk=ODD_BATCH).items():
                # A degenerate input may give a nearly constant tensor: the scale is the one natural pictures give.
                key = f"{spec.name}.{output}"
                scale = float(known["natural"][key].std())
                where = (name, spec.name, output, kind, batch)
                yield _compare_tensor(array, values[key][:batch], scale, tolerance, where)


def _compare_tensor(
    got: np.ndarray, expected: np.ndarray, scale: float, tolerance: Tolerance, where: tuple[str, str, str, str, int]
) -> TensorResult:
    x, y = got.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    difference = np.abs(x - y)
    max_abs = float(difference.max())
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    cosine_loss = max(0.0, 1 - float(x @ y) / norms) if norms else float(max_abs > 0)
    relative = float((difference / np.maximum(np.abs(y), 1e-3 * scale + 1e-30)).max())
    over_std = max_abs / (scale + 1e-30)
    # A comparison with NaN is false, so NaN anywhere fails.
    holds = over_std <= tolerance.max_abs_over_std and cosine_loss <= tolerance.one_minus_cosine
    return TensorResult(*where, max_abs, relative, over_std, cosine_loss, holds)


def _compare_masks(
    systems: Mapping[str, StagedSystem], pictures: Mapping[str, np.ndarray], tolerance: Tolerance
) -> Iterable[MaskResult]:
    """Enrol one or two pictures with a box each, segment the others: every candidate against the reference ("")."""
    names = list(pictures)
    boxes = [_centre_box(pictures[name].shape[:2]) for name in names]
    answers: dict[str, dict[tuple[int, str], np.ndarray]] = {}
    for engine, system in systems.items():
        features = [system.encode([pictures[name]]) for name in names]
        states = [system.enroll(each, [box]) for each, box in zip(features, boxes, strict=True)]
        for shots, state in ((1, states[0]), (2, states[0].merge(states[1]))):
            for name, each in zip(names[shots:], features[shots:], strict=True):
                logits = system.segment(each, {"box": state}).logits[0]["box"]
                answers.setdefault(engine, {})[shots, name] = logits
    for engine in systems:
        for (shots, query), expected in answers[""].items() if engine else ():
            got = answers[engine][shots, query]
            for cut, threshold in (("0", 0.0), ("median", float(np.median(expected)))):
                yield _compare_mask(got > threshold, expected > threshold, tolerance, (engine, query, shots, cut))


def _compare_mask(
    got: np.ndarray, expected: np.ndarray, tolerance: Tolerance, where: tuple[str, str, int, str]
) -> MaskResult:
    union = int((got | expected).sum())
    iou = float((got & expected).sum() / union) if union else 1.0
    flipped = float((got != expected).mean())
    # On a mask of a few pixels a single one moves the IoU below any limit.
    one_or_two = int((got != expected).sum()) <= 2
    holds = flipped <= tolerance.flipped and (iou >= tolerance.mask_iou or one_or_two)
    return MaskResult(*where, iou, flipped, float(expected.mean()), holds)


def _centre_box(size: Sequence[int]) -> np.ndarray:
    height, width = size
    box = np.zeros((height, width), bool)
    box[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = True
    return box
