"""The work of `fssdeploy segment` as a batch: masks, overlays and one COCO file of many pictures."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fssdeploy import annotate
from fssdeploy.artifact import Artifact, load
from fssdeploy.bank.states import encode_state
from fssdeploy.batch.journal import Entry
from fssdeploy.batch.plan import Item, Plan
from fssdeploy.batch.run import Means, Outcome, run_batch
from fssdeploy.batch.worker import UnusableItemError, Work
from fssdeploy.errors import FssError, InputError
from fssdeploy.files import open_file, storage_error, sync_folder, write_atomic
from fssdeploy.images.pictures import load_picture
from fssdeploy.pipeline import StagedSystem
from fssdeploy.protocol import ClassState
from fssdeploy.report import Report, Table

if TYPE_CHECKING:
    from fssdeploy.glue.gsm.options import GsmOptions


@dataclass(frozen=True)
class SegmentJob:
    """Every class in a picture. The states travel with it: a bank may change while the batch runs."""

    artifact: Path
    runtime: str
    states: Mapping[str, ClassState]
    out: Path
    overlays: bool
    boost: GsmOptions | None = None

    def open(self, threads: int) -> Work:
        system = load(self.artifact, self.runtime, threads=threads)
        if self.boost:
            from fssdeploy.glue.gsm.hosts import gsm  # brings SciPy, which others do without

            system = cast(StagedSystem, gsm(system, self.boost))  # the same three verbs
        return partial(self._finish, system)

    def _finish(self, system: StagedSystem, item: Item) -> dict[str, Any]:
        file = Path(item["input"])
        try:
            with open_file(file) as stream:
                data = stream.read()
            picture = load_picture(data, str(file))
        except FssError as error:
            raise UnusableItemError(error) from error
        except OSError as error:  # while reading
            raise UnusableItemError(storage_error(error, file)) from error
        segmented = annotate.segment_picture(system, self.states, picture, boosted=self.boost is not None)
        written = annotate.write_picture(self.out, item["stem"], segmented, self.overlays)
        _flush(self.out, _names(written))
        coco: dict[str, Any] = {"images": [], "annotations": []}
        told = annotate.record_picture(coco, file, segmented, written)
        pixels = picture.shape[0] * picture.shape[1]
        classes = {
            name: {"area": found["area"], "share": found["area"] / pixels, "score": found["score"]}
            for name, found in told["classes"].items()
        }
        facts = {"sha256": hashlib.sha256(data).hexdigest(), "size": told["size"], "outputs": written}
        if segmented.skipped:
            facts["skipped"] = segmented.skipped
        return {"facts": {**facts, "classes": classes}, "record": coco}


def segment_batch(
    artifact: Artifact,
    runtime: str,
    states: Mapping[str, ClassState],
    pictures: Sequence[Path],
    out: Path,
    means: Means,
    *,
    overlays: bool = True,
    boost: GsmOptions | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Report, InputError | None]:
    """Segment pictures into `out` as `fssdeploy.annotate.annotate_files` does, each once, in the order of their paths.

    ``masks.json`` lists those done. A picture that cannot be read is entered as failed; if there are any, the error
    that a command should end with after the report is returned. Raises as `run_batch`.
    """
    files = sorted({Path(os.path.abspath(picture)) for picture in pictures})
    stems = annotate.unique_stems(files)
    items = [
        {"index": index, "input": str(file), "stem": stem}
        for index, (file, stem) in enumerate(zip(files, stems, strict=True))
    ]
    configuration = {
        "artifact": artifact.manifest["digest"],
        "runtime": runtime,
        "classes": {name: hashlib.sha256(encode_state(state)).hexdigest() for name, state in states.items()},
        "overlays": overlays,
        **({"boost": boost.to_dict()} if boost else {}),
    }
    out = Path(os.path.abspath(out))
    job = SegmentJob(Path(os.path.abspath(artifact.path)), runtime, states, out, overlays, boost)
    info = {
        "description": "fssdeploy segment",
        "artifact": artifact.fingerprint,
        "weights": artifact.weights_note or "trained",
        **({"boost": {"name": "gsm", **boost.to_dict()}} if boost else {}),
    }

    def collect(outcome: Outcome) -> None:
        write_atomic(out / annotate.ANNOTATIONS, json.dumps(_coco(info, list(states), outcome.done)).encode())

    def usable(entry: Entry) -> bool:
        return all((out / name).is_file() for name in _names(entry["facts"]["outputs"]))

    plan = Plan("segment", configuration, items)
    outcome = run_batch(plan, job, out, means, collect=collect, usable=usable, progress=progress)
    notes = [artifact.weights_note] if artifact.weights_note else []
    table = _classes_table(list(states), outcome.done)
    data = {**outcome.data(out), "out": out, "annotations": out / annotate.ANNOTATIONS}
    report = Report("segmented in a batch", outcome.facts(out), [table], [*notes, *outcome.notes()], data)
    return report, outcome.failure()


def _names(written: Mapping[str, Any]) -> list[str]:
    """All files of one picture."""
    return [*written["masks"].values(), *(name for key, name in written.items() if key != "masks")]


def _flush(folder: Path, names: Sequence[str]) -> None:
    """Make files survive a power failure."""
    for name in names:
        try:
            with (folder / name).open("rb") as stream:
                os.fsync(stream.fileno())
        except OSError as error:
            raise storage_error(error, folder / name) from error
    sync_folder(folder)


def _coco(info: Mapping[str, Any], names: Sequence[str], done: Sequence[Entry]) -> dict[str, Any]:
    """One COCO structure of the pieces of all pictures that are done, numbered as if it had been made in one go."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for entry in done:
        (image,) = entry["record"]["images"]
        images.append({**image, "id": len(images) + 1})
        for annotation in entry["record"]["annotations"]:
            annotations.append({**annotation, "id": len(annotations) + 1, "image_id": len(images)})
    return {
        "info": info,
        "images": images,
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(names)],
        "annotations": annotations,
    }


def _classes_table(names: Sequence[str], done: Sequence[Entry]) -> Table:
    rows = []
    for name in names:
        found = [entry["facts"]["classes"][name] for entry in done]
        shares = [each["share"] for each in found if each["area"]]
        rows.append([name, len(shares), f"{sum(shares) / len(shares):.1%}" if shares else None])
    return Table("classes", ["class", "found in", "mean share where found"], rows)
