"""The state of a run: complete, written atomically, read without running code."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from fssdeploy.errors import InputError, IntegrityError
from fssdeploy.files import storage_error, write_atomic

FORMAT = "fssdeploy-training"
FILE = "checkpoint.pt"


def save(folder: Path, settings: dict[str, Any], step: int, state: dict[str, Any]) -> None:
    """Replace the checkpoint of a run. MachineError if it cannot be written: the one before it stays whole."""
    content = {"format": FORMAT, "settings": _plain(settings), "step": step, "rng": torch.get_rng_state(), **state}
    save_file(folder / FILE, content)


def save_file(file: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values atomically. MachineError if they cannot be written."""
    stream = io.BytesIO()
    torch.save(content, stream)
    write_atomic(file, stream.getvalue(), sync=True)


def load(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint of the run in `folder`, None if there is none yet.

    InputError if the run had other settings; IntegrityError if the file is damaged; MachineError if it cannot be read.
    """
    file = folder / FILE
    if not file.exists():
        return None
    try:
        data = file.read_bytes()
    except OSError as error:
        raise storage_error(error, file) from error
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # torch.load compares no checksums, and fills a tensor with anything when its entry is marked as a folder.
            marked = [entry.filename for entry in archive.infolist() if entry.external_attr]
            damaged = [archive.testzip(), *marked]
            if any(damaged):
                raise zipfile.BadZipFile(f"damaged parts: {', '.join(filter(None, damaged))}")
        content: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise ValueError("it is the checkpoint of something else")
        before = content["settings"]
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        KeyError,
        ValueError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise IntegrityError(
            "checkpoint_damaged", f"'{file}' cannot be read", str(error).split("\n")[0], "Delete it to begin again."
        ) from error
    now = _plain(settings)
    differing = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if differing:
        name = differing[0]
        raise InputError(
            "other_settings",
            f"the run in '{folder}' has other settings",
            f"{name} is {before.get(name)} there, {now.get(name)} here",
            "Continue it with its own settings, or choose another --out.",
        )
    return content


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: what is compared and stored holds no tuples or paths."""
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain
