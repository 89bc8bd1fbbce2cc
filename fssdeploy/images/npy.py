"""Arrays in NumPy's file format, from bytes that a stranger may have sent."""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.lib import format as npy

from fssdeploy.errors import InputError

_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def is_npy(data: bytes) -> bool:
    """Whether these are the first bytes of a ``.npy`` file."""
    return data.startswith(npy.MAGIC_PREFIX)


def array_from_npy(data: bytes, name: str) -> np.ndarray:
    """The array in the bytes of a ``.npy`` file, read-only, without a copy.

    What the header promises must be there, no less and no more, before any memory is taken for it. Raises InputError
    ``array_unreadable`` for that, for anything malformed and for arrays of Python objects.
    """
    stream = io.BytesIO(data)
    try:
        shape, fortran, dtype = _READERS[npy.read_magic(stream)](stream)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        start, count = stream.tell(), math.prod(shape)
        if any(side < 0 for side in shape) or count * dtype.itemsize != len(data) - start:
            raise ValueError(f"it promises {dtype} {shape} and holds {len(data) - start} bytes")
        array = np.frombuffer(data, dtype, count, start) if count else np.empty(0, dtype)
        return array.reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # a damaged header raises nearly anything
        raise InputError(
            "array_unreadable", f"'{name}' is not an array file", str(error), "Write it with numpy.save."
        ) from error
