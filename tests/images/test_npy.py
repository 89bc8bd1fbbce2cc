"""Pictures and masks from bytes that a stranger may have sent: arrays, texts, run lengths, and what pretends to be."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fssdeploy.errors import InputError
from fssdeploy.images.masks import load_mask
from fssdeploy.images.npy import array_from_npy, is_npy
from fssdeploy.images.pictures import check_picture, load_picture, picture_size
from fssdeploy.images.rle import encode_rle

PICTURE = np.random.default_rng(0).integers(0, 256, (12, 17, 3), np.uint8)
OBJECT = np.random.default_rng(1).random((12, 17)) < 0.4


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version)
    return stream.getvalue()


def encoded(array: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, form, **options)
    return stream.getvalue()


def promising(shape: tuple[int, ...], kind: str = "|u1", rest: bytes = b"") -> bytes:
    """A header that names a shape, and what follows it."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
    return stream.getvalue() + rest


def refused(code: str, call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize(
    "array",
    [PICTURE, np.asfortranarray(PICTURE), np.arange(6, dtype=">i4"), np.array(5.0), np.empty((0, 3), np.uint8)],
    ids=["C order", "Fortran order", "big-endian", "no dimension", "empty"],
)
def test_arrays_come_back(array: np.ndarray, version: tuple[int, int]) -> None:
    data = npy(array, version)
    assert is_npy(data)
    found = array_from_npy(data, "a")
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found, array)


def test_what_is_no_array_file() -> None:
    whole = npy(PICTURE)
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], object), allow_pickle=True)
    for data in (
        b"",
        whole[:7],
        whole[:40],
        whole[:-1],
        whole + b"x",
        pickled.getvalue(),
        whole[:6] + b"\x03\x00" + whole[8:],
        whole.replace(b"'shape'", b"'shapf'"),
        whole.replace(b"|u1", b"|x1"),
        promising((-1, 3)),
        promising((-2, -3), rest=bytes(6)),
    ):
        refused("array_unreadable", lambda data=data: array_from_npy(data, "a"))
    for position in range(0, len(whole) - PICTURE.size, 3):  # every one of them an array or our error
        changed = bytearray(whole)
        changed[position] ^= 0x15
        try:
            array_from_npy(bytes(changed), "a")
        except InputError as error:
            assert error.code == "array_unreadable"


def test_a_header_that_promises_much_costs_nothing() -> None:
    tracemalloc.start()
    for shape in ((2**40, 2**20, 3), (2**62, 2**62), (50_000, 50_000, 3)):
        for read in (load_picture, lambda data: load_mask(data, (12, 17))):
            refused("array_unreadable", lambda shape=shape, read=read: read(promising(shape)))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_pictures() -> None:
    np.testing.assert_array_equal(load_picture(npy(PICTURE)), PICTURE)
    for array in (PICTURE[..., 0], PICTURE.astype(np.float32), PICTURE[None], PICTURE[:0], PICTURE[..., :2]):
        refused("not_a_picture", lambda array=array: load_picture(npy(array)))
        refused("not_a_picture", lambda array=array: check_picture(array))
    assert check_picture(PICTURE) is PICTURE


@pytest.mark.parametrize("make", [npy, encoded], ids=["array", "PNG"])
def test_the_limit_of_pixels(make: Callable[[np.ndarray], bytes]) -> None:
    load_picture(make(PICTURE), max_pixels=204)
    assert "0.000203 million" in refused("picture_too_large", lambda: load_picture(make(PICTURE), max_pixels=203))
    refused("picture_too_large", lambda: check_picture(PICTURE, max_pixels=203))
    refused("picture_too_large", lambda: load_mask(encoded(OBJECT), (12, 17), max_pixels=203))


def test_the_size_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (npy(PICTURE), encoded(PICTURE), encoded(PICTURE, "JPEG"), encoded(PICTURE, exif=exif)):
        assert picture_size(data) == load_picture(data).shape[:2]
    refused("picture_unreadable", lambda: picture_size(b"no picture"))
    refused("picture_unreadable", lambda: picture_size(b""))


def test_masks() -> None:
    rle = json.dumps({"segmentation": encode_rle(OBJECT)}).encode()
    for data in (npy(OBJECT), npy(OBJECT.astype(np.float64)), encoded(OBJECT), rle, b"\n " + rle):
        np.testing.assert_array_equal(load_mask(data, (12, 17)).object, OBJECT)
    box = load_mask(b"box:2,3,5,9", (12, 17)).object
    np.testing.assert_array_equal(box, load_mask("box:2,3,5,9", (12, 17)).object)
    assert box.sum() == 18
    np.testing.assert_array_equal(load_mask(b"polygon:2,3,5,3,5,9,2,9", (12, 17)).object, box)


def test_bytes_are_never_a_path(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in (("m.png", encoded(OBJECT)), ("m.npy", npy(OBJECT)), ("m.json", b"{}")):
        (tmp_path / name).write_bytes(data)
        refused("picture_unreadable", lambda name=name: load_mask(name.encode(), (12, 17)))


def test_masks_that_are_none() -> None:
    assert "'mask 3'" in refused("mask_size", lambda: load_mask(npy(OBJECT[:5]), (12, 17), name="mask 3"))
    refused("mask_unreadable", lambda: load_mask(b"{nonsense", (12, 17)))
    refused("mask_unreadable", lambda: load_mask(b"{" * 5000, (12, 17)))
    refused("mask_text", lambda: load_mask(b"box:1,2", (12, 17)))
    refused("mask_text", lambda: load_mask("box:١,2,3,4x".encode(), (12, 17)))
    refused("mask_text", lambda: load_mask(b"polygon:" + b"1,2," * 100_000 + b"1,2", (12, 17)))
