"""The two pre-training recipes: what an example shows, the losses by hand, a short run of each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fssdeploy.data.shapes import ShapesDataset
from fssdeploy.errors import InputError
from fssdeploy.modules.dinov2 import ViTConfig
from fssdeploy.modules.sam import SamConfig
from fssdeploy.training.augment import Crop
from fssdeploy.training.dino import (
    IGNORED,
    NOTHING,
    SHARPNESS,
    DinoRecipe,
    DinoSettings,
    LabelledPictures,
    WordObjective,
    label_counts,
    object_geometry,
    rivals,
)
from fssdeploy.training.pictures import BasePictures
from fssdeploy.training.sam import Objects, SamRecipe, SamSettings, _correction, _judge
from fssdeploy.training.schedule import Phase
from tests.evaluation.squares import COLOURS, Squares
from tests.training.toys import Stopped, check_same_end, log_of, train

ENCODER = ViTConfig(32, 2, 2, table=4)
NETWORK = SamConfig(24, 2, 3, image_size=48, patch=8, window=0, out=32, decoder_heads=4, decoder_mlp=48, iou_hidden=32)
STILL = Crop(window=(1.0, 1.0), gain=0.0, swaps=False)
SQUARES = BasePictures(Squares(), 0)
SHAPES = BasePictures(ShapesDataset(), 0, limit=12)


def dino(steps: int = 8) -> DinoRecipe:
    settings = DinoSettings(
        encoder=ENCODER, phases=(Phase(steps, 4, 28), Phase(2, 4, 42)), precision="fp32", crop=Crop(swaps=False)
    )
    return DinoRecipe(SQUARES, settings, {"dataset": "squares"})


def sam(steps: int = 3) -> SamRecipe:
    settings = SamSettings(network=NETWORK, phases=(Phase(steps, 2, 48),), precision="fp32")
    return SamRecipe(SHAPES, settings, {"dataset": "shapes-5i"})


def test_label_counts_by_hand() -> None:
    labels = np.random.default_rng(0).choice([0, 3, 7, 254, 255], (2, 8, 8))
    found = label_counts(torch.from_numpy(labels), 4)
    assert found.shape == (2, 4, 256)
    for picture in range(2):
        for cell, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
            patch = labels[picture, row : row + 4, column : column + 4]
            assert found[picture, cell].tolist() == (np.bincount(patch.ravel(), minlength=256) / 16).tolist()


def test_labelled_pictures_show_base_classes_on_their_pixels() -> None:
    stream = LabelledPictures(SQUARES, STILL, seed=0)
    for position in range(6):
        example = stream.draw(position, 0, 40)
        labels = example["labels"]
        (index,) = set(labels.unique().tolist()) - {NOTHING, IGNORED}
        assert index == int(stream.describe(position, 0)[0]) and index in SQUARES.classes
        assert (labels == IGNORED).any()
        inside = example["picture"][:, labels == index].float().mean(1)
        np.testing.assert_allclose(inside.numpy(), list(COLOURS.values())[index], atol=20)
        again = stream.draw(position, 0, 40)
        assert all(torch.equal(example[name], again[name]) for name in example)
    others = [LabelledPictures(SQUARES, STILL, seed=1).describe(position, 0) for position in range(12)]
    assert others != [stream.describe(position, 0) for position in range(12)]


def test_combinations_that_nobody_has_shown_count_for_nothing() -> None:
    words = ["bus", "disc", "light", "plain", "ring", "striped", "traffic"]
    names = ["striped disc", "striped ring", "plain ring", "bus", "traffic light", ""]
    table = np.array([[word in name.split() for word in words] for name in names])
    told = {
        (names[index], words[word]): {words[other] for other in np.flatnonzero(row)}
        for index, word, row in zip(*rivals(table), strict=True)
    }
    assert sum(len(name.split()) for name in names) == len(told)
    unrelated = {"bus", "light", "traffic"}
    assert told["striped disc", "disc"] == {"ring"} | unrelated
    assert told["striped disc", "striped"] == unrelated  # nobody has shown a plain disc
    assert told["striped ring", "striped"] == {"plain"} | unrelated
    assert told["striped ring", "ring"] == {"disc"} | unrelated
    assert told["plain ring", "ring"] == unrelated and told["plain ring", "plain"] == {"striped"} | unrelated
    assert told["bus", "bus"] == set(words) - {"bus"}
    assert told["traffic light", "light"] == set(words) - {"traffic", "light"}


class Always(torch.nn.Module):
    """An encoder that answers the same token everywhere: these values, then zeros."""

    def __init__(self, config: ViTConfig, values: np.ndarray) -> None:
        super().__init__()
        self.config = config
        self.token = torch.zeros(config.dim)
        self.token[: len(values)] = torch.from_numpy(values)

    def forward(self, pictures: torch.Tensor, tap: int, *, tap_norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
        patches = (pictures.shape[-1] // self.config.patch) ** 2
        tokens = self.token.expand(len(pictures), patches, -1)
        return tokens, tokens


def test_geometry_by_hand() -> None:
    """A square over four of sixteen patches, and a bar that fills two of them and a little of a third."""
    objects = torch.zeros(2, 56, 56, dtype=torch.int64)
    objects[0, 14:42, 14:42] = 3
    objects[1, :14, 0:32] = 1
    place, outline, sure = object_geometry(objects, 14)
    assert sure[0].view(4, 4).nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert sure[1].nonzero().flatten().tolist() == [0, 1]
    np.testing.assert_allclose(place[0, 5], [0.25, 0.25, 2], atol=1e-5)
    np.testing.assert_allclose(place[0, 10], [-0.25, -0.25, 2], atol=1e-5)
    root = np.sqrt(32 * 14) / 56
    np.testing.assert_allclose(place[1, 0], [(16 - 7) / 56 / root, 0, 4 * root], atol=1e-5)
    # The window is twice the side of the square, so its middle half is filled.
    middle = np.zeros((12, 12))
    middle[3:9, 3:9] = 1
    np.testing.assert_allclose(outline[0, 5].view(12, 12), middle, atol=0.3)
    assert (outline[0, 5].view(12, 12).numpy().round() == middle).all()
    assert torch.equal(outline[0, 5], outline[0, 10])
    bar = outline[1, 0].view(12, 12)
    assert bar.mean() == pytest.approx(1 / 4, rel=0.1)  # whatever the object, its area is a quarter of the window
    assert (bar.sum(0) > 0.5).sum() == pytest.approx(12 * 32 / 56 / root / 2, abs=1)
    assert (bar.sum(1) > 0.5).sum() == pytest.approx(12 * 14 / 56 / root / 2, abs=1)


def test_outlines_follow_a_slant() -> None:
    rows, columns = np.mgrid[:56, :56]
    slant = torch.from_numpy((np.abs(rows - columns) < 10).astype(np.int64))[None]
    falling = object_geometry(slant, 14)[1][0, 0].view(12, 12)
    rising = object_geometry(slant.flip(2), 14)[1][0, 3].view(12, 12)
    assert falling[1, 1] > 0.9 and falling[1, 10] < 0.1
    torch.testing.assert_close(rising, falling.flip(1), atol=0.4, rtol=0)  # every other pixel is read


def test_the_loss_by_hand() -> None:
    """One word, and two classes that add one of two others to it; ignored pixels take no part."""
    objective = WordObjective(ENCODER, np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)).eval()
    cosines = np.array([0.64, -0.48, 0.36, 0.48])  # three words and nothing
    objective.words = torch.nn.Parameter(2 * torch.eye(4, ENCODER.dim))
    objective.encoder = Always(ENCODER, 5 * cosines)
    first, second, third = SHARPNESS * cosines[:3]
    nothing = SHARPNESS * (2 * cosines[3] - 1)
    thing, empty = np.log1p(np.exp(nothing)), np.log1p(np.exp(-nothing))
    lone = np.log(np.exp([first, second, third]).sum()) - first  # told from all words
    pair = np.log(np.exp(second) + np.exp(third)) - second  # its first word from none, its second from the third
    labels = torch.full((4, 28, 28), NOTHING, dtype=torch.uint8)
    labels[0, :14, :14] = 1
    labels[1, :14] = 0
    labels[1, 14:] = IGNORED
    labels[2, :, :14] = 0
    labels[3] = IGNORED
    wanted = [(pair + thing + 3 * empty) / 4, lone + thing, (lone + thing + empty) / 2, 0.0]
    batch = {"picture": torch.zeros(4, 3, 28, 28, dtype=torch.uint8), "labels": labels}
    batch["objects"] = torch.zeros_like(labels)
    with torch.no_grad():
        found = objective(batch)
        each = [objective({name: tensor[[index]] for name, tensor in batch.items()}) for index in range(4)]
    assert [float(one["loss"]) for one in each] == pytest.approx(wanted, rel=1e-5)
    assert float(found["loss"]) == pytest.approx(np.mean(wanted), rel=1e-5)
    # The likeliest words are the first and the third; an object is always seen.
    assert [float(one["words"]) for one in each[:3]] == [0.5, 1.0, 1.0]
    assert [float(one["objects"]) for one in each[:3]] == [0.25, 0.5, 0.5]


def stopping(recipe: Any, call: int) -> Any:
    forward, calls = recipe.objective.forward, []

    def stop(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == call:
            raise Stopped
        return forward(batch)

    recipe.objective.forward = stop
    return recipe


def test_an_encoder_learns_and_goes_on_exactly(tmp_path: Path) -> None:
    train(dino(30), tmp_path / "whole", log_every=4, save_every=15)
    log = log_of(tmp_path / "whole")
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    with pytest.raises(Stopped):
        train(stopping(dino(30), 19), tmp_path / "stopped", log_every=4, save_every=15)
    train(dino(30), tmp_path / "stopped", log_every=4, save_every=15)
    check_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_objects_and_their_prompts() -> None:
    stream = Objects(SHAPES, STILL, objects=3, seed=0)
    for position in range(4):
        example = stream.draw(position, 0, 64)
        scene = SHAPES.dataset.regions(stream.describe(position, 0), SHAPES.classes)  # type: ignore[union-attr]
        assert example["truth"].shape == (3, 64, 64) and len(scene.objects) >= 3
        for truth, point, box in zip(example["truth"], example["point"], example["box"], strict=True):
            column, row = point.long().tolist()
            assert bool(truth[row, column])
            rows, columns = truth.any(1).nonzero(), truth.any(0).nonzero()
            tight = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
            sides = (tight[2:] - tight[:2]).repeat(2)
            assert ((box - tight).abs() <= 0.1 * sides + 1e-4).all()
        again = stream.draw(position, 0, 64)
        assert all(torch.equal(example[name], again[name]) for name in example)


def test_a_window_without_objects_is_refused() -> None:
    pictures = BasePictures(Squares(), 0)
    pictures.regions = lambda item: Squares().regions(item, [])  # type: ignore[method-assign]
    with pytest.raises(InputError) as caught:
        Objects(pictures, STILL, 2, 0).draw(0, 0, 32)
    assert caught.value.code == "no_object"


def test_of_three_masks_only_the_best_learns() -> None:
    target = torch.zeros(1, 1, 6, 6)
    target[..., :3, :] = 1
    good, bad = 4 * (2 * target - 1), torch.zeros(1, 1, 6, 6)
    logits = torch.stack([bad, good, -good], 2).requires_grad_()
    predicted = torch.full((1, 1, 3), 0.5, requires_grad=True)
    loss, best, overlap = _judge(logits, predicted, target)
    loss.backward()
    assert torch.equal(best, good) and float(overlap) == 1.0
    assert logits.grad is not None and predicted.grad is not None
    assert [bool(logits.grad[0, 0, each].any()) for each in range(3)] == [False, True, False]
    assert predicted.grad.flatten().tolist() == pytest.approx([1 / 3, -1 / 3, 1 / 3])  # IoU 0, 1, 0 against 0.5


def test_the_next_point_lies_in_the_worst_error() -> None:
    target = torch.zeros(1, 2, 20, 20)
    target[0, :, 2:9, 2:9] = 1
    logits = 9 * (2 * target - 1)
    logits[0, 0, 2:9, 2:9] = -9  # the object is missed
    logits[0, 1, 12:19, 11:18] = 9  # something else is found
    point, label = _correction(logits, target, cell=2)
    assert label.flatten().tolist() == [1, 0]
    missed, found = point[0, :, 0].tolist()
    assert missed == pytest.approx([11, 11], abs=3) and found == pytest.approx([29, 31], abs=3)


def test_a_promptable_network_trains_all_its_parts(tmp_path: Path) -> None:
    """Points and boxes take turns: two steps reach all but the fixed Gaussian matrix and masks that were never best.

    A key's bias adds the same to every weight of a softmax, so its gradient is rounding, or nothing.
    """
    recipe = sam(2)
    before = {name: each.clone() for name, each in recipe.objective.named_parameters()}
    train(recipe, tmp_path)
    may_stay = re.compile(r"gaussian_matrix|k_proj\.bias|output_hypernetworks_mlps\.[123]\.")
    for name, parameter in recipe.objective.named_parameters():
        assert may_stay.search(name) or not torch.equal(parameter, before[name]), name
    masks = [f"sam.mask_decoder.output_hypernetworks_mlps.{number}.layers.2.bias" for number in range(4)]
    learned = [not torch.equal(recipe.objective.get_parameter(name), before[name]) for name in masks]
    assert learned[0] and any(learned[1:])


def test_a_promptable_network_goes_on_exactly(tmp_path: Path) -> None:
    train(sam(), tmp_path / "whole", save_every=1)
    with pytest.raises(Stopped):
        train(stopping(sam(), 3), tmp_path / "stopped", save_every=1)
    train(sam(), tmp_path / "stopped", save_every=1)
    check_same_end(tmp_path / "stopped", tmp_path / "whole")
