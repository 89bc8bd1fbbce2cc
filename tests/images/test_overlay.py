"""Overlays and contact sheets."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fssdeploy.errors import InputError, MachineError
from fssdeploy.images.colours import class_colour
from fssdeploy.images.overlay import contact_sheet, overlay, save_picture

GREY = np.full((200, 300, 3), 120, np.uint8)


def square(top: int, left: int, side: int, size: tuple[int, int] = (200, 300)) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_tint_contour_and_untouched_ground():
    drawn = overlay(GREY, {"cup": square(60, 100, 80)})
    assert drawn.shape == GREY.shape and drawn.dtype == np.uint8
    assert (GREY == 120).all()
    colour = np.array(class_colour(1))
    tint = drawn[100, 140].astype(int)
    assert (np.sign(tint - 120) == np.sign(colour - 120)).all() and abs(tint - colour).max() > 40
    edge = drawn[100, 96:105].astype(int)
    assert abs(edge - colour).sum(1).min() < 20  # the line has the full colour
    assert (drawn[100, 115] == tint).all()  # and is narrow
    assert (drawn[100, 85] == 120).all() and (drawn[190, 150] == 120).all()


def test_classes_have_their_own_colours():
    drawn = overlay(GREY, {"a": square(80, 60, 60), "b": square(80, 180, 60)})
    first, second = drawn[110, 90].astype(int), drawn[110, 210].astype(int)
    assert abs(first - second).max() > 50


@pytest.mark.parametrize("corner", [0, 1, 2, 3])
def test_the_legend_goes_where_no_object_is(corner):
    mask = np.ones((200, 300), bool)
    mask[slice(0, 90) if corner < 2 else slice(110, 200), slice(0, 140) if corner % 2 == 0 else slice(160, 300)] = False
    drawn = overlay(GREY, {"cup": mask}).astype(int)
    dark = (drawn.sum(2) < 200) & ~mask  # the panel is darker than grey and tint
    dark_elsewhere = (drawn.sum(2) < 150) & mask
    assert dark.sum() > 400
    assert dark_elsewhere.sum() < 100


def test_the_legend_shows_every_colour():
    masks = {f"class {index}": square(90, 130, 30) for index in range(1, 5)}
    drawn = overlay(GREY, masks).reshape(-1, 3)
    for index in range(1, 5):
        assert (drawn == class_colour(index)).all(1).sum() > 20


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (20, 20), (40, 300)])
def test_small_pictures(size):
    picture = np.full((*size, 3), 120, np.uint8)
    assert overlay(picture, {"a name": np.ones(size, bool), "b": np.zeros(size, bool)}).shape == picture.shape


def test_large_pictures_are_made_smaller():
    picture = np.full((500, 1000, 3), 120, np.uint8)
    drawn = overlay(picture, {"a": square(200, 400, 200, (500, 1000))}, max_side=400)
    assert drawn.shape == (200, 400, 3)
    assert abs(drawn[120, 200].astype(int) - 120).max() > 30 and (drawn[150, 20] == 120).all()


def test_thin_objects_stay_visible():
    mask = np.zeros((200, 300), bool)
    mask[100, 50:250] = True
    drawn = overlay(GREY, {"wire": mask}).astype(int)
    assert abs(drawn[100, 60:240] - class_colour(1)).sum(1).max() < 120


def test_names_of_any_length():
    drawn = overlay(
        GREY, {"a very long name " * 20: square(0, 0, 9), "": square(9, 9, 9), "two\nlines": square(50, 50, 9)}
    )
    assert drawn.shape == GREY.shape


def test_without_masks():
    np.testing.assert_array_equal(overlay(GREY, {}), GREY)


def test_mask_of_another_size():
    with pytest.raises(InputError, match="300 x 200"):
        overlay(GREY, {"cup": np.zeros((300, 200), bool)})


def test_contact_sheet():
    red, blue = np.full((50, 100, 3), (255, 0, 0), np.uint8), np.full((400, 200, 3), (0, 0, 255), np.uint8)
    sheet = contact_sheet([[red, blue], [red]], [["one", "two"], ["three"]], cell=128)
    assert sheet.dtype == np.uint8 and sheet.shape[1] > 2 * 128
    reds, blues = (sheet == (255, 0, 0)).all(2), (sheet == (0, 0, 255)).all(2)
    assert reds.sum() == 2 * 128 * 64 and blues.sum() == 128 * 64
    # In the first row both stand on one line; the second row is only as high as its picture.
    line = np.flatnonzero(blues.any(1)).max()
    assert reds[line].any() and not reds[line + 1].any()
    assert sheet.shape[0] < 128 + 64 + 128
    assert (sheet[line + 1 : line + 20].sum(2) < 300).any()  # a caption is written


@pytest.mark.parametrize(
    ("rows", "captions"), [([], []), ([[]], [[]]), ([[GREY]], [["a", "b"]]), ([[GREY], [GREY]], [["a"]])]
)
def test_contact_sheet_refuses(rows, captions):
    with pytest.raises(InputError) as caught:
        contact_sheet(rows, captions)
    assert caught.value.code == "sheet_form"


def test_contact_sheet_with_an_empty_row_and_odd_pictures():
    sheet = contact_sheet([[], [GREY[:1], GREY[:, :1], GREY[:1, :1]]], [[], ["x" * 500, "", "1"]], cell=64)
    assert sheet.ndim == 3


@pytest.mark.parametrize(("suffix", "form"), [("png", "PNG"), ("jpg", "JPEG"), ("JPEG", "JPEG")])
def test_save_picture(tmp_path, suffix, form):
    save_picture(tmp_path / f"p.{suffix}", GREY)
    with Image.open(tmp_path / f"p.{suffix}") as image:
        assert image.format == form
        assert abs(np.asarray(image).astype(int) - 120).max() <= 1
    assert len(list(tmp_path.iterdir())) == 1


def test_save_picture_refuses(tmp_path):
    with pytest.raises(InputError):
        save_picture(tmp_path / "p.gif", GREY)
    with pytest.raises(MachineError):
        save_picture(tmp_path / "missing" / "p.png", GREY)
