"""What goes wrong between a client and the server, in our words, and whether asking again is safe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from fssdeploy.errors import FssError, InputError, IntegrityError, MachineError

# What models put into their errors (fssdeploy.serving.models.answers); an ensemble writes its own name before it.
_CODED = re.compile(r"error\[(\w+)\]: (.*)", re.DOTALL)
_INPUT = ("400", "404", "StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND")
_MISSING = ("404", "StatusCode.NOT_FOUND")
_UNAVAILABLE = ("503", "StatusCode.UNAVAILABLE")
_LATE = ("StatusCode.DEADLINE_EXCEEDED",)
_NO_CONNECTION = re.compile("failed to connect|connection refused|name resolution|DNS", re.IGNORECASE)
_QUEUE = re.compile("Exceeds maximum queue size|Request timeout expired")
_NO_REGION = re.compile("Unable to find shared memory region", re.IGNORECASE)


class Repeat(Enum):
    """Whether a request may be sent again: never, if doing it twice does no harm, or in any case (it was not done)."""

    NEVER = "never"
    IF_HARMLESS = "if harmless"
    ALWAYS = "always"


@dataclass(frozen=True)
class Failure:
    """An error for the user, and whether the request may be sent again."""

    error: FssError
    repeat: Repeat
    region_lost: bool = False


class NotSentError(Exception):
    """No connection could be made, so the server has not seen the request."""


def explain(error: Exception, url: str, seconds: float) -> Failure:
    """The failure behind any exception of a request that had `seconds` of time."""
    if isinstance(error, NotSentError):
        return Failure(_unreachable(url, str(error)), Repeat.ALWAYS)
    status = getattr(error, "status", None)
    if callable(status) and hasattr(error, "message"):  # tritonclient's exception
        return _of_answer(error.message() or "", status() or "", url, seconds)
    if isinstance(error, TimeoutError):
        return Failure(_late(url, seconds), Repeat.NEVER)
    what = f"the connection to the server at {url} broke off"
    why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    lost = MachineError("connection_lost", what, why, "See whether the server is running: fssdeploy client status.")
    return Failure(lost, Repeat.IF_HARMLESS)


def _of_answer(text: str, status: str, url: str, seconds: float) -> Failure:
    coded = _CODED.search(text)
    if coded:
        code, line = coded[1], " ".join(coded[2].split())
        kind = InputError if status in _INPUT else MachineError if status in _UNAVAILABLE else IntegrityError
        return Failure(kind(code, line), Repeat.NEVER)
    why = " ".join(text.split())
    if status in _LATE:
        return Failure(_late(url, seconds), Repeat.NEVER)
    if _NO_REGION.search(text):
        error: FssError = MachineError(
            "shared_memory", "the server lost the shared memory", why, "Make a new client, or one without it."
        )
        return Failure(error, Repeat.ALWAYS, region_lost=True)
    if status in _MISSING:
        error = InputError(
            "model_missing", "the server does not serve this system", why, "See: fssdeploy client status."
        )
        return Failure(error, Repeat.NEVER)
    if status in _INPUT:
        return Failure(InputError("request_refused", "the server refused the request", why), Repeat.NEVER)
    if status in _UNAVAILABLE:
        if _NO_CONNECTION.search(text):
            return Failure(_unreachable(url, why), Repeat.ALWAYS)
        if _QUEUE.search(text):
            return Failure(
                MachineError("server_busy", "the server has too many requests waiting", why, "Try again later."),
                Repeat.ALWAYS,
            )
        error = MachineError("server_unavailable", f"the server at {url} cannot answer now", why, "Try again later.")
        return Failure(error, Repeat.IF_HARMLESS)
    error = MachineError("server_failed", "the server failed", why, "Look into the server's log.")
    return Failure(error, Repeat.NEVER)


def _unreachable(url: str, why: str) -> MachineError:
    return MachineError("server_unreachable", f"there is no server at {url}", why, "Start it: fssdeploy serve DIR.")


def _late(url: str, seconds: float) -> MachineError:
    return MachineError(
        "timeout",
        f"the server at {url} did not answer in time",
        f"{seconds:g} s were given; it may still finish the request",
        "Give more time.",
    )
