"""Picture files in, mask files out: PNG masks, overlays and one COCO annotation file. Never imports torch."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from fssdeploy.errors import FssError
from fssdeploy.files import made_folder, write_atomic
from fssdeploy.images.masks import save_labels, save_mask
from fssdeploy.images.overlay import overlay, save_picture
from fssdeploy.images.pictures import load_picture
from fssdeploy.images.rle import encode_rle
from fssdeploy.pipeline import StagedSystem
from fssdeploy.protocol import ClassState, Features, Masks
from fssdeploy.report import Report, Table

if TYPE_CHECKING:
    from fssdeploy.explain import Shot

ANNOTATIONS = "masks.json"
MAX_LABELS = 255  # classes in an indexed file of 8 bits
# Bytes in file names. Together with two dots and a suffix they stay below the 255 that file systems allow.
_LONGEST_STEM, _LONGEST_CLASS = 160, 80


@dataclass(frozen=True)
class Segmented:
    """One picture: its masks bool (H, W) by class, their scores, and what the two steps cost in seconds.

    `figures`, by class, where asked for; `skipped` says for each class what a booster could not do.
    """

    picture: np.ndarray
    masks: Masks
    found: dict[str, np.ndarray]
    encode_seconds: float
    segment_seconds: float
    figures: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)


def annotate_files(
    system: StagedSystem,
    states: Mapping[str, ClassState],
    files: Sequence[Path],
    out: Path,
    *,
    overlays: bool = True,
    explain: Sequence[Shot] | None = None,
    boost: Mapping[str, Any] | None = None,
    note: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Segment every file with every class; all classes share one encoding of a picture.

    Writes ``<picture>.<class>.png`` (0/255), with 2 to 255 classes ``<picture>.labels.png`` (indexed), on request
    ``<picture>.overlay.jpg``, and ``masks.json`` (COCO annotations with RLE), which lists exactly the pictures that
    are done even when the run is broken off. With `explain`, the supports to show (may be none), also
    ``<picture>.<class>.explain.png`` (fssdeploy.explain). `boost` are the options of the booster that `system` is
    wrapped in, if it is; what it could not do is in the notes. `boost` and `note` go into the ``info``. A picture that
    cannot be read is reported under `errors` and skipped; if it is the only one its error is raised. Raises
    MachineError if `out` cannot be written; no picture is left with a part of its files.
    """
    coco: dict[str, Any] = {
        "info": {
            "description": "fssdeploy segment",
            "artifact": system.fingerprint,
            "weights": note or "trained",
            **({"boost": dict(boost)} if boost else {}),
        },
        "images": [],
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(states)],
        "annotations": [],
    }
    errors: list[dict[str, Any]] = []
    pictures: list[dict[str, Any]] = []
    with made_folder(out):
        try:
            for file, stem in zip(files, unique_stems(files), strict=True):
                progress(f"segmenting {file.name}")
                try:
                    picture = load_picture(file)
                except FssError as error:
                    if len(files) == 1:
                        raise
                    errors.append({"file": str(file), **error.to_dict()})
                    continue
                segmented = segment_picture(system, states, picture, explain, boosted=boost is not None)
                written = write_picture(out, stem, segmented, overlays)
                pictures.append(record_picture(coco, file, segmented, written))
        finally:
            if pictures:
                write_atomic(out / ANNOTATIONS, json.dumps(coco).encode())
    report = _report(pictures, errors, list(states), out)
    if boost:
        report.facts["boost"] = boost["name"]
        report.data["boost"] = dict(boost)
    return report


def unique_stems(files: Sequence[Path]) -> list[str]:
    """A file name stem for every picture's outputs; equal ones (a.jpg and a.png, or two folders) get a number.

    Very long ones are cut. Stems that differ in case alone count as equal, since some file systems hold only one.
    """
    taken: set[str] = set()
    stems = []
    for file in files:
        wanted = _cut(file.stem, _LONGEST_STEM)
        stem, number = wanted, 1
        while stem.casefold() in taken:
            number += 1
            stem = f"{wanted}-{number}"
        taken.add(stem.casefold())
        stems.append(stem)
    return stems


def safe_name(name: str) -> str:
    """A class name as a part of a file name, without dots: percent-encoded, and cut where it is very long."""
    quoted = quote(name, safe=" ()+,=@").replace(".", "%2E").replace("~", "%7E")
    if quoted in ("labels", "explain"):  # of the indexed file, and of figures
        return f"%{ord(quoted[0]):02X}{quoted[1:]}"
    return _cut(quoted, _LONGEST_CLASS)


def _cut(text: str, longest: int) -> str:
    """`text`, its end replaced by a hash where it has more than `longest` bytes."""
    data = os.fsencode(text)
    if len(data) <= longest:
        return text
    kept = data[: longest - 13].decode("utf-8", "ignore")
    return f"{kept}~{hashlib.sha256(data).hexdigest()[:12]}"


def segment_picture(
    system: StagedSystem,
    states: Mapping[str, ClassState],
    picture: np.ndarray,
    explain: Sequence[Shot] | None = None,
    *,
    boosted: bool = False,
) -> Segmented:
    """Every class in one picture; with `explain`, a figure of each, in which these supports are shown."""
    start = time.perf_counter()
    features = system.encode([picture])
    encoded = time.perf_counter()
    if explain is None and not boosted:
        masks = system.segment(features, states)
        traces: dict[str, dict[str, Any]] = {}
    else:
        masks, traces = _segment_traced(system, features, states)
    done = time.perf_counter()
    found = {name: masks.binary(0, name) for name in states}
    skipped = {name: trace["skipped"] for name, trace in traces.items() if trace.get("skipped")}
    segmented = Segmented(picture, masks, found, encoded - start, done - encoded, skipped=skipped)
    if explain is None:
        return segmented
    from fssdeploy.explain import figure  # with it comes SciPy, which takes longer to load than most pictures

    where = features.placements[0]
    figures = {
        name: figure(
            f"{system.name}, class '{name}'", picture, where, explain, mask, masks.prior[0].get(name), traces[name]
        )
        for name, mask in found.items()
    }
    return replace(segmented, figures=figures)


