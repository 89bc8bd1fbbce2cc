"""SAM's two shared stages against the network itself, and the glue that calls them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fssdeploy.engines.torch import TorchEngine
from fssdeploy.errors import InputError
from fssdeploy.glue.sam import BOTTOM_RIGHT, FOREGROUND, PADDING, TOP_LEFT, decode, with_padding_point
from fssdeploy.modules.sam import Sam, SamConfig
from fssdeploy.systems.sam_stages import DecoderStage, ImageEncoderStage, decoder_spec, encoder_spec

CONFIG = SamConfig(
    32, 2, 2, image_size=64, patch=8, window=3, global_blocks=(1,), out=32, decoder_heads=2, decoder_mlp=48,
    iou_hidden=24, mask_channels=4,
)  # fmt: skip
POINTS = np.random.default_rng(3).uniform(0, 64, (5, 2, 2)).astype(np.float32)
LABELS = np.array([[1, 0], [1, 1], [0, 1], [2, 3], [1, -1]])


@pytest.fixture(scope="module")
def sam() -> Sam:
    torch.manual_seed(0)
    return Sam(CONFIG).eval()


def engine(sam: Sam, multimask: bool, capacity: int = 6) -> TorchEngine:
    specs = {"sam_encoder": encoder_spec(CONFIG), "decoder": decoder_spec(CONFIG, multimask, capacity)}
    return TorchEngine({"sam_encoder": ImageEncoderStage(sam), "decoder": DecoderStage(sam, multimask)}, specs)


@pytest.fixture(scope="module")
def embedding(sam: Sam) -> np.ndarray:
    picture = np.random.default_rng(0).integers(0, 256, (1, 3, 64, 64), np.uint8)
    found = engine(sam, False).run("sam_encoder", {"picture": picture})["embedding"]
    with torch.no_grad():
        expected = sam.encode(torch.from_numpy(picture)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.parametrize("multimask", [False, True])
def test_absent_points_change_nothing(sam: Sam, embedding: np.ndarray, multimask: bool) -> None:
    points, labels = with_padding_point(POINTS, LABELS)
    logits, iou = decode(engine(sam, multimask), embedding, points, labels, chunk=2)
    with torch.no_grad():
        expected = sam.decode(
            torch.from_numpy(embedding), torch.from_numpy(POINTS)[None], torch.from_numpy(LABELS)[None],
            multimask=multimask,
        )  # fmt: skip
    assert logits.shape == (5, 3 if multimask else 1, 32, 32)
    np.testing.assert_allclose(logits, expected[0][0].numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(iou, expected[1][0].numpy(), rtol=1e-3, atol=1e-5)


def test_a_box_is_two_labelled_points(sam: Sam, embedding: np.ndarray) -> None:
    box = torch.tensor([[[8.0, 10.0, 40.0, 50.0]]])
    with torch.no_grad():
        expected, _ = sam.decode(torch.from_numpy(embedding), boxes=box)
    corners, labels = box.view(1, 2, 2).numpy(), np.array([[TOP_LEFT, BOTTOM_RIGHT]])
    logits, _ = decode(engine(sam, False), embedding, corners, labels)
    np.testing.assert_allclose(logits, expected[0].numpy(), rtol=1e-3, atol=1e-5)


def test_no_prompt_gives_no_mask(sam: Sam, embedding: np.ndarray) -> None:
    logits, iou = decode(engine(sam, True), embedding, np.zeros((0, 2, 2)), np.zeros((0, 2)))
    assert logits.shape == (0, 3, 32, 32)
    assert iou.shape == (0, 3)


def test_padding_is_a_token_that_matters(sam: Sam, embedding: np.ndarray) -> None:
    points, labels = POINTS[:, :1], np.full((5, 1), FOREGROUND)
    padded = with_padding_point(points, labels)
    assert padded[1][:, -1].tolist() == [PADDING] * 5
    without, with_padding = (decode(engine(sam, False), embedding, *prompt)[0] for prompt in ((points, labels), padded))
    assert np.abs(without - with_padding).max() > 1e-3


def test_more_points_than_the_stage_takes_are_refused(sam: Sam, embedding: np.ndarray) -> None:
    with pytest.raises(ValueError, match="2 points"):
        decode(engine(sam, False, capacity=1), embedding, POINTS, LABELS)


def test_a_picture_of_another_size_is_refused(sam: Sam) -> None:
    with pytest.raises(InputError, match="declared"):
        engine(sam, False).run("sam_encoder", {"picture": np.zeros((1, 3, 32, 32), np.uint8)})


def test_the_width_of_mask_prompts_is_a_size_of_the_network() -> None:
    narrow, usual = (Sam(dataclasses.replace(CONFIG, mask_channels=width)) for width in (4, 16))
    name = "prompt_encoder.mask_downscaling.3.weight"
    assert [tuple(sam.state_dict()[name].shape[:2]) for sam in (narrow, usual)] == [(4, 1), (16, 4)]
