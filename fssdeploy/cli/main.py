"""The `fssdeploy` command as a process: whatever fails ends in one line on standard error and an exit code.

0 done, 1 internal error, 2 a check failed (parity, lint), 3 bad input, 4 the machine cannot (missing package, disk),
5 stored data damaged or mismatched, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import warnings
from contextlib import suppress
from typing import NoReturn

from fssdeploy.errors import FssError, InputError, MachineError
from fssdeploy.files import storage_error

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
TRACEBACK = "FSSDEPLOY_TRACEBACK"


class _Terminated(SystemExit):
    pass


def main() -> NoReturn:
    """Run the command line and leave the process."""
    code = _run()
    try:
        print(end="", flush=True)  # of what typer printed
    except OSError as error:
        from fssdeploy.cli.common import drop_output

        drop_output()
        if code == 0 and not isinstance(error, BrokenPipeError):
            code = _report(storage_error(error, "standard output"))
    sys.exit(code)


def _run() -> int:
    try:
        _prepare()
        # Imported only now, so that an interrupt during the import is reported like any other.
        from fssdeploy.cli.app import app

        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # what newer releases of typer make of it
            raise KeyboardInterrupt
    except _Terminated:
        return _report(_stopped("terminated", TERMINATED))
    except SystemExit:  # how typer and rich leave when the reader of their help has gone
        return 0
    except BaseException as error:
        # No arguments at all: the help has been printed.
        if hasattr(error, "format_message") and not error.format_message().strip():
            return 0
        return _report(_in_our_words(error))
    return code if isinstance(code, int) else 0


def _prepare() -> None:
    """Clean up when terminated, keep what libraries find remarkable to ourselves, never fail for a strange letter."""
    with suppress(ValueError):  # only the main thread may have handlers
        signal.signal(signal.SIGTERM, _terminate)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _terminate(number: int, frame: object) -> NoReturn:
    """As an exception, so that everything on the way out removes what it had begun."""
    raise _Terminated


def _in_our_words(error: BaseException) -> FssError:
    if isinstance(error, FssError):
        return error
    # Usage errors and interrupts come as classes of click, which typer carries inside itself in some releases.
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return _stopped("interrupted", INTERRUPTED)
    if hasattr(error, "format_message"):
        command = getattr(getattr(error, "ctx", None), "command_path", "fssdeploy")
        return InputError("usage", error.format_message(), "", f"See: {command} --help")
    # PyTorch has no class of its own for it.
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return MachineError(
            "no_memory", "the machine ran out of memory", "", "Use smaller pictures or a smaller preset."
        )
    if isinstance(error, OSError):
        return storage_error(error, error.filename or "a file or folder")
    if isinstance(error, ImportError):
        return MachineError("package_broken", "a package cannot be loaded", str(error), "Run: fssdeploy doctor")
    if os.environ.get(TRACEBACK):
        raise error
    why = f"{type(error).__name__}: {error}"
    return FssError("internal", "an unexpected failure", why, f"This is a bug; {TRACEBACK}=1 shows where it happened.")


def _stopped(how: str, exit_code: int) -> FssError:
    error = FssError(how, how, "", "Nothing was left half-written.")
    error.exit_code = exit_code
    return error


def _report(error: FssError) -> int:
    from fssdeploy.cli.common import say_error, write_out

    say_error(error)
    if "--json" in sys.argv:
        with suppress(FssError):
            write_out(json.dumps({"error": error.to_dict()}))
    return error.exit_code
