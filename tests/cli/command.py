"""The `fssdeploy` command, run inside the test's own process: what a shell would see of it."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from fssdeploy.cli.main import main


@dataclass(frozen=True)
class Answer:
    """Exit code, standard output and standard error of one command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output; anything more there is an error."""
        return json.loads(self.out)

    def check_refused(self, code: str, exit_code: int) -> str:
        """The line on standard error, which must be the only one, carry this code and come with this exit code."""
        assert self.code == exit_code, (self.code, self.out, self.err)
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith(f"fssdeploy: error[{code}]: "), lines[0]
        assert "Traceback" not in self.out + self.err
        return lines[0]


def fssdeploy(*arguments: object) -> Answer:
    """Run the command line."""
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as caught,
    ):
        patch.setattr(sys, "argv", ["fssdeploy", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")  # of the tables
        main()
    signal.signal(signal.SIGTERM, handler)
    assert isinstance(caught.value.code, int)
    return Answer(caught.value.code, out.getvalue(), err.getvalue())
