"""A bank: the enrolled classes of one artifact in one folder, every version kept until it is pruned.

``index.sqlite`` says which versions there are, ``states/<sha256>.safetensors`` holds them. A file is named after its
content, so a class may be called anything and never becomes a path.

Safe against a kill at any moment: a version's file is complete and on disk before the row that names it is committed,
and rows go before files. What a kill leaves behind is at worst a file that no row names; `prune` removes it.

Safe among processes and threads: everything that writes, including the writing of files, happens inside one SQLite
write transaction. So whoever holds that lock knows that no file is waiting for its row, and `prune` needs neither a
second lock nor a guess from the age of files. Readers take no lock.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from fssdeploy.bank.index import Index
from fssdeploy.bank.names import class_name, unknown_class
from fssdeploy.bank.states import decode_state, encode_state, json_text
from fssdeploy.errors import InputError, IntegrityError, MachineError
from fssdeploy.files import storage_error, write_atomic
from fssdeploy.protocol import ClassState

FORMAT = 1  # of the schema and of the state files

_SCHEMA = (
    "CREATE TABLE bank (format INTEGER NOT NULL, fingerprint TEXT NOT NULL)",
    # The highest version ever given, so that a number is never used twice, even after a removal: whoever remembers
    # (name, version) must never be shown another state under it.
    "CREATE TABLE class (name TEXT PRIMARY KEY NOT NULL, last INTEGER NOT NULL)",
    "CREATE TABLE state (name TEXT NOT NULL, version INTEGER NOT NULL, shots INTEGER NOT NULL, bytes INTEGER NOT NULL,"
    " sha256 TEXT NOT NULL, created TEXT NOT NULL, meta TEXT NOT NULL, PRIMARY KEY (name, version))",
    f"PRAGMA user_version = {FORMAT}",
)
_COLUMNS = "name, version, shots, bytes, sha256, created, meta"
_TYPES = (str, int, int, int, str, str, str)

# What a bank puts into its states folder: states, and the temporary files of `write_atomic` that a kill leaves.
_OWN_FILE = re.compile(r"[0-9a-f]{64}\.safetensors|\.[0-9a-f]+\.tmp")


@dataclass(frozen=True)
class VersionInfo:
    """One version of a class as the index lists it. `created` is ISO 8601 in UTC; `bytes` is the size of its file."""

    name: str
    version: int
    shots: int
    bytes: int
    sha256: str
    created: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class PruneReport:
    """What a pruning removed: rows of versions, files, and the bytes of those files."""

    versions: int
    files: int
    bytes: int


class Bank:
    """Enrolled classes on disk. Open one with `Bank.open`; use it from any number of threads and processes.

    Every method may raise IntegrityError ``bank_damaged`` (the index makes no sense) and MachineError (no space, not
    permitted, read-only, or a writer that does not finish within 30 s).
    """

    def __init__(self, directory: Path, fingerprint: str, index: Index) -> None:
        self.directory = directory
        self.fingerprint = fingerprint
        self._index = index

    @classmethod
    def open(cls, directory: str | PathLike[str], fingerprint: str | None = None, *, create: bool = False) -> Bank:
        """Open the bank in `directory`; with `create`, make it if there is none.

        `fingerprint` is that of the artifact to be used with it; None takes the bank as it is, for listing. A bank
        that cannot be written can still be read. Raises InputError ``bank_missing`` and ``bank_needs_fingerprint``
        (to create one), IntegrityError ``bank_of_other_artifact``, ``bank_newer`` and ``bank_damaged``, MachineError.
        """
        folder = Path(directory).absolute()
        index = Index(folder / "index.sqlite")
        found = _read_header(folder, index)
        if found is None and create:
            _create(folder, index, fingerprint)
            found = _read_header(folder, index)
        if found is None:
            raise InputError(
                "bank_missing", f"there is no bank in '{folder}'", fix="Check the path, or enrol a class to create it."
            )
        if fingerprint not in (None, found):
            index.close()
            raise IntegrityError(
                "bank_of_other_artifact",
                f"the bank '{folder}' belongs to another artifact",
                f"it has the fingerprint {found[:12]}, the artifact has {str(fingerprint)[:12]}",
                "Use the artifact it was made with, or enrol the classes into a new bank.",
            )
        return cls(folder, found, index)

    def put(self, name: str, state: ClassState, *, meta: Mapping[str, Any] | None = None) -> int:
        """Store `state` as the next version of the class and return its number: 1, 2, ..., never one used before.

        `meta` (JSON) is added to the state's own. When this returns, the version survives a power failure. Raises
        InputError ``class_name``, ``state_of_other_artifact``, ``state_empty``, ``state_dtype``, ``meta_not_json``.
        """
        name = class_name(name)
        self._check_fingerprint(state)
        with self._index.writing() as connection:
            return self._insert(connection, name, replace(state, meta={**state.meta, **(meta or {})}))

    def extend(self, name: str, state: ClassState) -> int:
        """Merge `state` with the newest version into the next one, every shot weighing the same; return its number.

        Nobody else can put a version in between. Raises InputError ``class_unknown``, ``state_of_other_artifact``,
        ``state_shapes`` (its tensors differ from those stored); IntegrityError ``state_damaged``.
        """
        name = class_name(name)
        self._check_fingerprint(state)
        with self._index.writing() as connection:
            newest = self._load(self._find(connection, name, None))
            if _shapes(newest) != _shapes(state):
                raise InputError(
                    "state_shapes",
                    f"class '{name}' cannot be extended",
                    "the tensors of the new shots differ in name, type or shape from those in the bank",
                    "Enrol the new shots with the same system and settings.",
                )
            return self._insert(connection, name, newest.merge(state))

    def get(self, name: str, version: int | None = None) -> ClassState:
        """The state of a class, by default its newest, checked against its sha256.

        Raises InputError ``class_unknown`` and ``version_unknown``, IntegrityError ``state_damaged``.
        """
        name = class_name(name)
        while True:
            with self._index.reading() as connection:
                info = self._find(connection, name, version)
            state = self.read(info)
            if state is not None:  # else what is listed now counts: a newer version, or none
                return state

    def newest(self, names: Sequence[str] | None = None) -> list[VersionInfo]:
        """What is listed of the newest versions of these classes (default: of all), all at one moment.

        In the order of `names`, each once, or of the characters of the names. Raises InputError ``class_unknown``.
        """
        newest = "version = (SELECT max(version) FROM state AS other WHERE other.name = state.name)"
        with self._index.reading() as connection:
            if names is None:
                return list(self._infos(connection, f"WHERE {newest} ORDER BY name"))
            wanted = list(dict.fromkeys(class_name(name) for name in names))
            which = f"WHERE name IN (SELECT value FROM json_each(?)) AND {newest}"
            infos = {info.name: info for info in self._infos(connection, which, (json.dumps(wanted),))}
            for name in wanted:
                if name not in infos:
                    raise unknown_class(name, self._names(connection))
            return [infos[name] for name in wanted]

    def read(self, info: VersionInfo) -> ClassState | None:
        """The state of a version as it was listed, checked against its sha256; None if it has been removed meanwhile.

        Raises IntegrityError ``state_damaged``.
        """
        try:
            return self._load(info)
        except IntegrityError:
            if self._is_listed(info):
                raise
            return None

    def names(self) -> list[str]:
        """The classes that have at least one version, in the order of their characters."""
        with self._index.reading() as connection:
            return self._names(connection)

    def versions(self, name: str) -> list[VersionInfo]:
        """What is stored of a class, oldest first. Raises InputError ``class_unknown``."""
        name = class_name(name)
        with self._index.reading() as connection:
            infos = list(self._infos(connection, "WHERE name = ? ORDER BY version", (name,)))
            if not infos:
                raise unknown_class(name, self._names(connection))
            return infos

    def remove(self, name: str) -> int:
        """Forget all versions of a class and return how many; `prune` frees the disk. Raises InputError."""
        name = class_name(name)
        with self._index.writing() as connection:
            removed = connection.execute("DELETE FROM state WHERE name = ?", (name,)).rowcount
            if not removed:
                raise unknown_class(name, self._names(connection))
            return removed

    def prune(self, keep: int = 1) -> PruneReport:
        """Drop all but the newest `keep` versions of every class, then the files that no version refers to.

        Raises InputError ``prune_keep`` when `keep` is below 1.
        """
        if keep < 1:
            raise InputError("prune_keep", f"cannot keep {keep} versions", fix="Keep at least 1, or remove the class.")
        with self._index.writing() as connection:
            sql = (
                "DELETE FROM state WHERE rowid IN (SELECT rowid FROM (SELECT rowid, row_number()"
                " OVER (PARTITION BY name ORDER BY version DESC) AS age FROM state) WHERE age > ?)"
            )
            versions = connection.execute(sql, (min(keep, 2**31),)).rowcount
        # Committed first: a kill must not leave a row whose file is gone.
        with self._index.writing() as connection:
            used = {f"{sha256}.safetensors" for (sha256,) in connection.execute("SELECT sha256 FROM state")}
            files, freed = self._sweep(used)
        return PruneReport(versions, files, freed)

    def verify(self) -> list[str]:
        """Read everything and return what is wrong, one line each; an empty list means a healthy bank."""
        try:
            with self._index.reading() as connection:
                lines = [str(line) for (line,) in connection.execute("PRAGMA integrity_check(8)") if line != "ok"]
                listed = list(self._infos(connection))
        except IntegrityError as error:
            return [error.line()]
        problems = [self._index.damaged(line).line() for line in lines]
        for info in listed:
            try:
                self._load(info)
            except (IntegrityError, MachineError) as error:
                if self._is_listed(info):
                    problems.append(error.line())
        return problems

    def close(self) -> None:
        """Release the index; later calls raise InputError ``bank_closed``."""
        self._index.close()

    def __enter__(self) -> Bank:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_fingerprint(self, state: ClassState) -> None:
        if state.fingerprint != self.fingerprint:
            raise InputError(
                "state_of_other_artifact",
                f"the class state does not belong into the bank '{self.directory}'",
                "it was enrolled with different weights or preprocessing",
                "Enrol it with the artifact of this bank.",
            )

    def _insert(self, connection: sqlite3.Connection, name: str, state: ClassState) -> int:
        """The next version of `name`, inside the caller's transaction."""
        data = encode_state(state)
        sha256 = hashlib.sha256(data).hexdigest()
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        connection.execute("INSERT INTO class VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET last = last + 1", (name,))
        version: int = connection.execute("SELECT last FROM class WHERE name = ?", (name,)).fetchone()[0]
        connection.execute(
            f"INSERT INTO state ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (name, version, int(state.shots), len(data), sha256, created, json_text(state.meta)),
        )
        # Nobody sees the row before the commit, and by then the file is on disk. Written even if a file of that name
        # exists, which mends one that is damaged.
        write_atomic(self._file(sha256), data, sync=True)
        return version

    def _find(self, connection: sqlite3.Connection, name: str, version: int | None) -> VersionInfo:
        kept = []
        with closing(self._infos(connection, "WHERE name = ? ORDER BY version DESC", (name,))) as infos:
            for info in infos:
                if version in (None, info.version):
                    return info
                kept.append(str(info.version))
        if not kept:
            raise unknown_class(name, self._names(connection))
        raise InputError(
            "version_unknown", f"class '{name}' has no version {version}", f"the bank has {', '.join(kept[:8])}"
        )

    def _infos(
        self, connection: sqlite3.Connection, which: str = "", values: tuple[object, ...] = ()
    ) -> Generator[VersionInfo]:
        for row in self._index.select(connection, _TYPES, f"SELECT {_COLUMNS} FROM state {which}", values):
            name, version, shots, size, sha256, created, meta = row
            try:
                yield VersionInfo(name, version, shots, size, sha256, created, json.loads(meta))
            except ValueError as error:
                raise self._index.damaged(f"the notes on a version cannot be read ({error})") from error

    def _names(self, connection: sqlite3.Connection) -> list[str]:
        rows = self._index.select(connection, (str,), "SELECT DISTINCT name FROM state ORDER BY name")
        return [name for (name,) in rows]

    def _is_listed(self, info: VersionInfo) -> bool:
        with self._index.reading() as connection:
            sql = "SELECT 1 FROM state WHERE name = ? AND version = ? AND sha256 = ?"
            return connection.execute(sql, (info.name, info.version, info.sha256)).fetchone() is not None

    def _file(self, sha256: str) -> Path:
        return self.directory / "states" / f"{sha256}.safetensors"

    def _load(self, info: VersionInfo) -> ClassState:
        path = self._file(info.sha256)
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != info.sha256:
                raise ValueError(f"the content of '{path.name}' has changed")
            return decode_state(data)
        except (FileNotFoundError, ValueError) as error:
            why = f"its file '{path.name}' is missing" if isinstance(error, FileNotFoundError) else str(error)
            raise IntegrityError(
                "state_damaged",
                f"version {info.version} of class '{info.name}' is damaged",
                why,
                "Restore the bank from a backup, go back to another version, or enrol the class again.",
            ) from error
        except OSError as error:
            raise storage_error(error, path) from error

    def _sweep(self, used: set[str]) -> tuple[int, int]:
        """Delete our own files that are not `used`; the caller holds the write lock. Returns files and bytes."""
        folder = self.directory / "states"
        files = freed = 0
        try:
            for path in folder.iterdir():
                if _OWN_FILE.fullmatch(path.name) and path.name not in used:
                    size = path.stat().st_size
                    path.unlink()
                    files, freed = files + 1, freed + size
        except OSError as error:
            raise storage_error(error, folder) from error
        return files, freed


