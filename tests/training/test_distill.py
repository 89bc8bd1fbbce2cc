"""Distillation: the teacher's features are computed once for each picture and teacher; only the adapter learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fssdeploy.modules.sam import Sam, SamConfig
from fssdeploy.systems import fsdino
from fssdeploy.training.distill import DistillRecipe, TeacherCache, TeacherPictures
from fssdeploy.training.pictures import BasePictures
from fssdeploy.training.recipe import RunSettings
from fssdeploy.training.schedule import Phase
from fssdeploy.weights.fsdino import fill
from tests.evaluation.squares import Squares
from tests.networks import SMALL
from tests.training.toys import check_same_end, check_same_state, log_of, train

TEACHER = SamConfig(24, 2, 3, image_size=32, patch=8, window=0, out=32, decoder_heads=4, decoder_mlp=48, iou_hidden=32)
# Two classes of six pictures each: one epoch at 28 pixels, one at 42.
PHASES = (Phase(3, 4, 28), Phase(3, 4, 42))


def recipe(cache: Path, seed: int = 0, dataset: Squares | None = None) -> tuple[DistillRecipe, list[int]]:
    """And how many pictures the teacher has seen, by call. `seed` is that of the teacher's weights."""
    student = fsdino.build(SMALL)
    fill(student, [], untrained_seed=3)
    torch.manual_seed(seed)
    teacher, encode, calls = Sam(TEACHER), Sam.encode, []

    def counted(pictures: torch.Tensor) -> torch.Tensor:
        calls.append(len(pictures))
        return encode(teacher, pictures)

    teacher.encode = counted  # type: ignore[method-assign]
    pictures = BasePictures(dataset or Squares(), 0)
    return DistillRecipe(pictures, student, teacher, cache, RunSettings(phases=PHASES), {"dataset": "squares"}), calls


def check_same_up_to_rounding_of_the_log(out: Path, reference: Path) -> None:
    """Features read back lie in memory in another order than computed ones, so sums over them are rounded otherwise."""
    check_same_state(out, reference, but=("tally",))
    for line, wanted in zip(log_of(out), log_of(reference), strict=True):
        assert line == pytest.approx(wanted, rel=1e-5)


def test_every_picture_is_computed_once(tmp_path: Path) -> None:
    first, calls = recipe(tmp_path / "cache")
    before = {name: each.clone() for name, each in first.objective.student.named_parameters()}
    train(first, tmp_path / "first")
    assert sum(calls) == 12
    for name, parameter in first.objective.student.named_parameters():
        assert torch.equal(parameter, before[name]) == (not name.startswith("adapter.")), name
        assert (parameter.grad is None) == (not name.startswith("adapter.")), name

    again, calls = recipe(tmp_path / "cache")
    train(again, tmp_path / "again")
    assert calls == []
    check_same_up_to_rounding_of_the_log(tmp_path / "again", tmp_path / "first")

    other, calls = recipe(tmp_path / "cache", seed=1)
    train(other, tmp_path / "other")
    assert sum(calls) == 12 and log_of(tmp_path / "other") != log_of(tmp_path / "first")
    assert other.settings()["teacher"] != first.settings()["teacher"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:60], lambda data: b"", lambda data: b"x"]
)
def test_a_damaged_file_is_computed_again(tmp_path: Path, damage: Any) -> None:
    train(recipe(tmp_path / "cache")[0], tmp_path / "first")
    files = sorted((tmp_path / "cache").glob("*/*.npy"))
    assert len(files) == 12
    sound = files[5].read_bytes()
    files[5].write_bytes(damage(sound))
    again, calls = recipe(tmp_path / "cache")
    train(again, tmp_path / "again")
    assert calls == [1] and files[5].read_bytes() == sound
    check_same_up_to_rounding_of_the_log(tmp_path / "again", tmp_path / "first")


def test_keys_are_of_the_content() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (3, 4, 6), np.uint8)
    changed = picture.copy()
    changed[0, 0, 0] ^= 1
    keys = [TeacherCache.key(each) for each in (picture, picture.copy(), changed, picture.reshape(3, 6, 4))]
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_the_cache_keeps_what_was_put(tmp_path: Path) -> None:
    embedding = np.random.default_rng(0).normal(size=(4, 2, 2)).astype(np.float32)
    cache = TeacherCache(tmp_path, "a" * 64, kept=1)
    assert cache.get("first") is None
    stored = cache.put("first", embedding)
    np.testing.assert_allclose(stored, embedding, rtol=1e-3)
    cache.put("second", embedding + 1)
    assert list(cache._recent) == ["second"]
    assert np.array_equal(cache.get("first"), stored) and np.array_equal(
        cache.get("second"), cache.put("x", embedding + 1)
    )
    assert TeacherCache(tmp_path, "b" * 64).get("first") is None


def test_the_loss_is_the_squared_error_on_the_teachers_grid(tmp_path: Path) -> None:
    chosen, _ = recipe(tmp_path)
    example = [chosen.examples.draw(position, 0, 42) for position in (0, 1)]
    batch = {name: torch.stack([each[name] for each in example]) for name in example[0]}
    with torch.no_grad():
        found = chosen.objective(batch)
        target = chosen.objective._teacher[0].encode(batch["full"]).half().float()
        _, embedding = chosen.objective.student.encode(batch["picture"])
    assert embedding.shape[-1] == 3 and target.shape[-1] == 4
    fitted = F.interpolate(embedding, size=(4, 4), mode="bilinear", align_corners=False)
    error = float((fitted - target).square().mean())
    spread = float((target - target.mean((0, 2, 3), keepdim=True)).square().mean())
    assert float(found["loss"]) == pytest.approx(error, rel=1e-4)
    assert float(found["unexplained"]) == pytest.approx(error / spread, rel=1e-4)


def test_epochs_see_every_picture_once() -> None:
    pictures = BasePictures(Squares(), 0)
    stream = TeacherPictures(pictures, 32, seed=0)
    epochs = [[stream.describe(12 * epoch + rank, 0) for rank in range(12)] for epoch in range(3)]
    assert all(sorted(epoch) == pictures.items for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [TeacherPictures(pictures, 32, seed=1).describe(rank, 0) for rank in range(12)] != epochs[0]
    example = stream.draw(5, 0, 28)
    assert example["picture"].shape == (3, 28, 28) and example["full"].shape == (3, 32, 32)


def test_an_unreadable_picture_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """Skipped in both epochs, replaced by a draw of its own, the same in a second run."""
    dataset = Squares()
    dataset.broken = {"3-2"}
    ends = []
    for out in ("run", "again"):
        chosen, calls = recipe(tmp_path / out / "cache", dataset=dataset)
        ends.append(train(chosen, tmp_path / out))
        assert sum(calls) == 11
    assert ends[0].skipped >= 2 and ends[0].last == ends[1].last
    check_same_end(tmp_path / "again", tmp_path / "run")
    assert dataclasses.asdict(ends[0]) | {"seconds": 0} == dataclasses.asdict(ends[1]) | {"seconds": 0}
