"""One family of errors: each says what happened, why, and what to do, and knows the exit code of a command."""

from __future__ import annotations


class FssError(Exception):
    """Base of every error a user can cause or meet.

    `code` is a short stable name for programs (``picture_unreadable``), `what`/`why`/`fix` are for people;
    `exit_code` is what the command line returns.
    """

    exit_code = 1

    def __init__(self, code: str, what: str, why: str = "", fix: str = "") -> None:
        self.code, self.what, self.why, self.fix = code, what, why, fix
        super().__init__(self.line())

    def __reduce__(self) -> tuple[type[FssError], tuple[str, str, str, str]]:
        """So that worker processes can hand it over: an exception is else made again from its text alone."""
        return type(self), (self.code, self.what, self.why, self.fix)

    def line(self) -> str:
        """The whole error on one line."""
        text = f"{self.what}: {self.why}" if self.why else self.what
        text = f"{text.rstrip('.')}. {self.fix}" if self.fix else text
        return " ".join(text.split())

    def to_dict(self) -> dict[str, str | int]:
        """The error for `--json`."""
        return {"code": self.code, "what": self.what, "why": self.why, "fix": self.fix, "exit_code": self.exit_code}


class CheckFailedError(FssError):
    """A check that guards a promotion did not hold (parity, lint, guard)."""

    exit_code = 2


class InputError(FssError):
    """Something given by the user cannot be used: an argument, a picture, a mask, a checkpoint."""

    exit_code = 3


class MachineError(FssError):
    """The machine cannot do it: a missing package, no space left, a path that cannot be written."""

    exit_code = 4


class IntegrityError(FssError):
    """Stored data are damaged or do not belong together: an artifact, a manifest, a bank."""

    exit_code = 5
