"""A class into a bank that may not exist yet: a new bank appears whole, with its first class in it, or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from fssdeploy.bank.bank import Bank
from fssdeploy.bank.names import class_name
from fssdeploy.files import staged_folder, storage_error, sync_folder
from fssdeploy.protocol import ClassState


def store_class(
    directory: str | os.PathLike[str], name: str, state: ClassState, *, add: bool = False
) -> tuple[int, int]:
    """Store `state` as the next version of the class, in the bank of its artifact; the version and its shots.

    With `add` it is merged with the newest version, which must exist. A missing bank is built in a hidden sibling that
    is then renamed, so that nothing stays behind when that fails. Raises what `Bank.open`, `put` and `extend` raise.
    """
    folder = Path(directory).absolute()
    name = class_name(name)
    if add:
        with Bank.open(folder, state.fingerprint) as bank:
            version = bank.extend(name, state)
            return version, bank.get(name, version).shots
    if not os.path.lexists(folder) and (first := _put_first(folder, name, state)):
        return first, state.shots
    with Bank.open(folder, state.fingerprint, create=True) as bank:
        return bank.put(name, state), state.shots


def _put_first(folder: Path, name: str, state: ClassState) -> int | None:
    """Make the bank with this class; None if somebody else made it meanwhile."""
    with staged_folder(folder) as staged:
        with Bank.open(staged, state.fingerprint, create=True) as bank:
            version = bank.put(name, state)
        try:
            os.rename(staged, folder)
            sync_folder(folder.parent)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return None
            raise storage_error(error, folder) from error
    return version
