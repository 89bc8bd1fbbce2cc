"""`fssdeploy enroll`: a class from annotated pictures into a bank."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fssdeploy.cli.common import BankDir, Json, Runtime, Threads, emit
from fssdeploy.errors import InputError

if TYPE_CHECKING:
    from fssdeploy.pipeline import StagedSystem
    from fssdeploy.protocol import ClassState


def enroll(
    artifact: Annotated[Path, typer.Argument(help="Directory written by fssdeploy export.")],
    name: Annotated[str, typer.Argument(help="Name of the class, any text.")],
    bank: BankDir,
    image: Annotated[list[Path], typer.Option(help="Support picture; repeat for more shots.")],
    mask: Annotated[list[str] | None, typer.Option(help="Its mask: a file, box:x0,y0,x1,y1 or polygon:x,y,...")] = None,
    box: Annotated[list[str] | None, typer.Option(help="x0,y0,x1,y1 in pixels, instead of masks.")] = None,
    polygon: Annotated[list[str] | None, typer.Option(help="x,y,x,y,... in pixels, instead of masks.")] = None,
    label: Annotated[int | None, typer.Option(help="Which label of an indexed mask is the object.")] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Add the shots to the newest version instead of replacing it.")
    ] = False,
    runtime: Runtime = "onnxruntime",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Enrol NAME from annotated pictures; queries then cost the same however many there were."""
    from fssdeploy.artifact import Artifact, load
    from fssdeploy.bank.names import class_name
    from fssdeploy.bank.store import store_class
    from fssdeploy.report import Report

    annotations = _annotations(len(image), mask or [], box or [], polygon or [])
    name = class_name(name)
    note = Artifact.open(artifact).weights_note
    system = load(artifact, runtime, threads=threads)
    start = time.perf_counter()
    state = enroll_pictures(system, list(zip(image, annotations, strict=True)), label)
    seconds = time.perf_counter() - start
    version, shots = store_class(bank, name, state, add=add)
    facts = {
        "class": name,
        "version": version,
        "shots": shots,
        "bank": str(bank),
        "enrolled in": f"{seconds * 1e3:.0f} ms",
    }
    data = {"class": name, "version": version, "shots": shots, "bank": str(bank), "seconds": seconds}
    emit(Report("enrolled", facts, [], [note] if note else [], data), as_json)


def enroll_pictures(system: StagedSystem, pairs: list[tuple[Path, str]], label: int | None = None) -> ClassState:
    """The class state of (picture, annotation) pairs; annotations as in the command line."""
    from fssdeploy.images.masks import load_mask
    from fssdeploy.images.pictures import load_picture

    pictures = [load_picture(picture) for picture, _ in pairs]
    masks = [
        load_mask(annotation, picture.shape[:2], label)
        for picture, (_, annotation) in zip(pictures, pairs, strict=True)
    ]
    return system.enroll(system.encode(pictures), masks)


def _annotations(count: int, masks: list[str], boxes: list[str], polygons: list[str]) -> list[str]:
    """One annotation text for each picture, in the order given."""
    kinds = [(masks, ""), (boxes, "box:"), (polygons, "polygon:")]
    given = [[prefix + text for text in texts] for texts, prefix in kinds if texts]
    if len(given) != 1 or len(given[0]) != count:
        total = sum(len(texts) for texts in given)
        raise InputError(
            "annotations_count",
            f"{count} pictures came with {total} annotations"
            if len(given) < 2
            else "annotations of several kinds were given",
            "each --image needs exactly one, in the same order",
            "Use --mask for all; it also takes box:x0,y0,x1,y1 and polygon:x,y,...",
        )
    return given[0]
