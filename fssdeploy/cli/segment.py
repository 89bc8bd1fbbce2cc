"""`fssdeploy segment`: find enrolled classes, or the thing in given support pictures, in other pictures."""

from __future__ import annotations

import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fssdeploy.cli.common import (
    Boost,
    BoostSet,
    Json,
    Runtime,
    Threads,
    boost_options,
    check_system,
    emit,
    emit_failed,
    progress_lines,
)
from fssdeploy.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from fssdeploy.images.masks import Mask
    from fssdeploy.pipeline import StagedSystem
    from fssdeploy.protocol import ClassState

DEFAULT_SYSTEM = "fsdino"


def segment(
    context: typer.Context,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="ARTIFACT (default: artifacts/SYSTEM-tiny, for fsdino else the shipped one), pictures."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="fsdino (the default), gfsam, ...: whose artifact, if none is named.")
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
    explain: Annotated[bool, typer.Option("--explain", help="Write a figure of every step, for each mask.")] = False,
    boost: Boost = None,
    boost_set: BoostSet = None,
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
    options = boost_options(boost, boost_set)
    given = list(paths or [])
    artifact = Artifact.open(given.pop(0) if given else default_artifact(system or DEFAULT_SYSTEM))
    check_system(artifact, system)
    note = artifact.weights_note
    files = find_pictures([*given, *(query or [])])
    with progress_lines(as_json) as progress:
        progress("loading")
        start = time.perf_counter()
        opened: StagedSystem = load(artifact.path, runtime, threads=threads)
        if options:
            from fssdeploy.glue.gsm.hosts import gsm

            opened = cast("StagedSystem", gsm(opened, options))  # the same three verbs
        shots = _load_shots(support or [], label)
        states = enrolled(bank, opened, classes) if bank else _from_support(shots, opened, classes)
        seconds = time.perf_counter() - start
        report = annotate_files(
            opened,
            states,
            files,
            out,
            overlays=overlays,
            explain=[(picture, mask.object) for picture, mask in shots] if explain else None,
            boost={"name": boost, **options.to_dict()} if options else None,
            note=note,
            progress=progress,
        )
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


def default_artifact(system: str = DEFAULT_SYSTEM) -> Path:
    """What `fssdeploy export SYSTEM` wrote here; of fsdino else the one that comes with this package.

    InputError if there is neither.
    """
    from fssdeploy import shipped

    exported = Path("artifacts") / f"{system}-tiny"
    if exported.exists():
        return exported
    if system == DEFAULT_SYSTEM and (own := shipped.artifact()):
        return own
    raise InputError(
        "artifact_missing",
        f"there is no artifact of '{system}' here",
        f"'{exported}' does not exist",
        f"Run: fssdeploy export {system}",
    )


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


def _load_shots(support: list[str], label: int | None) -> list[tuple[np.ndarray, Mask]]:
    """The pictures and masks of PICTURE:MASK texts."""
    from fssdeploy.images.masks import load_mask
    from fssdeploy.images.pictures import load_picture

    pairs = [split_support(text) for text in support]
    pictures = [load_picture(path) for path, _ in pairs]
    return [
        (picture, load_mask(mask, picture.shape[:2], label)) for picture, (_, mask) in zip(pictures, pairs, strict=True)
    ]


def _from_support(
    shots: list[tuple[np.ndarray, Mask]], system: StagedSystem, classes: list[str] | None
) -> dict[str, ClassState]:
    from fssdeploy.bank.names import class_name

    if classes and len(classes) > 1:
        raise InputError("usage", "--support shows one class", f"{len(classes)} names were given", "Give one --class.")
    name = class_name(classes[0] if classes else "object")
    features = system.encode([picture for picture, _ in shots])
    return {name: system.enroll(features, [mask for _, mask in shots])}