def _shapes(state: ClassState) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (array.shape, str(array.dtype)) for name, array in state.tensors.items()}


def _read_header(folder: Path, index: Index) -> str | None:
    """The fingerprint in the index, None where there is no bank (yet)."""
    try:
        has_states = any(folder.glob("states/*.safetensors"))  # looked at first: a bank gets its index before any state
        has_index = index.path.is_file()
    except OSError as error:
        raise storage_error(error, folder) from error
    if has_index:
        with index.reading() as connection:
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                return _fingerprint(connection, index)
    if has_states:  # a new index beside them would make all of them files that `prune` deletes
        raise index.damaged("there are class states, but the index is missing or empty")
    return None


def _fingerprint(connection: sqlite3.Connection, index: Index) -> str:
    # Before anything else, since a newer format may have other tables.
    _check_format(connection.execute("PRAGMA user_version").fetchone()[0], index)
    for number, fingerprint in index.select(connection, (int, str), "SELECT format, fingerprint FROM bank"):
        _check_format(number, index)
        return str(fingerprint)
    raise index.damaged("its index names no artifact")


def _check_format(number: int, index: Index) -> None:
    if number > FORMAT:
        raise IntegrityError(
            "bank_newer",
            f"the bank '{index.path.parent}' has format {number}",
            f"this version of fssdeploy reads up to {FORMAT}",
            "Update fssdeploy.",
        )


def _create(folder: Path, index: Index, fingerprint: str | None) -> None:
    if not fingerprint:
        raise InputError(
            "bank_needs_fingerprint",
            f"there is no bank in '{folder}', and none can be made",
            "a bank belongs to an artifact, and none was named",
            "Name the artifact.",
        )
    try:
        (folder / "states").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error
    header = ("INSERT INTO bank (format, fingerprint) VALUES (?, ?)", (FORMAT, fingerprint))
    index.create([(sql, ()) for sql in _SCHEMA] + [header])
