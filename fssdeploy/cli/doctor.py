"""`fssdeploy doctor`: what is installed, which paths therefore work, how to get the rest."""

from __future__ import annotations

from fssdeploy.cli.common import Json, emit


def doctor(as_json: Json = False) -> None:
    """Say what is installed, what therefore works, and how to get the rest."""
    from fssdeploy.doctor import diagnose

    emit(diagnose(), as_json)
