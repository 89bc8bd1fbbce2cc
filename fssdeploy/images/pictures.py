"""Pictures in: any common file or its bytes to an upright RGB array."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fssdeploy.errors import InputError, MachineError
from fssdeploy.files import open_file, storage_error
from fssdeploy.images.mark import is_marked
from fssdeploy.images.npy import array_from_npy, is_npy

MAX_PIXELS = 150_000_000

# A closed list: the other formats of Pillow are rare, and some of them start other programs.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000", "AVIF")
_SUFFIXES = frozenset(
    [".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".tif", ".tiff", ".bmp", ".gif", ".webp"]
    + [".pbm", ".pgm", ".ppm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpx", ".avif"]
)

_ORIENTATION = 0x0112  # in EXIF: 1 to 4 keep the sides, 5 to 8 exchange them

# The filters of `warnings` belong to the whole process: two threads may not save and restore them at the same time.
_warnings_lock = threading.Lock()


def load_picture(
    source: str | os.PathLike[str] | bytes, name: str | None = None, *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """One picture as uint8 (H, W, 3), RGB, upright (the EXIF orientation is applied).

    `source` is a path or the bytes of a file; `name` is what errors call it (default: the path). Bytes may also be
    those of a ``.npy`` file with an array uint8 (H, W, 3), which is then returned as it is, read-only.

    - Transparent parts are laid on white, as browsers and viewers show them.
    - 16-bit grey is scaled by its full range (65535 becomes 255). 32-bit integers must lie in 0..255 and floats in
      0..1 (which becomes 0..255); anything else is refused, since its range cannot be known.
    - Of an animation the first frame is taken. Colour profiles are not applied.

    Raises InputError when the file is missing, a folder, empty, not a picture, damaged, truncated, of an unknown range
    or of more than `max_pixels` (known before it is decoded); MachineError when the machine refuses to read it.
    """
    name = name or _name_of(source)
    if isinstance(source, bytes) and is_npy(source):
        return check_picture(array_from_npy(source, name), name, max_pixels=max_pixels)
    return _to_rgb(open_picture(source, name, max_pixels=max_pixels), name)


def picture_size(source: bytes, name: str = "picture") -> tuple[int, int]:
    """(height, width) of the picture in the bytes of a file, without decoding it. Raises InputError."""
    if is_npy(source):
        height, width = check_picture(array_from_npy(source, name), name).shape[:2]
        return height, width
    try:
        with _open_header(io.BytesIO(source)) as image:
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise InputError(
            "picture_unreadable", f"'{name}' is not a picture", str(error), "Convert it to PNG."
        ) from error


def check_picture(array: np.ndarray, name: str = "picture", *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """`array` itself, if it is a picture uint8 (H, W, 3) of 1 to `max_pixels` pixels; else raises InputError."""
    if array.dtype != np.uint8 or array.shape[2:] != (3,) or not array.size:
        raise InputError(
            "not_a_picture",
            f"'{name}' is an array {array.dtype} {array.shape}",
            "a picture is uint8 RGB (height, width, 3)",
            "Convert it.",
        )
    if array.shape[0] * array.shape[1] > max_pixels:
        raise _too_large(name, max_pixels)
    return array


def open_picture(
    source: str | os.PathLike[str] | bytes, name: str | None = None, *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The decoded first frame, upright, in whatever mode the file has. Files and errors as `load_picture`."""
    name = name or _name_of(source)
    if isinstance(source, bytes):
        if not source:
            raise InputError("file_empty", f"'{name}' is empty", "it has zero bytes", "Send the file again.")
        return _decode(io.BytesIO(source), name, max_pixels)
    with open_file(source) as stream:
        return _decode(stream, name, max_pixels)


def find_pictures(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Files as given, and the pictures directly in every folder, sorted by name.

    Of a folder, hidden files and the masks and overlays that fssdeploy wrote are left out. Raises InputError when a
    path is missing or nothing is found; MachineError when a folder cannot be read.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        try:
            if path.is_dir():
                found += sorted(file for file in path.iterdir() if _looks_like_picture(file))
            elif path.exists():
                found.append(path)
            else:
                raise InputError("file_missing", f"'{path}' does not exist", fix="Check the path.")
        except OSError as error:
            raise storage_error(error, path) from error
    if not found:
        raise InputError(
            "no_pictures",
            "no pictures were found",
            "the folders hold no picture files" if paths else "none were named",
            "Name picture files, or folders that hold some.",
        )
    return found


def _looks_like_picture(file: Path) -> bool:
    if file.suffix.lower() not in _SUFFIXES or file.name.startswith(".") or file.is_dir():
        return False
    return not (file.is_file() and is_marked(file))  # a pipe or a dangling link is for `load_picture` to report


def _name_of(source: str | os.PathLike[str] | bytes) -> str:
    return "picture" if isinstance(source, bytes) else os.fspath(source)


def _decode(stream: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    try:
        image = _open_header(stream)
        if image.width * image.height > max_pixels:
            raise _too_large(name, max_pixels)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image
    except (InputError, MachineError):
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(name, max_pixels) from error
    except UnidentifiedImageError as error:
        raise InputError(
            "picture_unreadable",
            f"'{name}' is not a picture",
            f"it is none of {', '.join(_FORMATS)}",
            "Convert it to PNG.",
        ) from error
    except MemoryError as error:
        raise MachineError("no_memory", f"'{name}' cannot be decoded", "there is not enough memory") from error
    except Exception as error:  # decoders raise nearly anything on damaged data
        if isinstance(error, OSError) and error.errno:
            raise storage_error(error, name) from error
        raise InputError(
            "picture_damaged",
            f"'{name}' cannot be decoded",
            f"it is truncated, damaged or of an unsupported kind ({error})",
            "Copy or download it again, or convert it to PNG.",
        ) from error


def _open_header(stream: IO[bytes]) -> Image.Image:
    # Our own limit is checked right after; Pillow's warning below it would only alarm.
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(stream, formats=_FORMATS)


def _too_large(name: str, max_pixels: int) -> InputError:
    return InputError(
        "picture_too_large",
        f"'{name}' is too large",
        f"it has more than {max_pixels / 1e6:g} million pixels",
        "Cut it into tiles or make it smaller.",
    )


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    """uint8 (H, W, 3) of an image in any mode."""
    if image.mode.startswith(("I", "F")):
        return np.repeat(_to_grey(image, name)[..., None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _to_grey(image: Image.Image, name: str) -> np.ndarray:
    """uint8 (H, W) of an image with more than 8 bits of grey."""
    values = np.asarray(image)
    # Pillow reads 16-bit PGM as 32-bit integers, already scaled to 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    top = 255 if image.mode == "I" else 1
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):  # written so that it also refuses NaN
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise InputError(
            "picture_range",
            f"'{name}' has {kind} from {low} to {high}",
            f"only 0 to {top} has an agreed meaning",
            "Convert it to 8 or 16 bits.",
        )
    return (values * (255 / top) + 0.5).astype(np.uint8)
