"""The SQLite file of a bank: connections that threads and processes can share safely, and its errors in our words."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from fssdeploy.errors import FssError, InputError, IntegrityError, MachineError
from fssdeploy.files import storage_error

BUSY_SECONDS = 30.0
_LITTLE = 1 << 17  # bytes; an empty index with its helper files takes about as much


class Index:
    """An SQLite database in WAL mode: any number of readers, which never wait for the one writer.

    A connection is used by one thread at a time: `reading` and `writing` borrow an idle one or open another. One that
    met an error is closed, which rolls back whatever it had begun.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._closed = False
        # By process: a connection carried through a fork would share its locks with the parent.
        self._idle: dict[int, list[sqlite3.Connection]] = {}

    def create(self, statements: Sequence[tuple[str, tuple[object, ...]]]) -> None:
        """Run `statements` (SQL, values) in one transaction if the database has no tables yet, else do nothing.

        Several processes may do so at once; a kill in between leaves a database without tables.
        """
        with self._translated():
            connection = _connect(f"{self.path.as_uri()}?mode=rwc")
            try:
                _switch_to_wal(connection)
                connection.execute("BEGIN IMMEDIATE")
                if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    for sql, values in statements:
                        connection.execute(sql, values)
                connection.execute("COMMIT")
            finally:
                connection.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection for single SELECT statements, each of which sees one committed state of the index."""
        with self._translated():
            connection, keep = self._borrow()
            try:
                yield connection
            except BaseException:
                connection.close()
                raise
            if keep and not self._closed:
                self._idle_here().append(connection)
            else:
                connection.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock from its beginning; committed, and on disk, when the block ends."""
        with self.reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")

    def select(
        self, connection: sqlite3.Connection, types: tuple[type, ...], sql: str, values: tuple[object, ...] = ()
    ) -> Iterator[tuple[Any, ...]]:
        """The rows of a query, whose columns must have these types: SQLite checks them when it writes, not on reading.

        Raises IntegrityError ``bank_damaged``.
        """
        with closing(connection.execute(sql, values)) as rows:
            for row in rows:
                if tuple(map(type, row)) != types:
                    raise self.damaged("a row of its index has values of the wrong type")
                yield row

    def close(self) -> None:
        """Close the idle connections; those in use are closed by their user when done."""
        self._closed = True
        idle = self._idle_here()
        while idle:
            idle.pop().close()

    def damaged(self, why: str) -> IntegrityError:
        """The error for an index whose content makes no sense."""
        return IntegrityError(
            "bank_damaged", f"the bank '{self.path.parent}' is damaged", why, "Restore it from a backup."
        )

    def _idle_here(self) -> list[sqlite3.Connection]:
        return self._idle.setdefault(os.getpid(), [])

    def _borrow(self) -> tuple[sqlite3.Connection, bool]:
        """A connection, and whether it may be used again."""
        if self._closed:
            raise InputError("bank_closed", f"the bank '{self.path.parent}' was closed", fix="Open it again.")
        try:
            return self._idle_here().pop(), True
        except IndexError:
            pass
        uri = self.path.as_uri()
        try:
            return _connect(f"{uri}?mode=rw"), True  # SQLite itself falls back to reading a file it may not write
        except sqlite3.OperationalError as error:
            if _code(error) not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) and not self._is_full(error):
                raise
            return self._connect_immutable(uri, error), False

    def _connect_immutable(self, uri: str, error: sqlite3.OperationalError) -> sqlite3.Connection:
        """Read where not even SQLite's helper files can be made: read-only, or full (they exist while somebody writes).

        Such a connection sees no log and takes no lock, so it serves one reading and is not used again: the next one
        sees what a writer elsewhere has done meanwhile.
        """
        log = self.path.with_name(f"{self.path.name}-wal")
        if log.exists() and log.stat().st_size:
            raise MachineError(
                "bank_unsettled",
                f"the bank '{self.path.parent}' cannot be read",
                "its last changes are still in SQLite's log, and the folder is read-only or its disk full",
                "Open it once where it can be written, or copy it to such a place.",
            ) from error
        return _connect(f"{uri}?immutable=1")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._explain(error) from error
        except UnicodeDecodeError as error:  # SQLite quotes damaged text in its own message
            raise self.damaged(str(error)) from error
        except OSError as error:
            raise storage_error(error, self.path) from error

    def _explain(self, error: sqlite3.Error) -> FssError:
        what, why = f"the bank '{self.path.parent}' cannot be used", f"SQLite reports: {error}"
        match _code(error):
            case sqlite3.SQLITE_BUSY:
                why = f"another process has been writing for {BUSY_SECONDS:.0f} s"
                return MachineError("bank_busy", what, why, "Try again.")
            case _ if self._is_full(error):
                return storage_error(OSError(errno.ENOSPC, ""), self.path.parent)
            case sqlite3.SQLITE_READONLY:
                return MachineError("read_only", what, "it can only be read", "Change its permissions, or copy it.")
            case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_IOERR | sqlite3.SQLITE_PROTOCOL:
                return MachineError("storage", what, why, "Keep the bank in a readable folder on a local disk.")
            case _:
                return self.damaged(why)

    def _is_full(self, error: sqlite3.Error) -> bool:
        """Whether an error comes of a full disk. Where SQLite cannot make its helper files, it does not say why."""
        folder = self.path.parent
        match _code(error):
            case sqlite3.SQLITE_FULL:
                return True
            case sqlite3.SQLITE_IOERR | sqlite3.SQLITE_READONLY:  # disks that are read-only have no space, too
                return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free < _LITTLE
            case _:
                return False


def _connect(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True)
    try:
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # only now is the file opened
    except BaseException:
        connection.close()
        raise
    return connection


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """WAL mode, which the file then keeps. When two processes create it at once SQLite refuses one without waiting."""
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(0.01)


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 for what the Python module finds wrong by itself, as text that is not UTF-8."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
