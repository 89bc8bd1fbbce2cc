"""The `fssdeploy` command: one verb per file, errors on one line, exit codes with a meaning.

0 done, 1 internal error, 2 a check failed (parity, lint), 3 bad input, 4 the machine cannot (missing package, disk),
5 stored data damaged or mismatched, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from typing import NoReturn

import typer

from fssdeploy import __version__
from fssdeploy.cli.bank import bank_app
from fssdeploy.cli.bench import bench
from fssdeploy.cli.demo import demo
from fssdeploy.cli.doctor import doctor
from fssdeploy.cli.enroll import enroll
from fssdeploy.cli.export import export
from fssdeploy.cli.segment import segment
from fssdeploy.errors import FssError, InputError, MachineError

INTERRUPTED = 130

app = typer.Typer(
    name="fssdeploy",
    help="Few-shot segmentation in production: annotate one to five pictures, find the thing in every other.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (export, enroll, segment, bench, doctor, demo):
    app.command()(verb)
app.add_typer(bank_app, name="bank")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fssdeploy {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Few-shot segmentation in production: annotate one to five pictures, find the thing in every other."""


def main() -> NoReturn:
    """Run the command line; every foreseeable failure ends in one line and an exit code."""
    try:
        code = app(standalone_mode=False)
    except FssError as error:
        sys.exit(_fail(error))
    except BrokenPipeError:
        # The reader (head, less) has gone; Python would complain again while flushing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except MemoryError:
        sys.exit(_fail(MachineError("no_memory", "the machine ran out of memory", "", "Use smaller pictures.")))
    except (KeyboardInterrupt, Exception) as error:
        # Usage errors and interrupts come as classes of click, which typer carries inside itself in some releases.
        if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
            print("fssdeploy: interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        if not hasattr(error, "format_message"):
            raise
        message = " ".join(error.format_message().split())
        if not message:  # no arguments at all: the help has been printed
            sys.exit(0)
        command = getattr(getattr(error, "ctx", None), "command_path", "fssdeploy")
        sys.exit(_fail(InputError("usage", message, "", f"See: {command} --help")))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: FssError) -> int:
    print(f"fssdeploy: error[{error.code}]: {error.line()}", file=sys.stderr)
    if "--json" in sys.argv:
        print(json.dumps({"error": error.to_dict()}))
    return error.exit_code
