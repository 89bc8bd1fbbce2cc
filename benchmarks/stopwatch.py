"""Where the time of a running function goes: seconds by named section, wall and CPU."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Spent:
    """Wall and CPU seconds; those of all threads of this process count."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.cpu - other.cpu)


@dataclass
class Stopwatch:
    """What each section took. Of nested sections only the innermost counts, so that sections add up to the whole."""

    spent: dict[str, Spent] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _since: Spent = field(default_factory=Spent)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count what happens inside to `name`."""
        self._account()
        self._open.append(name)
        try:
            yield
        finally:
            self._account()
            self._open.pop()

    @contextmanager
    def watching(self, places: Sequence[tuple[object, str, str]]) -> Iterator[None]:
        """Meanwhile, count every call of `owner.name` to its section, for each (owner, name, section)."""
        with ExitStack() as stack:
            for owner, name, section in places:
                stack.enter_context(mock.patch.object(owner, name, self._counted(getattr(owner, name), section)))
            yield

    def _counted(self, function: Callable[..., Any], section: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.section(section):
                return function(*args, **kwargs)

        return counted

    def _account(self) -> None:
        now = Spent(time.perf_counter(), time.process_time())
        if self._open:
            name = self._open[-1]
            self.spent[name] = self.spent.get(name, Spent()) + (now - self._since)
        self._since = now
