"""Reading checkpoint files safely and loading them strictly."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from fssdeploy.errors import InputError
from fssdeploy.files import open_file, write_atomic

# Published files put the tensors under one of these, or at the top.
_ENVELOPES = ("state_dict", "model")
_METADATA = "fssdeploy"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and where they came from. `metadata` is what a safetensors file carries beside them."""

    file: Path
    sha256: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a safetensors file or a PyTorch file (``weights_only``: no code in it is ever run).

    Tensors stay on disk until they are used: of SAM ViT-H's 2.4 GB only the decoder is.

    InputError if the file is missing, empty, truncated, holds code, or holds no tensors.
    """
    file = Path(path)
    with open_file(file) as stream:
        start = stream.read(9)
        stream.seek(0)
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if _is_safetensors(start):
        try:
            with safetensors.safe_open(file, "pt") as content:
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - not a dict
                return Checkpoint(file, sha256, tensors, _unpacked(content.metadata() or {}))
        except safetensors.SafetensorError as error:
            raise _damaged(file, str(error)) from error
    return Checkpoint(file, sha256, _read_torch(file, start), {})


def load_strict(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], what: str, file: Path) -> None:
    """Load into `module`, every name and shape equal; InputError says what differs. Values become float32."""
    wanted = {name: parameter.shape for name, parameter in module.state_dict().items()}
    missing = sorted(set(wanted) - set(tensors))
    surplus = sorted(set(tensors) - set(wanted))
    misfits = [
        f"{name} is {tuple(tensors[name].shape)} instead of {tuple(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", surplus), ("of another shape", misfits))
        if names
    ]
    if problems:
        raise InputError(
            "checkpoint_architecture",
            f"'{file}' does not fit {what}",
            "; ".join(problems),
            "Choose the preset, image size and options that these weights were made for.",
        )
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)


def write_checkpoint(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write safetensors atomically; equal content gives equal bytes. MachineError if it cannot be written.

    The metadata are one entry: safetensors writes several in random order.
    """
    packed = {_METADATA: json.dumps(dict(metadata), sort_keys=True)} if metadata else None
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomic(path, safetensors.torch.save(contiguous, packed))


def _unpacked(metadata: Mapping[str, str]) -> dict[str, str]:
    """What `write_checkpoint` was given; of files from elsewhere their own entries."""
    try:
        own = json.loads(metadata.get(_METADATA, "{}"))
    except ValueError:
        own = {}
    return {**metadata, **own} if isinstance(own, dict) else dict(metadata)


def _is_safetensors(start: bytes) -> bool:
    """Whether a file begins with the length of a header and the header's brace."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000


def _read_torch(file: Path, start: bytes) -> dict[str, torch.Tensor]:
    is_zip = start[:2] == b"PK"
    if not is_zip and start[:1] != b"\x80":
        raise InputError(
            "checkpoint_format",
            f"'{file}' is not a checkpoint",
            "it is neither a safetensors nor a PyTorch file",
            "Check the file.",
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        # torch refuses whatever could run code, and reports a pickle cut short by the same class.
        if "Unsupported" in str(error) or "GLOBAL" in str(error) or "global" in str(error):
            raise InputError(
                "checkpoint_unsafe",
                f"'{file}' holds more than tensors",
                "loading it could run code that came with it",
                "Get it from its publisher as safetensors, or convert it where you trust it.",
            ) from error
        raise _damaged(file, "it ends too early or is corrupt") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise _damaged(file, "it ends too early or is corrupt") from error
    for envelope in _ENVELOPES:
        if isinstance(content, dict) and isinstance(content.get(envelope), dict):
            content = content[envelope]
    if not isinstance(content, dict):
        content = {}
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise InputError("checkpoint_format", f"'{file}' holds no tensors by name", "", "Check the file.")
    return tensors


def _damaged(file: Path, why: str) -> InputError:
    return InputError("checkpoint_damaged", f"'{file}' cannot be read", why, "Download or copy it again.")
