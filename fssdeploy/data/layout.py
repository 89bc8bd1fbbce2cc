"""What data sets on disk share: their folders and lists, their two kinds of mask files, and findings about them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from fssdeploy.data.dataset import IGNORE, Finding
from fssdeploy.errors import InputError
from fssdeploy.files import open_file, storage_error
from fssdeploy.images.pictures import open_picture


def require_any(root: Path, name: str, expected: Sequence[str], source: str) -> None:
    """InputError ``data_missing`` if the directory holds none of the expected files and folders."""
    if not any((root / each).exists() for each in expected):
        why = f"there is none of {', '.join(expected)}" if root.is_dir() else "there is no such directory"
        raise InputError("data_missing", f"'{root}' does not hold {name}", why, source)


def stems_in(folder: Path, suffix: str) -> list[str]:
    """Names, without `suffix`, of the files in a folder that end in it: numbers by value, then the others by name.

    Empty if there is no such folder. MachineError if it cannot be read.
    """
    try:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise storage_error(error, folder) from error
    stems = [name.removesuffix(suffix) for name in names if name.endswith(suffix) and not name.startswith(".")]
    return sorted(stems, key=lambda stem: (not stem.isdecimal(), int(stem) if stem.isdecimal() else 0, stem))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, stripped. Errors as `open_file`; InputError if it is not text."""
    with open_file(path) as stream:
        data = stream.read()
    try:
        return [line.strip() for line in data.decode().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(
            "list_unreadable", f"'{path}' is not a list", "it is not UTF-8 text", "Get it again."
        ) from error


def inside(item: str) -> str:
    """The item, if as a path it cannot leave a folder: episodes and lists come from elsewhere. InputError otherwise."""
    path = PurePosixPath(item)
    if path.is_absolute() or ".." in path.parts or "\0" in item or not path.parts:
        raise InputError("item_unknown", f"{item!r} is not a picture of this data set", "it leaves the directory")
    return item


def grey_mask(path: Path) -> np.ndarray:
    """Mask uint8 (H, W) of 0 and 1 from a grey or coloured picture: 1 from 128 up. Errors as `open_picture`."""
    return (np.asarray(open_picture(path).convert("L")) >= 128).astype(np.uint8)


def read_labels(path: Path) -> np.ndarray:
    """Class numbers, whole numbers (H, W), from a picture of one channel; indices count, not their colours.

    InputError if it has several channels, and as `open_picture`.
    """
    labels = np.asarray(open_picture(path))
    if labels.ndim != 2:
        raise InputError("mask_shape", f"'{path}' is coloured", "its pixels must be class numbers", "Convert it first.")
    return labels


def label_mask(labels: np.ndarray, label: int) -> np.ndarray:
    """Mask uint8 (H, W): 1 where labels (H, W) equal `label`, 255 where they are 255 (ignored), 0 elsewhere."""
    return np.where(labels == IGNORE, IGNORE, labels == label).astype(np.uint8)


def counted(what: str, found: int, published: int, source: str = "") -> Finding:
    """A finding that compares a count with the published one: ok if equal, missing if there is nothing."""
    if found == published:
        return Finding(what, "ok", f"{found:,}")
    return Finding(what, "note" if found else "missing", f"{found:,}; published are {published:,}", source)


def files_finding(what: str, folder: Path, names: Collection[str], source: str) -> Finding:
    """Whether the listed files lie in a folder; `source` says where they come from."""
    if not folder.is_dir():
        return Finding(what, "missing", f"there is no folder '{folder}'", source)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        detail = f"{len(missing):,} of {len(names):,} are not in '{folder}', such as {missing[0]}"
        return Finding(what, "missing", detail, source)
    return Finding(what, "ok", f"{len(names):,} in '{folder}'")
