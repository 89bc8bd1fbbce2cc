"""One class state as the bytes of a safetensors file, and back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from fssdeploy.errors import InputError
from fssdeploy.protocol import ClassState

# One metadata key that holds JSON: safetensors writes several keys in random order, and then the same state would get
# another sha256 each time.
_KEY = "class_state"


def encode_state(state: ClassState) -> bytes:
    """The safetensors file of a state; equal states give equal bytes.

    Raises InputError: ``state_empty`` (no tensors, or no shots), ``state_dtype`` (a tensor that safetensors cannot
    hold), ``meta_not_json``.
    """
    if state.shots < 1 or not state.tensors:
        raise InputError(
            "state_empty",
            "an empty class state cannot be stored",
            f"it has {len(state.tensors)} tensors from {state.shots} shots",
            "Enrol the class from at least one picture with its mask.",
        )
    header = json_text({"shots": int(state.shots), "fingerprint": state.fingerprint, "meta": state.meta})
    # safetensors writes the memory as it lies, so a transposed or sliced array must be laid out first.
    tensors = {name: np.asarray(array, order="C") for name, array in state.tensors.items()}
    try:
        return safetensors.numpy.save(tensors, {_KEY: header})
    except SafetensorError as error:
        raise InputError("state_dtype", "the class state cannot be stored", str(error)) from error


def decode_state(data: bytes) -> ClassState:
    """The state in the bytes of a safetensors file. Raises ValueError when they are not what `encode_state` makes."""
    try:
        tensors = safetensors.numpy.load(data)
        # safetensors gives metadata only for files it opens itself: 8 bytes with the length, then a JSON header.
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KEY])
        return ClassState(tensors, header["shots"], header["fingerprint"], header["meta"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"not a class state ({error})") from error


def json_text(value: dict[str, Any]) -> str:
    """`value` as JSON with sorted keys. Raises InputError ``meta_not_json`` when JSON cannot hold it."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            "meta_not_json",
            "the notes on the class state cannot be stored",
            str(error),
            "Use only text, finite numbers, true, false, null, lists and dictionaries with text keys.",
        ) from error
