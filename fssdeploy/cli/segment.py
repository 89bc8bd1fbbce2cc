"""`fssdeploy segment`: find enrolled classes, or the thing in given support pictures, in other pictures."""

from __future__ import annotations

import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fssdeploy.cli.common import Json, Runtime, Threads, emit, emit_failed, progress_lines
from fssdeploy.cli.enroll import enroll_pictures
from fssdeploy.errors import InputError

if TYPE_CHECKING:
    from fssdeploy.pipeline import StagedSystem
    from fssdeploy.protocol import ClassState

DEFAULT_ARTIFACT = Path("artifacts") / "fsdino-tiny"  # where `fssdeploy export fsdino` writes


def segment(
    context: typer.Context,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help=f"ARTIFACT (default: {DEFAULT_ARTIFACT}, else the shipped one), then pictures."),
    ] = None,
    bank: Annotated[Path | None, typer.Option(help="Directory of enrolled classes.")] = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="NAME[,NAME2...], from the bank; default: all. May be repeated.")
    ] = None,
    support: Annotated[list[str] | None, typer.Option(help="PICTURE:MASK instead of a bank; repeat for shots.")] = None,
    query: Annotated[list[Path] | None, typer.Option(help="Picture or folder to search; may be repeated.")] = None,
    label: Annotated[int | None, typer.Option(help="Which label of an indexed support mask is the object.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for masks, overlays, masks.json.")] = Path("out"),
    overlays: Annotated[bool, typer.Option(help="Write an overlay for each picture.")] = True,
    runtime: Runtime = "onnxruntime",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Segment pictures with enrolled classes (--bank, --class), or with --support PICTURE:MASK in one go."""
    from fssdeploy.annotate import annotate_files
    from fssdeploy.artifact import Artifact, load
    from fssdeploy.images.pictures import find_pictures

    if bool(bank) == bool(support):
        raise InputError("usage", "segment needs either --bank or --support", "", f"See: {context.command_path} --help")
    given = list(paths or [])
    artifact = given.pop(0) if given else default_artifact()
    note = Artifact.open(artifact).weights_note
    files = find_pictures([*given, *(query or [])])
    with progress_lines(as_json) as progress:
        progress("loading")
        start = time.perf_counter()
        system = load(artifact, runtime, threads=threads)
        states = enrolled(bank, system, classes) if bank else _from_support(support or [], system, classes, label)
        seconds = time.perf_counter() - start
        report = annotate_files(system, states, files, out, overlays=overlays, note=note, progress=progress)
    report.facts["loaded in" if bank else "loaded and enrolled in"] = f"{seconds * 1e3:.0f} ms"
    report.data["load_seconds"] = seconds
    report.notes[:0] = [note] if note else []
    skipped = report.data["errors"]
    if not skipped:
        emit(report, as_json)
        return
    first = skipped[0]
    what = f"{len(skipped)} of {len(files)} pictures were skipped"
    error = InputError("pictures_skipped", what, f"{first['what']}: {first['why']}", first["fix"])
    emit_failed(report, error, as_json)


def default_artifact() -> Path:
    """What `fssdeploy export fsdino` wrote here, else the one that comes with this package."""
    from fssdeploy import shipped

    return DEFAULT_ARTIFACT if DEFAULT_ARTIFACT.exists() else shipped.artifact() or DEFAULT_ARTIFACT


def split_support(text: str) -> tuple[Path, str]:
    """PICTURE:MASK, where MASK may itself hold colons (``box:...``, ``polygon:...``)."""
    for kind in (":box:", ":polygon:"):
        picture, found, rest = text.partition(kind)
        if found:
            return Path(picture), kind[1:] + rest
    picture, found, mask = text.rpartition(":")
    if not found or not picture or not mask:
        raise InputError(
            "support_format", f"'{text}' is not PICTURE:MASK", "", "For example a.jpg:a.png or a.jpg:box:10,20,200,180."
        )
    return Path(picture), mask


def enrolled(bank: Path, system: StagedSystem, classes: list[str] | None) -> dict[str, ClassState]:
    from fssdeploy.bank.bank import Bank

    with Bank.open(bank, system.fingerprint) as opened:
        known = opened.names()
        names = known if classes is None else [name for text in classes for name in _split_names(text, known)]
        if not names:
            raise InputError("bank_empty", f"bank '{bank}' holds no class", "", "Enrol one with fssdeploy enroll.")
        return {name: opened.get(name) for name in names}


def _split_names(text: str, known: list[str]) -> list[str]:
    """The names in NAME[,NAME2...]; whatever is known as it stands is one name, commas and spaces included."""
    text = unicodedata.normalize("NFC", text)
    if text in known:
        return [text]
    return [part if part in known else part.strip() for part in text.split(",")]


def _from_support(
    support: list[str], system: StagedSystem, classes: list[str] | None, label: int | None
) -> dict[str, ClassState]:
    from fssdeploy.bank.names import class_name

    if classes and len(classes) > 1:
        raise InputError("usage", "--support shows one class", f"{len(classes)} names were given", "Give one --class.")
    name = class_name(classes[0] if classes else "object")
    return {name: enroll_pictures(system, [split_support(text) for text in support], label)}
