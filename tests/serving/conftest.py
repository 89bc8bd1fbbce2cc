"""The real server's environment, for the tests that start it."""

from __future__ import annotations

import warnings

import pytest

from fssdeploy.serving.environment import SETUP, Environment, locate, ready


@pytest.fixture(scope="session")
def server_environment() -> Environment:
    """The private environment, with the package as it is now. Without one the tests of the real server are skipped."""
    if locate() is None:
        reason = f"THE REAL SERVER WAS NOT TESTED: there is no serving environment; run: {SETUP}"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    return ready()
