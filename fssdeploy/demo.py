"""The whole way on pictures that come with scikit-image: export, prove, enrol from one picture, find it in others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from fssdeploy.artifact import Artifact, load
from fssdeploy.bank.bank import Bank
from fssdeploy.engines.torch import TorchEngine
from fssdeploy.errors import MachineError
from fssdeploy.export.artifact import ExportRequest, export_artifact
from fssdeploy.images.masks import load_mask, save_mask
from fssdeploy.images.overlay import contact_sheet, overlay, save_picture
from fssdeploy.pipeline import StagedSystem
from fssdeploy.report import Report, Table
from fssdeploy.systems import fsdino, get_system
from fssdeploy.weights.fsdino import fill

_T = TypeVar("_T")
CLASS = "motorcycle"
# The outline of the motorcycle in the left picture of scikit-image's stereo pair (741 x 500), drawn by hand.
OUTLINE = (
    "polygon:93,219,145,163,278,176,352,176,435,157,472,115,491,83,556,115,565,157,537,185,574,269,639,296,685,398,"
    "652,450,574,435,519,370,463,352,345,378,330,430,222,398,139,361,122,296,163,232"
)


def pictures() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The support picture and the queries. MachineError if scikit-image or one of its files is missing."""
    try:
        from skimage import data

        left, right, _ = data.stereo_motorcycle()
        coffee = data.coffee()
    except (ImportError, OSError) as error:
        raise MachineError(
            "package_missing",
            "the demo's pictures are missing",
            "they come with scikit-image",
            "Run: pip install 'fssdeploy[export]'",
        ) from error
    turned = Image.fromarray(right).rotate(8, Image.Resampling.BICUBIC).crop((40, 40, 700, 460))
    return left, {
        "other camera": right,
        "mirrored, darker": (right[:, ::-1] * 0.6).astype(np.uint8),
        "tilted, cropped": np.asarray(turned),
        "no motorcycle": coffee,
    }


def run(
    preset: str, config: fsdino.FSDinoConfig, weights: Sequence[Path], out: Path, progress: Callable[[str], None]
) -> Report:
    """Run the demo into `out`; the report says what every step cost and where to look."""
    support, queries = pictures()
    mask = load_mask(OUTLINE, support.shape[:2])
    progress("building the network")
    model = fsdino.build(config)
    # A demonstration runs on whatever weights there are; what no file covers is seeded, and every output says so.
    provenance = fill(model, weights, untrained_seed=0)
    request = ExportRequest(get_system(fsdino.NAME), preset, config)
    start = time.perf_counter()
    proof = export_artifact(model, provenance, request, out / "artifact", progress)
    exported = time.perf_counter() - start

    progress("enrolling and segmenting on ONNX Runtime")
    start = time.perf_counter()
    system = load(out / "artifact")
    loaded = time.perf_counter() - start
    state, enrolled = _timed(lambda: system.enroll(system.encode([support]), [mask]))
    with Bank.open(out / "bank", system.fingerprint, create=True) as bank:
        version = bank.put(CLASS, state)
        state = bank.get(CLASS, version)

    research = StagedSystem(
        "pytorch",
        fsdino.specs(config),
        TorchEngine(fsdino.reference_stages(model), fsdino.specs(config)),
        fsdino.preprocessing(config),
        system.fingerprint,
    )

    def recomputed(query: np.ndarray) -> np.ndarray:
        shot = research.enroll(research.encode([support]), [mask])
        return research.segment(research.encode([query]), {CLASS: shot}).binary(0, CLASS)

    def deployed(query: np.ndarray) -> np.ndarray:
        return system.segment(system.encode([query]), {CLASS: state}).binary(0, CLASS)

    table = Table("queries", ["picture", "share", "IoU with PyTorch", "PyTorch, support recomputed", "deployed"], [])
    row, captions, data = [overlay(support, {CLASS: mask.object})], ["support"], []
    deployed(support)  # first calls pay for opening the graphs
    for name, query in queries.items():
        progress(f"segmenting '{name}'")
        expected, slow = _timed(partial(recomputed, query))
        found, fast = _timed(partial(deployed, query))
        union = int((found | expected).sum())
        iou = float((found & expected).sum() / union) if union else 1.0
        table.rows.append([name, f"{found.mean():.1%}", f"{iou:.4f}", f"{slow * 1e3:.0f} ms", f"{fast * 1e3:.0f} ms"])
        data.append({"picture": name, "iou_with_pytorch": iou, "pytorch_seconds": slow, "deployed_seconds": fast})
        row.append(overlay(query, {CLASS: found}))
        captions.append(name)
        save_mask(out / f"{name.replace(', ', '-').replace(' ', '-')}.png", found)
    save_picture(out / "demo.png", contact_sheet([row], [captions]))
    note = Artifact.open(out / "artifact").weights_note
    facts: dict[str, object] = {
        "exported and proved in": f"{exported:.1f} s",
        "parity": proof.facts["parity: verdict"],
        "artifact loaded in": f"{loaded * 1e3:.0f} ms",
        "class enrolled from one picture in": f"{enrolled * 1e3:.0f} ms",
        "look at": str(out / "demo.png"),
    }
    return Report(f"demo: fsdino {preset}", facts, [table], [note] if note else [], {"queries": data, **facts})


def _timed(call: Callable[[], _T]) -> tuple[_T, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start
