"""What every command shares: progress on standard error, reports on standard output, options used more than once."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer.core import TyperGroup

from fssdeploy.errors import FssError, InputError, MachineError
from fssdeploy.files import storage_error
from fssdeploy.report import Report

if TYPE_CHECKING:
    from fssdeploy.artifact import Artifact
    from fssdeploy.glue.gsm.options import GsmOptions

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Runtime = Annotated[str, typer.Option(help="onnxruntime or openvino.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the runtime; default: the cores this process may use.")]
BankDir = Annotated[Path, typer.Option("--bank", help="Directory of enrolled classes.")]
Boost = Annotated[str | None, typer.Option(help="gsm: a second pass on maps that the first improves.")]
BoostSet = Annotated[
    list[str] | None, typer.Option("--boost-set", help="A choice of the boost: NAME=VALUE (docs/gsm.md).")
]

PROGRESS_SECONDS = 10.0


def group_with_default(command: str) -> type[TyperGroup]:
    """A group of commands that runs `command` where none of them is named."""

    class Group(TyperGroup):
        def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
            if args and args[0] not in (*self.commands, "--help"):
                args = [command, *args]
            return super().parse_args(ctx, args)

    return Group


def check_system(artifact: Artifact, system: str | None) -> None:
    """InputError unless the artifact is of the system asked for, if one is."""
    found = artifact.manifest["system"]
    if system not in (None, found):
        raise InputError(
            "artifact_system", f"'{artifact.path}' is no '{system}'", f"it is '{found}'", f"Ask for '{found}'."
        )


def boost_options(boost: str | None, settings: list[str] | None) -> GsmOptions | None:
    """The options of `--boost` with the choices of `--boost-set`, None without a boost. InputError for unknown ones."""
    from fssdeploy.glue.gsm.options import GsmOptions

    if boost is None:
        if settings:
            raise InputError("usage", "--boost-set chooses nothing without --boost", "", "Add --boost gsm.")
        return None
    if boost != "gsm":
        raise InputError("boost_unknown", f"there is no boost '{boost}'", "", "Choose gsm.")
    if find_spec("scipy") is None:
        raise MachineError(
            "package_missing", "gsm needs SciPy", "it is not installed", "Run: pip install 'fssdeploy[training-free]'"
        )
    defaults = GsmOptions().to_dict()
    changes = {}
    for name, _, text in [setting.partition("=") for setting in settings or []]:
        if name not in defaults:
            choice = f"Choose from: {', '.join(sorted(defaults))}."
            raise InputError("option_unknown", f"gsm has no option '{name}'", "", choice)
        changes[name] = _typed(name, text, defaults[name])
    return GsmOptions.from_dict({**defaults, **changes})


def _typed(name: str, text: str, default: object) -> object:
    """The text of an option in the type of its default; what may be a word may be a number as well."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number"}
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        number = int(text) if isinstance(default, int) else float(text)
        if not math.isfinite(number):
            raise ValueError(text)
    except (ValueError, KeyError) as error:
        if isinstance(default, str):
            return text
        fix = f"It is {kinds[type(default)]}."
        raise InputError("option_unknown", f"gsm {name} cannot be '{text}'", "", fix) from error
    return number


def emit(report: Report, as_json: bool) -> None:
    """Print a report to standard output. Raises MachineError when that is full."""
    write_out(report.json() if as_json else report.text())


def write_out(text: str) -> None:
    """Print to standard output and flush. A reader that has gone (head, less) is no failure."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop_output()
    except OSError as error:
        drop_output()
        raise storage_error(error, "standard output") from error


def drop_output() -> None:
    """Send what is still to be written to standard output nowhere; else Python would complain again on exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(line: str) -> None:
    """Print a line to standard error, if there is one."""
    if sys.stderr:
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def say_error(error: FssError) -> None:
    """Print an error to standard error, on one line."""
    say(f"fssdeploy: error[{error.code}]: {error.line()}")


def emit_failed(report: Report, error: FssError, as_json: bool) -> NoReturn:
    """Print a report that tells of a failure, and leave with the failure's exit code.

    Not raised as it is: the report is the one JSON object on standard output, and the error stands in it.
    """
    report.data["error"] = error.to_dict()
    emit(report, as_json)
    say_error(error)
    raise typer.Exit(error.exit_code)


@contextmanager
def progress_lines(as_json: bool) -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done, with elapsed seconds.

    A live line on a terminal; else at most one plain line every ten seconds, so that long work shows a sign of life and
    standard error otherwise holds errors alone. Silent with `--json`.
    """
    start = last = time.monotonic()

    def line(text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS:
            last = now
            say(f"[{now - start:6.1f} s] {text}")

    if as_json:
        yield lambda _: None
    elif sys.stderr and sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("starting") as status:
            yield lambda text: status.update(f"{text} ({time.monotonic() - start:.0f} s)")
    else:
        yield line
