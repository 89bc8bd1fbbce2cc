"""Files opened and written so that every failure is one of our errors and nothing is ever left half-written."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from fssdeploy.errors import InputError, MachineError

# errno -> code, why, what to do
_REASONS: dict[int, tuple[str, str, str]] = {
    errno.ENOSPC: ("no_space", "there is no space left on the disk", "Free some space or choose another disk."),
    errno.EDQUOT: ("no_space", "the disk quota is used up", "Free some space or choose another disk."),
    errno.EACCES: ("not_permitted", "permission denied", "Change its permissions or choose another place."),
    errno.EPERM: ("not_permitted", "permission denied", "Change its permissions or choose another place."),
    errno.EROFS: ("read_only", "the file system is read-only", "Choose another place."),
    errno.ENOENT: ("folder_missing", "its folder does not exist", "Create the folder first."),
    errno.EEXIST: ("not_a_folder", "a file stands where a folder is needed", "Choose another path."),
    errno.ENOTDIR: ("not_a_folder", "a part of its path is a file, not a folder", "Choose another path."),
    errno.EISDIR: ("is_a_folder", "there is a folder of that name", "Choose another name."),
    errno.ENAMETOOLONG: ("name_too_long", "the name is too long", "Choose a shorter name."),
    errno.ELOOP: ("link_loop", "its symbolic links lead in a circle", "Remove the links."),
}


def storage_error(error: OSError, path: str | os.PathLike[str]) -> MachineError:
    """The MachineError that says why `path` cannot be read or written; the caller raises it ``from error``."""
    other = ("storage", error.strerror or str(error), "Check the disk and the path.")
    code, why, fix = _REASONS.get(error.errno or 0, other)
    return MachineError(code, f"'{os.fspath(path)}' cannot be read or written", why, fix)


def open_file(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file that is not empty, for reading bytes.

    Raises InputError when it is missing, a folder, not a regular file or empty; MachineError when the machine refuses.
    """
    name = os.fspath(path)
    try:
        status = os.stat(name)
        if stat.S_ISDIR(status.st_mode):
            raise InputError("file_is_folder", f"'{name}' is a folder", "a file is needed", "Name a file in it.")
        # A pipe or a device could block for ever or never end.
        if not stat.S_ISREG(status.st_mode):
            raise InputError("file_irregular", f"'{name}' is not a regular file", fix="Copy it to a file first.")
        if status.st_size == 0:
            raise InputError("file_empty", f"'{name}' is empty", "it has zero bytes", "Copy or download it again.")
        return open(name, "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError("file_missing", f"'{name}' does not exist", fix="Check the path.") from error
    except OSError as error:
        raise storage_error(error, name) from error
    except ValueError as error:  # a NUL character in the path
        raise InputError("file_missing", f"{name!r} is not a path", str(error), "Check the path.") from error


def write_atomic(path: str | os.PathLike[str], data: bytes, *, sync: bool = False) -> None:
    """Write `data` to `path` through a temporary sibling: others see the old file or the new one, never a part.

    `sync` makes it survive a power failure (slower). Raises MachineError; the temporary file never stays.
    """
    target = Path(path)
    # Not derived from the target's name, which may already be as long as the file system allows.
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        try:
            with open(temporary, "xb") as stream:
                stream.write(data)
                if sync:
                    stream.flush()
                    os.fsync(stream.fileno())
            os.replace(temporary, target)
        except BaseException:  # an interrupt from the keyboard must not leave it either
            temporary.unlink(missing_ok=True)
            raise
        if sync:
            sync_folder(target.parent)
    except OSError as error:
        raise storage_error(error, target) from error


@contextmanager
def made_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder, made with those above it where they are missing. Those made here that end up empty go again.

    Raises MachineError when it cannot be made.
    """
    folder = Path(path)
    made = []
    try:
        try:
            for each in reversed([folder, *folder.absolute().parents]):
                if not each.is_dir():
                    each.mkdir(exist_ok=True)
                    made.append(each)
        except OSError as error:
            raise storage_error(error, folder) from error
        yield folder
    finally:
        for each in reversed(made):
            with suppress(OSError):  # it is not empty, or somebody else removed it
                each.rmdir()


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A hidden sibling of `target` to build it in and then rename; gone afterwards if it was not renamed.

    The folders above are made as `made_folder` does. Raises MachineError.
    """
    with made_folder(target.parent):
        folder = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
        try:
            folder.mkdir()
        except OSError as error:
            raise storage_error(error, target) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
