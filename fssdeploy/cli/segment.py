"""`fssdeploy segment`: find enrolled classes, or the thing in given support pictures, in other pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fssdeploy.cli.common import Json, Runtime, Threads, emit, progress_lines
from fssdeploy.cli.enroll import enroll_pictures, notes
from fssdeploy.errors import InputError

if TYPE_CHECKING:
    from fssdeploy.protocol import ClassState

DEFAULT_ARTIFACT = Path("artifacts") / "fsdino-tiny"  # where `fssdeploy export fsdino` writes


def segment(
    context: typer.Context,
    paths: Annotated[
        list[Path] | None, typer.Argument(help="ARTIFACT (default: artifacts/fsdino-tiny), pictures.")
    ] = None,
    bank: Annotated[Path | None, typer.Option(help="Directory of enrolled classes.")] = None,
    classes: Annotated[str | None, typer.Option("--class", help="NAME[,NAME2...] from the bank; default: all.")] = None,
    support: Annotated[list[str] | None, typer.Option(help="PICTURE:MASK instead of a bank; repeat for shots.")] = None,
    query: Annotated[list[Path] | None, typer.Option(help="Picture or folder to search.")] = None,
    label: Annotated[int | None, typer.Option(help="Which label of an indexed support mask is the object.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for masks, overlays, masks.json.")] = Path("out"),
    overlays: Annotated[bool, typer.Option(help="Write an overlay for each picture.")] = True,
    runtime: Runtime = "onnxruntime",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Segment pictures with enrolled classes (--bank, --class), or with --support PICTURE:MASK in one go."""
    from fssdeploy.annotate import annotate_files
    from fssdeploy.artifact import load
    from fssdeploy.images.pictures import find_pictures

    if bool(bank) == bool(support):
        raise InputError("usage", "segment needs either --bank or --support", "", f"See: {context.command_path} --help")
    given = list(paths or [])
    artifact = given.pop(0) if given else DEFAULT_ARTIFACT
    files = find_pictures([*given, *(query or [])])
    with progress_lines(as_json) as progress:
        progress("loading")
        start = time.perf_counter()
        system = load(artifact, runtime, threads=threads)
        if bank:
            states = _from_bank(bank, system.fingerprint, classes)
        else:
            pairs = [split_support(text) for text in support or []]
            states = {classes or "object": enroll_pictures(system, pairs, label)}
        seconds = time.perf_counter() - start
        report = annotate_files(system, states, files, out, overlays=overlays, progress=progress)
    report.facts["loaded in" if bank else "loaded and enrolled in"] = f"{seconds * 1e3:.0f} ms"
    report.data["load_seconds"] = seconds
    report.notes[:0] = notes(artifact)
    emit(report, as_json)
    if report.data["errors"]:
        raise typer.Exit(InputError.exit_code)


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


def _from_bank(bank: Path, fingerprint: str, classes: str | None) -> dict[str, ClassState]:
    from fssdeploy.bank.bank import Bank

    with Bank.open(bank, fingerprint) as opened:
        known = opened.names()
        # A name may itself hold a comma: the whole text is tried first.
        names = known if classes is None else [classes] if classes in known else classes.split(",")
        if not names:
            raise InputError("bank_empty", f"bank '{bank}' holds no class", "", "Enrol one with fssdeploy enroll.")
        return {name.strip(): opened.get(name.strip()) for name in names}
