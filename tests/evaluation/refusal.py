"""A failure that must be one of ours, with its code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fssdeploy.errors import FssError, InputError


@contextmanager
def refused(code: str, kind: type[FssError] = InputError) -> Iterator[pytest.ExceptionInfo[FssError]]:
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code, str(caught.value)
