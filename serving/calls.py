"""What goes to the server's models and what comes back, whatever carries it."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fssdeploy.deployment import Enrolled, Found, MaskSource, PictureSource
from fssdeploy.errors import FssError, InputError
from fssdeploy.files import open_file
from fssdeploy.images.pictures import check_picture, picture_size
from fssdeploy.serving.names import Names

# A result's output by name.
Outputs = Callable[[str], np.ndarray]

TYPES = {"uint8": "UINT8", "bool": "BOOL", "object": "BYTES"}


@dataclass(frozen=True)
class Call:
    """One request: a model and its inputs by name; text is an array of objects, each `bytes`.

    `repeatable`: doing it twice is as good as once. `large` gives the bytes of outputs that are worth shared memory.
    """

    model: str
    inputs: dict[str, np.ndarray]
    outputs: tuple[str, ...]
    repeatable: bool
    large: Mapping[str, int] = field(default_factory=dict)


def enroll_call(
    names: Names, name: str, pictures: Sequence[PictureSource], masks: Sequence[MaskSource], add: bool
) -> Call:
    """The request that stores a class. Raises InputError for what can be seen here already."""
    if len(pictures) != len(masks):
        raise InputError(
            "masks_count",
            f"{len(pictures)} pictures came with {len(masks)} masks",
            "",
            "Give one mask for each picture.",
        )
    for number, picture in enumerate(pictures, 1):
        if isinstance(picture, np.ndarray):
            check_picture(picture, f"picture {number}")
    inputs = {"name": _texts([name]), "add": np.array([add])}
    inputs |= _stacked("pixels", pictures, 3) or {"pictures": _files(pictures)}
    inputs |= _stacked("mask_pixels", masks, 2) or {"masks": _files(masks)}
    return Call(names.enroll, inputs, ("version", "shots"), repeatable=False)


def enrolled_of(name: str, output: Outputs) -> Enrolled:
    """The answer to an `enroll_call`."""
    return Enrolled(unicodedata.normalize("NFC", name), int(output("version")[0]), int(output("shots")[0]))


def segment_call(names: Names, picture: PictureSource, classes: Sequence[str] | None) -> Call:
    """The request that looks for classes in a picture. Raises InputError for what can be seen here already."""
    if isinstance(picture, np.ndarray):
        inputs = {"pixels": np.ascontiguousarray(check_picture(picture))}
        pixels = picture.shape[0] * picture.shape[1]
    else:
        inputs = {"picture": _files([picture])}
        pixels = _pixels(inputs["picture"][0])
    large = {}
    if classes is not None:
        if not classes:
            raise InputError("no_classes", "there is no class to look for", "no name was given", "Name at least one.")
        inputs["names"] = _texts(classes)
        large = {"masks": len(classes) * pixels} if pixels else {}
    return Call(names.segment, inputs, ("names_found", "masks", "scores", "versions"), repeatable=True, large=large)


def found_of(output: Outputs) -> dict[str, Found]:
    """The answer to a `segment_call`."""
    rows = zip(output("names_found"), output("masks"), output("scores"), output("versions"), strict=True)
    return {
        bytes(name).decode(): Found(mask.astype(bool), float(score), int(version))
        for name, mask, score, version in rows
    }


def once_call(
    names: Names,
    pictures: Sequence[PictureSource],
    support_pictures: Sequence[PictureSource],
    support_masks: Sequence[MaskSource],
) -> Call:
    """The request that finds in pictures what is marked in others, without a bank."""
    inputs = {
        "pictures": _files(pictures),
        "support_pictures": _files(support_pictures),
        "support_masks": _files(support_masks),
    }
    return Call(names.stateless, inputs, ("masks", "scores"), repeatable=True)


def masks_of(output: Outputs) -> tuple[np.ndarray, np.ndarray]:
    """The answer to an `once_call`: masks bool (n, H, W) and scores float32 (n,)."""
    return output("masks").astype(bool), np.array(output("scores"))


def systems_of(index: Sequence[Mapping[str, Any]]) -> list[str]:
    """The systems whose enrolled path is among the models of a repository's index."""
    models = {entry["name"] for entry in index}
    ends = [model.removesuffix("_segment") for model in models if model.endswith("_segment")]
    return sorted(name for name in ends if f"{name}_enroll" in models and not name.endswith("_stage"))


def _texts(texts: Sequence[str]) -> np.ndarray:
    try:
        return _objects([text.encode() for text in texts])
    except UnicodeEncodeError as error:
        raise InputError("class_name", "a class name is not valid Unicode", str(error), "Choose another.") from error


def _objects(values: Sequence[bytes]) -> np.ndarray:
    # Filled one by one: NumPy would make text of its own of them, which loses zeros at the end.
    array = np.empty(len(values), object)
    for index, value in enumerate(values):
        array[index] = value
    return array


def _files(sources: Sequence[PictureSource | MaskSource]) -> np.ndarray:
    return _objects([_file(source) for source in sources])


def _file(source: PictureSource | MaskSource) -> bytes:
    """The bytes that a source becomes; a path is read here, since the server reads no files for others."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, np.ndarray):
        stream = io.BytesIO()
        np.save(stream, source, allow_pickle=False)
        return stream.getvalue()
    if isinstance(source, str) and source.startswith(("box:", "polygon:")):
        return source.encode()
    with open_file(source) as file:
        return file.read()


def _stacked(name: str, sources: Sequence[PictureSource | MaskSource], sides: int) -> dict[str, np.ndarray] | None:
    """Arrays of one size as one input, which the server reads without decoding; None for anything else."""
    arrays = [source for source in sources if isinstance(source, np.ndarray)]
    alike = {(array.shape, array.dtype.kind in "b" or array.dtype == np.uint8) for array in arrays}
    if not arrays or len(arrays) != len(sources) or len(alike) != 1:
        return None
    ((shape, bytewise),) = alike
    if not bytewise or len(shape) != sides:
        return None
    return {name: np.stack(arrays).astype(np.uint8, copy=False)}


def _pixels(file: bytes) -> int:
    """How many pixels the picture in these bytes has; 0 where the server will refuse it."""
    try:
        height, width = picture_size(file)
        return height * width
    except FssError:
        return 0
