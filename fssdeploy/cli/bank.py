"""`fssdeploy bank`: look after a directory of enrolled classes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fssdeploy.cli.common import Json, emit
from fssdeploy.errors import IntegrityError

bank_app = typer.Typer(help="Look after a directory of enrolled classes.", no_args_is_help=True)
Directory = Annotated[Path, typer.Argument(help="The bank.")]


@bank_app.command("list")
def list_classes(directory: Directory, as_json: Json = False) -> None:
    """List classes and their versions."""
    from fssdeploy.bank.bank import Bank
    from fssdeploy.report import Report, Table

    table = Table("", ["class", "version", "shots", "kB", "created"], [])
    with Bank.open(directory) as bank:
        classes = []
        for name in bank.names():
            for info in bank.versions(name):
                table.rows.append([name, info.version, info.shots, f"{info.bytes / 1e3:.0f}", info.created])
                classes.append({"class": name, "version": info.version, "shots": info.shots, "created": info.created})
        fingerprint = bank.fingerprint
    facts = {"bank": str(directory), "made by artifact": fingerprint[:16]}
    data = {"bank": str(directory), "fingerprint": fingerprint, "classes": classes}
    emit(Report("bank", facts, [table], [], data), as_json)


@bank_app.command()
def remove(
    directory: Directory, name: Annotated[str, typer.Argument(help="The class.")], as_json: Json = False
) -> None:
    """Remove a class with all its versions."""
    from fssdeploy.bank.bank import Bank
    from fssdeploy.report import Report

    with Bank.open(directory) as bank:
        count = bank.remove(name)
    emit(Report("removed", {"class": name, "versions": count}, [], [], {"class": name, "versions": count}), as_json)


@bank_app.command()
def prune(
    directory: Directory,
    keep: Annotated[int, typer.Option(help="Versions of each class that stay.")] = 1,
    as_json: Json = False,
) -> None:
    """Drop old versions and files that no version needs."""
    import dataclasses

    from fssdeploy.bank.bank import Bank
    from fssdeploy.report import Report

    with Bank.open(directory) as bank:
        facts = dataclasses.asdict(bank.prune(keep))
    emit(Report("pruned", facts, [], [], facts), as_json)


@bank_app.command()
def verify(directory: Directory, as_json: Json = False) -> None:
    """Check every state against its sha256."""
    from fssdeploy.bank.bank import Bank
    from fssdeploy.report import Report

    with Bank.open(directory) as bank:
        problems = bank.verify()
    if problems:
        raise IntegrityError(
            "bank_damaged", f"bank '{directory}' is damaged", "; ".join(problems), "Enrol these again."
        )
    emit(Report("bank is healthy", {"bank": str(directory)}, [], [], {"problems": []}), as_json)
