"""What every command shares: progress on standard error, reports on standard output, options used more than once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fssdeploy.report import Report

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Runtime = Annotated[str, typer.Option(help="onnxruntime or openvino.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the runtime; default: the cores this process may use.")]
BankDir = Annotated[Path, typer.Option("--bank", help="Directory of enrolled classes.")]


def emit(report: Report, as_json: bool) -> None:
    """Print a report to standard output."""
    print(report.json() if as_json else report.text())


@contextmanager
def progress_lines(as_json: bool) -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done, with elapsed seconds: a live line on a terminal, else plain lines.

    Silent with `--json`, so that standard error holds errors alone.
    """
    if as_json:
        yield lambda _: None
        return
    start = time.monotonic()
    if not sys.stderr.isatty():
        yield lambda text: print(f"[{time.monotonic() - start:6.1f} s] {text}", file=sys.stderr, flush=True)
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda text: status.update(f"{text} ({time.monotonic() - start:.0f} s)")
