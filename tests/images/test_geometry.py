"""Placement on the canvas and back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fssdeploy.errors import InputError
from fssdeploy.images.geometry import PADDING_COLOUR, Placement, fit_mask, fit_picture, place, unfit


def exact_coverage(mask: np.ndarray, side: int) -> np.ndarray:
    """Area average by refining both grids to their common multiple: slow and exact."""
    height, width = mask.shape
    fine = np.repeat(np.repeat(mask, side, 0), side, 1).astype(np.float64)
    return fine.reshape(side, height, side, width).mean((1, 3))


def test_squash_fills_the_canvas():
    assert place(480, 640, 512, "squash") == Placement(480, 640, 512, 0, 0, 512, 512)


@pytest.mark.parametrize(
    ("height", "width", "rows", "cols"),
    [(480, 640, 384, 512), (640, 480, 512, 384), (100, 100, 512, 512), (1, 5000, 1, 512)],
)
def test_letterbox_keeps_the_aspect(height, width, rows, cols):
    assert place(height, width, 512, "letterbox") == Placement(height, width, 512, 0, 0, rows, cols)


@pytest.mark.parametrize(
    ("height", "width", "canvas", "mode"), [(0, 5, 8, "squash"), (5, 5, 0, "squash"), (5, 5, 8, "crop")]
)
def test_place_refuses(height, width, canvas, mode):
    with pytest.raises(InputError):
        place(height, width, canvas, mode)


def test_placement_survives_json():
    placement = place(33, 77, 64, "letterbox")
    assert Placement.from_dict(json.loads(json.dumps(placement.to_dict()))) == placement


def test_fit_picture_letterbox_pads_with_the_mean():
    picture = np.full((30, 60, 3), (10, 20, 30), np.uint8)
    canvas = fit_picture(picture, place(30, 60, 64, "letterbox"))
    assert canvas.shape == (64, 64, 3) and canvas.dtype == np.uint8
    assert (canvas[:32] == (10, 20, 30)).all()
    assert (canvas[32:] == PADDING_COLOUR).all()


def test_fit_picture_is_antialiased():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    inner = fit_picture(stripes, place(256, 256, 64, "squash"))[:, 2:-2].astype(int)
    assert abs(inner - 127).max() <= 2  # taking every fourth column would give 0 or 255


@pytest.mark.parametrize(("height", "width", "side"), [(7, 5, 4), (5, 7, 12), (8, 8, 4), (9, 9, 9), (1, 6, 4)])
def test_fit_mask_is_the_exact_area_average(height, width, side):
    mask = np.random.default_rng(0).random((height, width)) < 0.4
    covered = fit_mask(mask, place(height, width, side, "squash"))
    assert covered.dtype == np.float32
    np.testing.assert_allclose(covered, exact_coverage(mask, side), atol=1e-6)


def test_fit_mask_keeps_the_area_of_thin_objects():
    mask = np.zeros((480, 640), bool)
    mask[::7] = True
    assert fit_mask(mask, place(480, 640, 512, "squash")).mean() == pytest.approx(mask.mean(), abs=1e-6)


def test_fit_mask_pads_with_background_and_stays_in_range():
    covered = fit_mask(np.ones((333, 1000), bool), place(333, 1000, 77, "letterbox"))
    rows = place(333, 1000, 77, "letterbox").rows
    assert covered.min() >= 0 and covered.max() <= 1
    np.testing.assert_allclose(covered[:rows], 1, atol=1e-6)
    assert (covered[rows:] == 0).all()


@pytest.mark.parametrize("fit", [fit_picture, fit_mask])
def test_fit_refuses_the_placement_of_another_picture(fit):
    array = np.zeros((10, 12, 3), np.uint8) if fit is fit_picture else np.zeros((10, 12), bool)
    with pytest.raises(InputError, match="10 x 12"):
        fit(array, place(12, 10, 16, "squash"))


@pytest.mark.parametrize("size", [(480, 640), (64, 701), (65, 65)])
def test_unfit_equals_torch(size):
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)
    # In double precision: torch's float32 coordinates alone are off by 2e-5.
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(logits).double()[None, None], size=size, mode="bilinear", align_corners=False
    )[0, 0]
    found = unfit(logits, place(*size, 512, "squash"))
    assert found.dtype == np.float32 and found.shape == size
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_unfit_letterbox_equals_the_resized_canvas_cut():
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(2).normal(size=(32, 32)).astype(np.float32)
    canvas = torch.nn.functional.interpolate(
        torch.from_numpy(logits).double()[None, None], size=(500, 500), mode="bilinear", align_corners=False
    )[0, 0].numpy()
    np.testing.assert_allclose(unfit(logits, place(330, 500, 500, "letterbox")), canvas[:330], atol=1e-5)


def test_unfit_letterbox_cuts_between_cells():
    # 100 x 300 on a canvas of 90: 30 rows, a third of the canvas, which is 3.33 of 10 cells.
    placement = place(100, 300, 90, "letterbox")
    ramp = np.repeat((np.arange(10, dtype=np.float32) + 0.5)[:, None], 10, 1)  # the value is the height in cells
    found = unfit(ramp, placement)
    expected = (np.arange(100) + 0.5) / 100 * 10 / 3
    np.testing.assert_allclose(found[20:, 150], expected[20:], atol=1e-3)


@pytest.mark.parametrize("mode", ["squash", "letterbox"])
@pytest.mark.parametrize("size", [(90, 120), (120, 90), (200, 41)])
def test_there_and_back(mode, size):
    mask = np.zeros(size, bool)
    mask[size[0] // 4 : size[0] // 2, size[1] // 3 : size[1] // 2] = True
    placement = place(*size, 256, mode)
    back = unfit(fit_mask(mask, placement) - 0.5, placement) > 0
    assert (back & mask).sum() / (back | mask).sum() > 0.95
