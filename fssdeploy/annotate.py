"""Picture files in, mask files out: PNG masks, overlays and one COCO annotation file. Never imports torch."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from fssdeploy.errors import FssError
from fssdeploy.files import storage_error, write_atomic
from fssdeploy.images.masks import save_labels, save_mask
from fssdeploy.images.overlay import overlay, save_picture
from fssdeploy.images.pictures import load_picture
from fssdeploy.images.rle import encode_rle
from fssdeploy.pipeline import StagedSystem
from fssdeploy.protocol import ClassState
from fssdeploy.report import Report, Table

ANNOTATIONS = "masks.json"


def annotate_files(
    system: StagedSystem,
    states: Mapping[str, ClassState],
    files: Sequence[Path],
    out: Path,
    *,
    overlays: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Segment every file with every class; all classes share one encoding of a picture.

    Writes ``<picture>.<class>.png`` (0/255), with several classes ``<picture>.labels.png`` (indexed), on request
    ``<picture>.overlay.jpg``, and ``masks.json`` (COCO annotations with RLE). A picture that cannot be read is
    reported under `errors` and skipped; if it is the only one its error is raised. Raises MachineError if `out` cannot
    be written.
    """
    coco: dict[str, Any] = {
        "images": [],
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(states)],
        "annotations": [],
    }
    table = Table("masks", ["picture", "class", "pixels", "share", "score", "ms"], [])
    errors: list[dict[str, Any]] = []
    pictures: list[dict[str, Any]] = []
    stems = unique_stems(files)
    for file, stem in zip(files, stems, strict=True):
        progress(f"segmenting {file.name}")
        try:
            picture = load_picture(file)
        except FssError as error:
            if len(files) == 1:
                raise
            errors.append({"file": str(file), **error.to_dict()})
            continue
        encode_start = time.perf_counter()
        features = system.encode([picture])
        segment_start = time.perf_counter()
        masks = system.segment(features, states)
        done = time.perf_counter()
        found = {name: masks.binary(0, name) for name in states}
        written = _write_masks(out, stem, found, masks.labels(0) if len(found) > 1 else None)
        if overlays:
            written["overlay"] = f"{stem}.overlay.jpg"
            save_picture(out / written["overlay"], overlay(picture, found))
        image_id = len(coco["images"]) + 1
        height, width = picture.shape[:2]
        coco["images"].append({"id": image_id, "file_name": file.name, "height": height, "width": width})
        classes = {}
        for category, (name, mask) in enumerate(found.items(), 1):
            annotation = {
                "id": len(coco["annotations"]) + 1,
                "image_id": image_id,
                "category_id": category,
                "segmentation": encode_rle(mask),
                "area": int(mask.sum()),
                "bbox": _bounding_box(mask),
                "score": masks.score(0, name),
                "iscrowd": 0,
            }
            coco["annotations"].append(annotation)
            classes[name] = {key: annotation[key] for key in ("segmentation", "area", "bbox", "score")}
            milliseconds = f"{(done - encode_start) * 1e3:.0f}" if category == 1 else ""
            share = f"{mask.mean():.1%}"
            table.rows.append([file.name, name, annotation["area"], share, f"{annotation['score']:.2f}", milliseconds])
        pictures.append(
            {
                "file": str(file),
                "size": [height, width],
                "written": written,
                "classes": classes,
                "encode_seconds": segment_start - encode_start,
                "segment_seconds": done - segment_start,
            }
        )
    if pictures:
        write_atomic(out / ANNOTATIONS, json.dumps(coco, ensure_ascii=False).encode())
    facts: dict[str, object] = {"pictures": len(pictures), "classes": ", ".join(states), "written to": str(out)}
    if pictures:
        encode_ms = np.median([entry["encode_seconds"] for entry in pictures]) * 1e3
        segment_ms = np.median([entry["segment_seconds"] for entry in pictures]) * 1e3 / len(states)
        facts["median cost"] = f"encode {encode_ms:.0f} ms per picture, segment {segment_ms:.1f} ms per class"
    notes = [f"SKIPPED {error['what']}: {error['why']}".rstrip(": ") for error in errors]
    return Report("segmented", facts, [table], notes, {"pictures": pictures, "errors": errors, "out": str(out)})


def unique_stems(files: Sequence[Path]) -> list[str]:
    """A file name stem for every picture's outputs; equal ones (a.jpg and a.png, or two folders) get a number."""
    taken: set[str] = set()
    stems = []
    for file in files:
        stem, number = file.stem, 1
        while stem in taken:
            number += 1
            stem = f"{file.stem}-{number}"
        taken.add(stem)
        stems.append(stem)
    return stems


def safe_name(name: str) -> str:
    """A class name as a part of a file name: reversible for short ones, cut and marked with a hash for long ones."""
    quoted = quote(name, safe=" ()+,=@")
    return quoted if len(quoted) <= 80 else f"{quoted[:60]}~{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _write_masks(out: Path, stem: str, masks: Mapping[str, np.ndarray], labels: np.ndarray | None) -> dict[str, Any]:
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise storage_error(error, out) from error
    written: dict[str, Any] = {"masks": {}}
    for name, mask in masks.items():
        file = f"{stem}.{safe_name(name)}.png"
        save_mask(out / file, mask)
        written["masks"][name] = file
    if labels is not None:
        written["labels"] = f"{stem}.labels.png"
        save_labels(out / written["labels"], labels)
    return written


def _bounding_box(mask: np.ndarray) -> list[int]:
    """COCO's x, y, width, height; zeros for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return [0, 0, 0, 0]
    top, left = int(rows[0]), int(columns[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
