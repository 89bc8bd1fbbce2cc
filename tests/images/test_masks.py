"""Masks in and out: every accepted form, and every refusal instead of a guess."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from fssdeploy.errors import InputError, MachineError
from fssdeploy.images.colours import class_colour
from fssdeploy.images.masks import Mask, load_mask, mask_from_array, save_labels, save_mask
from fssdeploy.images.rle import decode_rle, encode_rle

SIZE = (12, 17)
OBJECT = np.random.default_rng(0).random(SIZE) < 0.4
SQUARE = np.zeros(SIZE, bool)
SQUARE[3:7, 5:9] = True


def refused(code: str, function, *args, **more) -> str:
    with pytest.raises(InputError) as caught:
        function(*args, **more)
    assert caught.value.code == code, caught.value
    return str(caught.value)


def is_object(mask: Mask, expected: np.ndarray = OBJECT, ignore: np.ndarray | None = None) -> None:
    assert mask.object.dtype == bool and mask.ignore.dtype == bool
    np.testing.assert_array_equal(mask.object, expected)
    np.testing.assert_array_equal(mask.ignore, np.zeros(expected.shape, bool) if ignore is None else ignore)


def test_mask_area_and_size():
    mask = Mask(np.ones((3, 5), bool), np.eye(3, 5, dtype=bool))
    assert (mask.area, mask.size) == (12, (3, 5))
    assert not (mask.object & mask.ignore).any()


# --- arrays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [bool, np.uint8, np.int8, np.uint16, np.int32, np.int64, np.uint64, np.float16, np.float64]
)
def test_zero_and_one(dtype):
    is_object(mask_from_array(OBJECT.astype(dtype)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_zero_and_255(dtype):
    is_object(mask_from_array(OBJECT.astype(dtype) * dtype(255)))


def test_255_of_an_indexed_array_is_ignored():
    mask = mask_from_array(OBJECT * np.uint8(255), indexed=True)
    is_object(mask, np.zeros(SIZE, bool), OBJECT)


def test_object_and_ignored_pixels():
    ignore = ~OBJECT & SQUARE
    values = OBJECT + ignore * np.uint8(255)
    is_object(mask_from_array(values), OBJECT, ignore)
    is_object(mask_from_array(OBJECT + ignore * np.uint8(9), ignore_label=9), OBJECT, ignore)


def test_all_full():
    for values in (np.ones(SIZE, np.uint8), np.full(SIZE, 255, np.uint8), np.ones(SIZE, bool)):
        is_object(mask_from_array(values), np.ones(SIZE, bool))


def test_label():
    values = OBJECT * np.uint16(700)
    values[0, 0] = 255
    values[0, 1] = 3
    ignore = values == 255
    is_object(mask_from_array(values, label=700), values == 700, ignore)
    is_object(mask_from_array(values, label=255), values == 255)
    is_object(mask_from_array(values, label=0), values == 0, ignore)


def test_label_absent_lists_the_labels():
    text = refused("mask_label", mask_from_array, np.array([[0, 3, 255]]), "m.png", 7)
    assert "m.png" in text and "0, 3, 255" in text


@pytest.mark.parametrize("values", [[0, 1, 2], [0, 5], [0, 1, 3, 255], [-1, 0], [0, 65535], [0, 128, 255]])
def test_several_labels_are_listed(values):
    text = refused("mask_labels", mask_from_array, np.array([values]))
    assert ", ".join(map(str, sorted(values))) in text and "label" in text


def test_many_labels_are_listed_briefly():
    assert "(200 in all)" in refused("mask_labels", mask_from_array, np.arange(200)[None], indexed=True)


def test_grey_levels_are_not_thresholded():
    soft = np.linspace(0, 255, 64).astype(np.uint8)[None]
    assert "antialiased" in refused("mask_grey", mask_from_array, soft)


@pytest.mark.parametrize(
    "values", [[0, 0.5], [0, 1, np.nan], [0, 1, 255], [0, 2], [np.inf, 0], [-1, 0], [1j, 0], ["a", "b"]]
)
def test_fractions_and_the_like(values):
    dtype = np.float32 if isinstance(values[0], int | float) else None
    assert "Threshold" in refused("mask_values", mask_from_array, np.array([values], dtype))


def test_channels():
    values = OBJECT.astype(np.uint8)
    is_object(mask_from_array(values[..., None]))
    is_object(mask_from_array(np.repeat(values[..., None], 3, 2)))
    differing = np.repeat(values[..., None], 3, 2)
    differing[0, 0, 2] ^= 1
    refused("mask_shape", mask_from_array, differing)


@pytest.mark.parametrize("shape", [(4,), (3, 4, 2), (3, 4, 4), (1, 3, 4, 1), (0, 4), ()])
def test_other_shapes(shape):
    refused("mask_shape", mask_from_array, np.zeros(shape, np.uint8))


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "pgm"])
def test_grey_files(tmp_path, suffix):
    path = tmp_path / f"m.{suffix}"
    Image.fromarray(OBJECT * np.uint8(255)).save(path)
    is_object(load_mask(path, SIZE))
    is_object(load_mask(str(path), SIZE))
    is_object(load_mask(path.read_bytes(), SIZE))


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "pbm"])
def test_one_bit_files(tmp_path, suffix):
    Image.fromarray(OBJECT).save(tmp_path / f"m.{suffix}")
    is_object(load_mask(tmp_path / f"m.{suffix}", SIZE))


def save_indexed(path, values: np.ndarray) -> None:
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette([200, 10, 10] * 256)  # colours that say nothing
    image.save(path)


def test_the_index_numbers_of_indexed_files_count(tmp_path):
    ignore = ~OBJECT & SQUARE
    save_indexed(tmp_path / "m.png", OBJECT + 255 * ignore)
    is_object(load_mask(tmp_path / "m.png", SIZE), OBJECT, ignore)
    save_indexed(tmp_path / "m.png", np.where(OBJECT, 15, 3 * SQUARE))
    is_object(load_mask(tmp_path / "m.png", SIZE, label=15))
    assert "3, 15" in refused("mask_labels", load_mask, tmp_path / "m.png", SIZE)


def test_indexed_255_is_ignored_and_the_error_says_so(tmp_path):
    save_indexed(tmp_path / "m.png", OBJECT * 255)
    assert "ignore" in refused("mask_empty", load_mask, tmp_path / "m.png", SIZE)
    is_object(load_mask(tmp_path / "m.png", SIZE, label=255))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_labels(tmp_path, suffix):
    Image.fromarray(OBJECT * np.uint16(40_000)).save(tmp_path / f"m.{suffix}")
    is_object(load_mask(tmp_path / f"m.{suffix}", SIZE, label=40_000))
    assert "40000" in refused("mask_labels", load_mask, tmp_path / f"m.{suffix}", SIZE)


def test_colour_files(tmp_path):
    rgb = np.repeat(OBJECT[..., None] * np.uint8(255), 3, 2)
    Image.fromarray(rgb).save(tmp_path / "m.png")
    is_object(load_mask(tmp_path / "m.png", SIZE))
    Image.fromarray(rgb).convert("RGBA").save(tmp_path / "m.png")
    is_object(load_mask(tmp_path / "m.png", SIZE))
    rgb[0, 0] = (255, 0, 0)
    Image.fromarray(rgb).save(tmp_path / "m.png")
    refused("mask_shape", load_mask, tmp_path / "m.png", SIZE)


def test_transparent_files_are_refused(tmp_path):
    image = Image.fromarray(np.full((*SIZE, 4), 255, np.uint8))
    image.putalpha(Image.fromarray(OBJECT * np.uint8(255)))
    image.save(tmp_path / "m.png")
    refused("mask_transparent", load_mask, tmp_path / "m.png", SIZE)


@pytest.mark.parametrize("kind", ["grey", "one bit", "indexed", "16 bit"])
def test_orientation_is_applied(tmp_path, kind):
    stored = np.ascontiguousarray(OBJECT.T[::-1])  # what orientation 6 turns upright
    image = Image.fromarray({"grey": stored * np.uint8(255), "one bit": stored}.get(kind, stored.astype(np.uint16)))
    if kind == "indexed":
        image = Image.fromarray(stored.astype(np.uint8))
        image.putpalette([0, 0, 0, 9, 9, 9])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "m.png", exif=exif.tobytes())
    is_object(load_mask(tmp_path / "m.png", SIZE))


@pytest.mark.parametrize("values", [OBJECT, OBJECT.astype(np.float32), OBJECT * np.uint8(255), OBJECT[..., None]])
def test_npy(tmp_path, values):
    np.save(tmp_path / "m.npy", values)
    is_object(load_mask(tmp_path / "m.npy", SIZE))


def test_npy_refused(tmp_path):
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], object), allow_pickle=True)
    refused("mask_unreadable", load_mask, tmp_path / "pickled.npy", SIZE)
    np.savez(tmp_path / "many.npz", OBJECT)
    (tmp_path / "many.npz").rename(tmp_path / "many.npy")
    refused("mask_unreadable", load_mask, tmp_path / "many.npy", SIZE)
    np.save(tmp_path / "cut.npy", OBJECT)
    whole = (tmp_path / "cut.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-5])
    refused("mask_unreadable", load_mask, tmp_path / "cut.npy", SIZE)
    (tmp_path / "huge.npy").write_bytes(whole.replace(b"(12, 17), }", b"(99999999999, 99999999), }"))
    refused("mask_unreadable", load_mask, tmp_path / "huge.npy", SIZE)
    (tmp_path / "text.npy").write_text("hello")
    refused("mask_unreadable", load_mask, tmp_path / "text.npy", SIZE)
    refused("file_missing", load_mask, tmp_path / "missing.npy", SIZE)


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_coco_json(tmp_path, wrap, compressed):
    columns = OBJECT.T.ravel()
    edges = np.flatnonzero(np.diff(columns.astype(int))) + 1
    counts = np.diff([0, *edges, columns.size]).tolist()
    rle = encode_rle(OBJECT) if compressed else {"size": list(SIZE), "counts": [0, *counts] if columns[0] else counts}
    (tmp_path / "m.json").write_text(json.dumps({"id": 4, "segmentation": rle} if wrap else rle))
    is_object(load_mask(tmp_path / "m.json", SIZE))


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "7", "[" * 100_000, '{"segmentation": [[1, 2, 3, 4, 5, 6]]}', "\x00\xff"]
)
def test_other_json(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    refused("mask_unreadable" if text else "file_empty", load_mask, tmp_path / "m.json", SIZE)


def test_size_must_be_that_of_the_picture(tmp_path):
    save_mask(tmp_path / "m.png", OBJECT)
    text = refused("mask_size", load_mask, tmp_path / "m.png", (17, 12))
    assert "12 x 17" in text and "17 x 12" in text


def test_empty_and_full(tmp_path):
    save_mask(tmp_path / "m.png", np.zeros(SIZE, bool))
    refused("mask_empty", load_mask, tmp_path / "m.png", SIZE)
    save_mask(tmp_path / "m.png", np.ones(SIZE, bool))
    assert load_mask(tmp_path / "m.png", SIZE).area == 12 * 17


def test_unreadable_files(tmp_path):
    refused("file_missing", load_mask, tmp_path / "m.png", SIZE)
    (tmp_path / "m.png").write_text("no picture")
    refused("picture_unreadable", load_mask, tmp_path / "m.png", SIZE)


# --- text -----------------------------------------------------------------------------------------------------------


def test_box():
    is_object(load_mask("box:5,3,9,7", SIZE), SQUARE)
    is_object(load_mask("box:4.6, 3.4, 9.4, 6.6", SIZE), SQUARE)  # the same pixel centres
    assert load_mask("box:-50,-50,1,1", SIZE).area == 1
    assert load_mask("box:0,0,1000,1000", SIZE).area == 12 * 17


def inside(corners: list[float], size: tuple[int, int]) -> np.ndarray:
    """Even-odd rule, pixel by pixel: how many edges lie left of the centre."""
    points = list(zip(corners[::2], corners[1::2], strict=True))
    result = np.zeros(size, bool)
    for row, col in np.ndindex(size):
        x, y = col + 0.5, row + 0.5
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            if (y0 <= y) != (y1 <= y):
                result[row, col] ^= x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x
    return result


@pytest.mark.parametrize("seed", range(8))
def test_polygon(seed):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-6, 22, 2 * rng.integers(3, 9)).round(2).tolist()
    text = "polygon:" + ",".join(map(str, corners))
    is_object(load_mask(text, SIZE), inside(corners, SIZE))


def test_polygon_of_a_box():
    is_object(load_mask("polygon:5,3,9,3,9,7,5,7", SIZE), SQUARE)
    is_object(load_mask("polygon:5,7,9,7,9,3,5,3", SIZE), SQUARE)


@pytest.mark.parametrize(
    "text",
    [
        "box:",
        "box:1,2,3",
        "box:1,2,3,4,5",
        "box:5,3,5,7",
        "box:9,3,5,7",
        "box:a,b,c,d",
        "box:0,0,nan,5",
        "box:0,0,inf,5",
        "box:0,0,1e300,5",
        "polygon:1,2,3,4",
        "polygon:1,2,3,4,5",
        "polygon:1,2,3,4,5,6,7",
        "polygon:" + ",".join(["7"] * 5001),
    ],
)
def test_text_that_cannot_be_read(text):
    assert len(refused("mask_text", load_mask, text, SIZE)) < 500


def test_text_outside_or_empty():
    refused("mask_outside", load_mask, "box:17,0,20,5", SIZE)
    refused("mask_outside", load_mask, "box:0,-5,5,0", SIZE)
    refused("mask_outside", load_mask, "polygon:-1,-1,-9,-1,-9,-9", SIZE)
    refused("mask_empty", load_mask, "box:3.6,3.6,4.4,4.4", SIZE)
    refused("mask_empty", load_mask, "polygon:1,1,5,5,9,9", SIZE)
    refused("mask_label", load_mask, "box:5,3,9,7", SIZE, label=4)


# --- out ------------------------------------------------------------------------------------------------------------


def test_save_mask(tmp_path):
    save_mask(tmp_path / "m.png", OBJECT)
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), OBJECT * 255)
    is_object(load_mask(tmp_path / "m.png", SIZE))


def test_save_labels(tmp_path):
    labels = (np.arange(12 * 17) % 7).astype(np.uint8).reshape(SIZE)
    save_labels(tmp_path / "m.png", labels)
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), labels)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB"))[labels == 3][0], class_colour(3))
    is_object(load_mask(tmp_path / "m.png", SIZE, label=4), labels == 4)


def test_class_colours_are_distinct():
    assert class_colour(0) == (0, 0, 0)
    assert len({class_colour(index) for index in range(256)}) == 256
    assert {part for index in range(256) for part in class_colour(index)} <= set(range(256))
    first = np.array([class_colour(index) for index in range(11)], float)
    apart = np.linalg.norm(first[:, None] - first[None], axis=2) + 1000 * np.eye(11)
    assert apart.min() > 50


@pytest.mark.parametrize("save", [save_mask, save_labels])
def test_saving_refused(tmp_path, save):
    refused("mask_suffix", save, tmp_path / "m.jpg", OBJECT)
    with pytest.raises(MachineError) as caught:
        save(tmp_path / "missing" / "m.png", OBJECT)
    assert caught.value.code == "folder_missing"
    assert list(tmp_path.iterdir()) == []


# --- run lengths ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pycocotools.decode
@pytest.mark.parametrize("seed", range(6))
def test_rle_there_and_back(seed):
    rng = np.random.default_rng(seed)
    small = rng.random(rng.integers(1, 9, 2)) < rng.random()
    mask = np.repeat(np.repeat(small, 60, 0), 45, 1) if seed % 2 else small
    rle = json.loads(json.dumps(encode_rle(mask)))
    np.testing.assert_array_equal(decode_rle(rle), mask)
    np.testing.assert_array_equal(coco.decode(rle).astype(bool), mask)
    np.testing.assert_array_equal(decode_rle({**rle, "counts": rle["counts"].encode()}), mask)


@pytest.mark.parametrize("value", [False, True])
def test_rle_of_one_value(value):
    mask = np.full((300, 400), value)
    np.testing.assert_array_equal(decode_rle(encode_rle(mask)), mask)


@pytest.mark.parametrize("mask", [np.zeros((2, 2), np.uint8), np.zeros((2, 2, 2), bool), np.zeros((0, 2), bool)])
def test_encode_refuses(mask):
    refused("mask_shape", encode_rle, mask)


GOOD = encode_rle(OBJECT)


@pytest.mark.parametrize(
    "rle",
    [
        {},
        {"size": [12, 17]},
        {"counts": GOOD["counts"]},
        {**GOOD, "size": [12, 16]},
        {**GOOD, "size": [12, -17]},
        {**GOOD, "size": [12.0, 17.0]},
        {**GOOD, "size": [True, True]},
        {**GOOD, "size": "12"},
        {**GOOD, "size": [12, 17, 1]},
        {**GOOD, "size": [10**9, 10**9]},
        {**GOOD, "counts": ""},
        {**GOOD, "counts": 7},
        {**GOOD, "counts": GOOD["counts"][:-1]},
        {**GOOD, "counts": GOOD["counts"] + "P"},  # a number that goes on after the end
        {**GOOD, "counts": "o" * 500},
        {**GOOD, "counts": "ooooooooooooooooooooooooooo0"},
        {**GOOD, "counts": "é" + GOOD["counts"]},
        {**GOOD, "counts": "\ud800"},
        {**GOOD, "counts": "\x00" + GOOD["counts"]},
        {**GOOD, "counts": "O" + GOOD["counts"]},  # begins with a negative run
        {"size": [4, 5], "counts": "i0K"},  # 25 and -5, which add up
        {**GOOD, "counts": []},
        {**GOOD, "counts": [204, -1, 1]},
        {**GOOD, "counts": [203]},
        {**GOOD, "counts": [204.0]},
        {**GOOD, "counts": [True] * 204},
        {**GOOD, "counts": [10**30]},
        {**GOOD, "counts": ["204"]},
        {**GOOD, "counts": [2**64 - 1, 205]},
    ],
)
def test_malformed_rle(rle):
    refused("rle_malformed", decode_rle, rle)


def test_random_text_is_refused_or_fills_the_picture():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        text = "".join(map(chr, rng.integers(40, 120, rng.integers(1, 12))))
        try:
            assert decode_rle({"size": [4, 5], "counts": text}).shape == (4, 5)
        except InputError as error:
            assert error.code == "rle_malformed"
