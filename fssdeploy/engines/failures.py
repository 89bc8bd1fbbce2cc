"""What runtimes raise, in our words."""

from __future__ import annotations

from pathlib import Path

from fssdeploy.errors import IntegrityError, MachineError


def graph_unreadable(path: Path, runtime: str, error: Exception) -> IntegrityError:
    """The error for a graph that a runtime does not load; the caller raises it ``from error``."""
    return IntegrityError(
        "graph_unreadable",
        f"'{path}' cannot be loaded by {runtime}",
        _gist(error),
        "Export the artifact again with this version.",
    )


def run_failed(stage: str, runtime: str, error: Exception) -> MachineError:
    """The error for a stage that breaks off although its inputs are right: most often memory."""
    return MachineError(
        "runtime_failed",
        f"stage '{stage}' broke off in {runtime}",
        _gist(error),
        "Free some memory, or try another --runtime.",
    )


def _gist(error: Exception) -> str:
    """The last line of a runtime's message: those before it are places in its own source."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
