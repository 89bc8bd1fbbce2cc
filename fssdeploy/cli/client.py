"""`fssdeploy client`: enrol and segment through a server that `fssdeploy serve` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fssdeploy.cli.common import Json, emit, emit_failed, progress_lines
from fssdeploy.errors import InputError, MachineError

client_app = typer.Typer(help="Enrol and segment through a running server.", no_args_is_help=True)

Url = Annotated[
    str, typer.Argument(help="host:port of the server, as fssdeploy serve prints it; grpc:// may stand before it.")
]
System = Annotated[str | None, typer.Option(help="Which system; needed where the server has several.")]
Protocol = Annotated[str | None, typer.Option(help="http or grpc, as the port is; default: the address's, else http.")]
SharedMemory = Annotated[bool, typer.Option("--shared-memory", help="For a server on this machine: faster.")]
Timeout = Annotated[float, typer.Option(help="Seconds that one answer may take.")]


@client_app.command()
def enroll(
    url: Url,
    name: Annotated[str, typer.Argument(help="Name of the class, any text.")],
    image: Annotated[list[Path], typer.Option(help="Support picture; repeat for more shots.")],
    mask: Annotated[list[str], typer.Option(help="Its mask: a file, box:x0,y0,x1,y1 or polygon:x,y,...")],
    add: Annotated[
        bool, typer.Option("--add", help="Add the shots to the newest version instead of replacing it.")
    ] = False,
    system: System = None,
    protocol: Protocol = None,
    shared_memory: SharedMemory = False,
    timeout: Timeout = 30.0,
    as_json: Json = False,
) -> None:
    """Enrol NAME from annotated pictures into the server's bank."""
    from fssdeploy.report import Report
    from fssdeploy.serving.client import Client

    with Client(url, system, protocol, shared_memory, timeout) as client:
        enrolled = client.enroll(name, image, mask, add=add)
    facts = {"class": enrolled.name, "version": enrolled.version, "shots": enrolled.shots, "server": url}
    emit(Report("enrolled", facts, [], [], facts), as_json)


@client_app.command()
def segment(
    url: Url,
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Name of an enrolled class; repeat for more. Default: all.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for masks and overlays.")] = Path("out"),
    overlays: Annotated[bool, typer.Option(help="Write an overlay for each picture.")] = True,
    system: System = None,
    protocol: Protocol = None,
    shared_memory: SharedMemory = False,
    timeout: Timeout = 30.0,
    as_json: Json = False,
) -> None:
    """Find enrolled classes in pictures; writes <picture>.<class>.png for each."""
    import time

    from fssdeploy.annotate import safe_name, unique_stems
    from fssdeploy.files import made_folder
    from fssdeploy.images.masks import save_mask
    from fssdeploy.images.overlay import overlay, save_picture
    from fssdeploy.images.pictures import find_pictures, load_picture
    from fssdeploy.report import Report, Table
    from fssdeploy.serving.client import Client

    files = find_pictures(pictures)
    table = Table("masks", ["picture", "class", "version", "pixels", "score", "ms"], [])
    entries, errors = [], []
    with (
        progress_lines(as_json) as progress,
        made_folder(out),
        Client(url, system, protocol, shared_memory, timeout) as client,
    ):
        for file, stem in zip(files, unique_stems(files), strict=True):
            progress(f"segmenting {file.name}")
            start = time.perf_counter()
            try:
                found = client.segment(file, classes)
            except InputError as error:
                # Of several pictures a bad one is skipped; what is wrong with the request is wrong with all.
                if len(files) == 1 or not error.code.startswith(("picture_", "file_", "not_a_picture", "masks_too")):
                    raise
                errors.append({"file": str(file), **error.to_dict()})
                continue
            seconds = time.perf_counter() - start
            entry: dict[str, object] = {"file": str(file), "seconds": seconds, "classes": {}}
            written = {}
            for name, item in found.items():
                written[name] = {
                    "mask": f"{stem}.{safe_name(name)}.png",
                    "area": int(item.mask.sum()),
                    "score": item.score,
                    "version": item.version,
                }
                save_mask(out / f"{stem}.{safe_name(name)}.png", item.mask)
                row = [file.name, name, item.version, int(item.mask.sum()), f"{item.score:.2f}"]
                table.rows.append([*row, "" if len(written) > 1 else f"{seconds * 1e3:.0f}"])
            entry["classes"] = written
            if overlays:
                entry["overlay"] = f"{stem}.overlay.jpg"
                drawn = overlay(load_picture(file), {name: item.mask for name, item in found.items()})
                save_picture(out / f"{stem}.overlay.jpg", drawn, marked=True)
            entries.append(entry)
    notes = [f"SKIPPED {error['what']}" for error in errors]
    data = {"pictures": entries, "errors": errors, "out": str(out), "server": url}
    report = Report("segmented", {"pictures": len(entries), "written to": str(out)}, [table], notes, data)
    if not errors:
        emit(report, as_json)
        return
    what = f"{len(errors)} of {len(files)} pictures were skipped"
    emit_failed(report, InputError("pictures_skipped", what, str(errors[0]["what"])), as_json)


@client_app.command()
def status(url: Url, protocol: Protocol = None, timeout: Timeout = 30.0, as_json: Json = False) -> None:
    """Show whether the server is ready, and its models."""
    from fssdeploy.report import Report, Table
    from fssdeploy.serving.client import Client

    with Client(url, None, protocol, timeout=timeout) as client:
        found = client.status()
    table = Table("models", ["model", "state"], [[model["name"], model["state"]] for model in found["models"]])
    facts = {"server": f"{found['server']} {found['version']} at {url}", "ready": found["ready"]}
    facts["systems"] = ", ".join(found["systems"]) or "none"
    report = Report("server", facts, [table], [], found)
    if found["ready"]:
        emit(report, as_json)
        return
    what, why = f"the server at {url} is not ready", "a model is not loaded"
    emit_failed(report, MachineError("server_not_ready", what, why, "Look into its log."), as_json)