def _segment_traced(
    system: StagedSystem, features: Features, states: Mapping[str, ClassState]
) -> tuple[Masks, dict[str, dict[str, Any]]]:
    """The masks of one picture and the trace of each class, empty if the system keeps none; a trace is of one class."""
    segment: Callable[..., Masks] = system.segment
    tells = "trace" in inspect.signature(segment).parameters
    traces: dict[str, dict[str, Any]] = {name: {} for name in states}
    masks = Masks(list(states), [{}], [{}])
    for name, state in states.items():
        one = segment(features, {name: state}, **({"trace": traces[name]} if tells else {}))
        masks.logits[0].update(one.logits[0])
        masks.prior[0].update(one.prior[0])
    return masks, traces


def write_picture(out: Path, stem: str, segmented: Segmented, overlays: bool) -> dict[str, Any]:
    """Write all files of one picture, or none, and return their names."""
    written: dict[str, Any] = {"masks": {name: f"{stem}.{safe_name(name)}.png" for name in segmented.found}}
    touched: list[Path] = []

    def write(save: Callable[[Path, np.ndarray], None], file: str, array: np.ndarray) -> None:
        touched.append(out / file)
        save(out / file, array)

    try:
        for name, mask in segmented.found.items():
            write(save_mask, written["masks"][name], mask)
        if 1 < len(segmented.found) <= MAX_LABELS:
            written["labels"] = f"{stem}.labels.png"
            write(save_labels, written["labels"], segmented.masks.labels(0))
        if overlays:
            written["overlay"] = f"{stem}.overlay.jpg"
            drawn = overlay(segmented.picture, segmented.found)
            write(_save_marked, written["overlay"], drawn)
        if segmented.figures:
            written["explain"] = {name: f"{stem}.{safe_name(name)}.explain.png" for name in segmented.figures}
        for name, drawn in segmented.figures.items():
            write(_save_marked, written["explain"][name], drawn)
    except BaseException:
        for path in touched:
            path.unlink(missing_ok=True)
        raise
    return written


def _save_marked(path: Path, picture: np.ndarray) -> None:
    save_picture(path, picture, marked=True)


def record_picture(
    coco: dict[str, Any], file: Path, segmented: Segmented, written: Mapping[str, Any]
) -> dict[str, Any]:
    """Enter one picture into the COCO structure; what the report says of it."""
    image_id = len(coco["images"]) + 1
    height, width = segmented.picture.shape[:2]
    coco["images"].append({"id": image_id, "file_name": file.name, "height": height, "width": width, "path": str(file)})
    classes = {}
    for category, (name, mask) in enumerate(segmented.found.items(), 1):
        classes[name] = {
            "segmentation": encode_rle(mask),
            "area": int(mask.sum()),
            "bbox": _bounding_box(mask),
            "score": segmented.masks.score(0, name),
        }
        coco["annotations"].append(
            {
                "id": len(coco["annotations"]) + 1,
                "image_id": image_id,
                "category_id": category,
                "iscrowd": 0,
                "file": written["masks"][name],
                **classes[name],
            }
        )
    return {
        "file": str(file),
        "size": [height, width],
        "written": written,
        "classes": classes,
        "encode_seconds": segmented.encode_seconds,
        "segment_seconds": segmented.segment_seconds,
        **({"skipped": segmented.skipped} if segmented.skipped else {}),
    }


def _report(
    pictures: Sequence[Mapping[str, Any]], errors: Sequence[Mapping[str, Any]], names: Sequence[str], out: Path
) -> Report:
    table = Table("masks", ["picture", "class", "pixels", "share", "score", "ms"], [])
    for entry in pictures:
        milliseconds = f"{(entry['encode_seconds'] + entry['segment_seconds']) * 1e3:.0f}"
        height, width = entry["size"]
        for name, found in entry["classes"].items():
            share = f"{found['area'] / (height * width):.1%}"
            row = [Path(entry["file"]).name, name, found["area"], share, f"{found['score']:.2f}", milliseconds]
            table.rows.append(row)
            milliseconds = ""  # of all classes together
    facts: dict[str, object] = {"pictures": len(pictures), "classes": ", ".join(names), "written to": str(out)}
    if pictures:
        encode_ms = np.median([entry["encode_seconds"] for entry in pictures]) * 1e3
        segment_ms = np.median([entry["segment_seconds"] for entry in pictures]) * 1e3 / len(names)
        facts["median cost"] = f"encode {encode_ms:.0f} ms per picture, segment {segment_ms:.1f} ms per class"
    notes = [f"SKIPPED {error['what']}: {error['why']}".rstrip(": ") for error in errors]
    left_out = Counter(
        sentence for entry in pictures for sentences in entry.get("skipped", {}).values() for sentence in sentences
    )
    total = len(pictures) * len(names)
    notes += [f"Left out by gsm in {count} of {total} masks - {sentence}." for sentence, count in left_out.items()]
    return Report("segmented", facts, [table], notes, {"pictures": pictures, "errors": errors, "out": str(out)})


def _bounding_box(mask: np.ndarray) -> list[int]:
    """COCO's x, y, width, height; zeros for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return [0, 0, 0, 0]
    top, left = int(rows[0]), int(columns[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
