"""The whole way on ready-made pictures: enrol a class from one picture, keep it in a bank, find it in others."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fssdeploy.artifact import Artifact, load
from fssdeploy.bank.bank import Bank
from fssdeploy.data.shapes import ShapesDataset
from fssdeploy.errors import MachineError
from fssdeploy.images.masks import load_mask, save_mask
from fssdeploy.images.overlay import contact_sheet, overlay, save_picture
from fssdeploy.report import Report, Table

# The outline of the motorcycle in the left picture of scikit-image's stereo pair (741 x 500), drawn by hand.
OUTLINE = (
    "polygon:93,219,145,163,278,176,352,176,435,157,472,115,491,83,556,115,565,157,537,185,574,269,639,296,685,398,"
    "652,450,574,435,519,370,463,352,345,378,330,430,222,398,139,361,122,296,163,232"
)
# Neither the pictures of this seed nor their classes were seen in training.
SEED = 7
FOLD = 0


@dataclass(frozen=True)
class Case:
    """A class, its support picture with the object's mask, and queries by name with their truth where it is known."""

    name: str
    support: np.ndarray
    mask: np.ndarray
    queries: dict[str, tuple[np.ndarray, np.ndarray | None]]


def shapes_case(class_index: int, queries: int = 4) -> Case:
    """A class of shapes-5i's fold 0, which the shipped weights have never seen."""
    dataset = ShapesDataset()
    items = dataset.listing(FOLD, "test", SEED)[class_index][: queries + 1]
    support, *others = [dataset.load(item, class_index) for item in items]
    found = {f"query {number}": (picture, mask == 1) for number, (picture, mask) in enumerate(others, 1)}
    return Case(dataset.class_names[class_index], support[0], support[1] == 1, found)


def natural_case() -> Case:
    """Photographs that come with scikit-image, for weights that know such. MachineError if they are missing."""
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
    queries = {
        "other camera": right,
        "mirrored, darker": (right[:, ::-1] * 0.6).astype(np.uint8),
        "tilted, cropped": np.asarray(turned),
        "no motorcycle": coffee,
    }
    mask = load_mask(OUTLINE, left.shape[:2]).object
    return Case("motorcycle", left, mask, {name: (picture, None) for name, picture in queries.items()})


def run(artifact: Path, cases: list[Case], out: Path, progress: Callable[[str], None]) -> Report:
    """Enrol every case's class into a bank in OUT and find it in its queries; OUT/demo.png shows it all."""
    progress("loading the artifact")
    start = time.perf_counter()
    system = load(artifact)
    loaded = time.perf_counter() - start
    table = Table("queries", ["class", "picture", "share", "IoU with the truth", "time"], [])
    rows, captions, data, enrolled = [], [], [], []
    # Named after the artifact: the folder may hold the bank of a demo with other weights.
    with Bank.open(out / f"bank-{system.fingerprint[:8]}", system.fingerprint, create=True) as bank:
        for case in cases:
            progress(f"enrolling '{case.name}'")
            start = time.perf_counter()
            state = system.enroll(system.encode([case.support]), [case.mask])
            version = bank.put(case.name, state)
            enrolled.append(time.perf_counter() - start)
            state = bank.get(case.name, version)
            row, caption = [overlay(case.support, {case.name: case.mask})], [f"support: {case.name}"]
            for name, (picture, truth) in case.queries.items():
                start = time.perf_counter()
                found = system.segment(system.encode([picture]), {case.name: state}).binary(0, case.name)
                seconds = time.perf_counter() - start
                iou = None if truth is None else float((found & truth).sum() / max(1, (found | truth).sum()))
                shown = "-" if iou is None else f"{iou:.2f}"
                table.rows.append([case.name, name, f"{found.mean():.1%}", shown, f"{seconds * 1e3:.0f} ms"])
                data.append({"class": case.name, "picture": name, "iou": iou, "seconds": seconds})
                row.append(overlay(picture, {case.name: found}))
                caption.append(name)
                save_mask(out / f"{case.name}-{name}.png".replace(", ", "-").replace(" ", "-"), found)
            rows.append(row)
            captions.append(caption)
    save_picture(out / "demo.png", contact_sheet(rows, captions))
    opened = Artifact.open(artifact)
    known = [float(entry["iou"]) for entry in data if entry["iou"] is not None]
    facts: dict[str, object] = {
        "artifact": str(artifact),
        "artifact loaded in": f"{loaded * 1e3:.0f} ms",
        "class enrolled from one picture in": f"{min(enrolled) * 1e3:.0f} ms",
        "look at": str(out / "demo.png"),
    }
    if known:
        facts["mean IoU"] = f"{np.mean(known):.2f}"
    note = opened.weights_note
    return Report(f"demo: {opened.name}", facts, [table], [note] if note else [], {"queries": data, **facts})
