"""The three verbs on a system small enough to compute by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from fssdeploy.errors import InputError, IntegrityError
from fssdeploy.images.masks import mask_from_array
from fssdeploy.pipeline import CHUNK, MIN_COVERAGE, StagedSystem, run_in_chunks
from fssdeploy.protocol import BATCH, ClassState, Features, StageSpec, TensorSpec

CANVAS, PATCH = 28, 7
FINGERPRINT = "f" * 64


def specs(batch: int | str) -> dict[str, StageSpec]:
    picture = TensorSpec("picture", "uint8", (batch, 3, CANVAS, CANVAS))
    grey = TensorSpec("grey", "float32", (batch, CANVAS, CANVAS))
    mask = TensorSpec("mask", "float32", (batch, 1, CANVAS, CANVAS))
    level = TensorSpec("level", "float32", (batch, 1))
    logits = TensorSpec("mask_logits", "float32", (batch, 1, CANVAS, CANVAS))
    prior = TensorSpec("prior_logits", "float32", (batch, 1, CANVAS, CANVAS))
    return {
        "encoder": StageSpec("encoder", (picture,), (grey,)),
        "enroll": StageSpec("enroll", (grey, mask), (level,)),
        "segment": StageSpec("segment", (grey, level), (logits, prior)),
    }


class Grey:
    """Finds what is about as bright as the object was; records the batches it was given."""

    name = "grey"

    def __init__(self, batch: int | str) -> None:
        self.specs = specs(batch)
        self.batches: list[tuple[str, int]] = []

    def run(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.specs[stage].check(inputs)
        self.batches.append((stage, len(next(iter(inputs.values())))))
        assert all(array.flags.c_contiguous for array in inputs.values())
        if stage == "encoder":
            return {"grey": inputs["picture"].mean(1, dtype=np.float32)}
        if stage == "enroll":
            weight = inputs["mask"][:, 0]
            return {"level": (inputs["grey"] * weight).sum((1, 2))[:, None] / weight.sum((1, 2))[:, None]}
        logits = (30 - np.abs(inputs["grey"] - inputs["level"][:, :, None]))[:, None]
        return {"mask_logits": logits, "prior_logits": logits}

    def describe(self) -> dict[str, Any]:
        return {}


def system(batch: int | str = BATCH, geometry: str = "squash") -> StagedSystem:
    preprocessing = {"canvas": CANVAS, "patch": PATCH, "geometry": geometry}
    return StagedSystem("grey", specs(batch), Grey(batch), preprocessing, FINGERPRINT)


def bright(height: int, width: int, level: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """A dark picture with a bright object in its upper left quarter, and the mask of that."""
    mask = np.zeros((height, width), bool)
    mask[: height // 2, : width // 2] = True
    return np.where(mask[..., None], level, 20).astype(np.uint8).repeat(3, 2), mask


def refused(code: str, call: Any, kind: type = InputError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.code == code
    return str(caught.value)


@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("geometry", ["squash", "letterbox"])
def test_masks_come_back_at_the_size_of_their_pictures(batch: int | str, geometry: str) -> None:
    staged = system(batch, geometry)
    shown = [bright(56, 84), bright(28, 28, 180)]
    state = staged.enroll(staged.encode([picture for picture, _ in shown]), [mask for _, mask in shown])
    assert state.shots == 2 and state.tensors["level"].shape == (1,)
    assert state.tensors["level"] == pytest.approx(190, abs=8)
    queries = [bright(84, 56, 185), bright(100, 30, 195)]
    masks = staged.segment(staged.encode([picture for picture, _ in queries]), {"bright": state, "again": state})
    assert masks.names == ["bright", "again"]
    for index, (_, expected) in enumerate(queries):
        found = masks.binary(index, "bright")
        assert found.shape == expected.shape
        assert (found == expected).mean() > 0.9
        assert 0.5 < masks.score(index, "bright") <= 1
        np.testing.assert_array_equal(masks.labels(index), found.astype(np.uint8))


def test_a_fixed_batch_runs_row_by_row_and_a_free_one_in_chunks() -> None:
    pictures = [bright(30, 30)[0]] * (CHUNK + 2)
    for batch, sizes in ((1, [1] * (CHUNK + 2)), (BATCH, [CHUNK, 2])):
        staged = system(batch)
        features = staged.encode(pictures)
        assert features.tensors["grey"].shape == (CHUNK + 2, CANVAS, CANVAS) and len(features) == CHUNK + 2
        assert staged.engine.batches == [("encoder", size) for size in sizes]  # type: ignore[attr-defined]


def test_chunks_change_nothing() -> None:
    engine = Grey(BATCH)
    inputs = {"picture": np.random.default_rng(0).integers(0, 256, (5, 3, CANVAS, CANVAS), np.uint8)}
    whole = run_in_chunks(engine, engine.specs["encoder"], inputs)["grey"]
    np.testing.assert_array_equal(run_in_chunks(engine, engine.specs["encoder"], inputs, chunk=2)["grey"], whole)


def test_every_shot_weighs_the_same_however_they_come() -> None:
    staged = system()
    shown = [bright(40, 40, level) for level in (100, 150, 220)]
    together = staged.enroll(staged.encode([picture for picture, _ in shown]), [mask for _, mask in shown])
    singly = [staged.enroll(staged.encode([picture]), [mask]) for picture, mask in shown]
    merged = singly[0].merge(singly[1]).merge(singly[2])
    assert merged.shots == together.shots == 3
    np.testing.assert_allclose(merged.tensors["level"], together.tensors["level"], rtol=1e-6)


def test_features_of_one_picture_keep_their_batch() -> None:
    staged = system()
    features = staged.encode([bright(30, 30)[0], bright(40, 60)[0]])
    assert features[1].tensors["grey"].shape == (1, CANVAS, CANVAS)
    assert (features[1].placements[0].height, features[-1].placements[0].width) == (40, 60)
    with pytest.raises(IndexError):
        features[2]


def test_what_is_no_picture() -> None:
    good = bright(30, 30)[0]
    for bad in (good[..., :2], good[..., 0], good.astype(np.float32), good[None], good.tolist(), "a.png", None):
        refused("not_a_picture", lambda bad=bad: system().encode([good, bad]))
    refused("no_pictures", lambda: system().encode([]))
    refused("picture_size", lambda: system().encode([good[:0]]))


def test_what_is_no_mask_of_its_picture() -> None:
    staged = system()
    picture, mask = bright(30, 40)
    features = staged.encode([picture])
    refused("masks_count", lambda: staged.enroll(features, []))
    refused("masks_count", lambda: staged.enroll(features, [mask, mask]))
    assert "40 x 30 pixels (height x width)" in refused("mask_size", lambda: staged.enroll(features, [mask.T]))
    refused("mask_empty", lambda: staged.enroll(features, [np.zeros_like(mask)]))
    refused("mask_values", lambda: staged.enroll(features, [mask * 0.5]))
    only_ignored = mask_from_array(np.where(mask, 255, 0).astype(np.uint8), indexed=True)
    refused("mask_empty", lambda: staged.enroll(features, [only_ignored]))
    staged.enroll(features, [np.ones_like(mask)])


def test_objects_that_vanish_between_the_feature_cells() -> None:
    """The limit is what an object covers of the one cell that it covers most."""
    staged = system()
    features = staged.encode([bright(280, 280)[0]])  # a cell is 70 x 70 pixels of the picture
    side = int(70 * MIN_COVERAGE**0.5)
    for pixels, seen in ((side + 1, True), (side - 1, False)):
        mask = np.zeros((280, 280), bool)
        mask[:pixels, :pixels] = True
        if seen:
            staged.enroll(features, [mask])
        else:
            assert "too small" in refused("object_vanishes", lambda mask=mask: staged.enroll(features, [mask]))
    split = np.zeros((280, 280), bool)
    split[70 - side // 2 : 70 + side // 2 + 1, 70 - side // 2 : 70 + side // 2 + 1] = True  # on the corner of four
    refused("object_vanishes", lambda: staged.enroll(features, [split]))


def test_what_comes_from_another_artifact() -> None:
    staged = system()
    picture, mask = bright(30, 30)
    features = staged.encode([picture])
    state = staged.enroll(features, [mask])
    strange = Features(features.tensors, features.placements, "0" * 64)
    refused("other_artifact", lambda: staged.enroll(strange, [mask]), IntegrityError)
    refused("other_artifact", lambda: staged.segment(strange, {"x": state}), IntegrityError)
    other = ClassState(state.tensors, 1, "0" * 64)
    assert "'x'" in refused("other_artifact", lambda: staged.segment(features, {"x": other}), IntegrityError)
    refused("no_classes", lambda: staged.segment(features, {}))


@pytest.mark.parametrize("stage", ["encoder", "enroll", "segment"])
def test_a_stage_that_was_not_exported(stage: str) -> None:
    staged = system()
    picture, mask = bright(30, 30)
    features = staged.encode([picture])
    state = staged.enroll(features, [mask])
    del staged.specs[stage]
    calls = {
        "encoder": lambda: staged.encode([picture]),
        "enroll": lambda: staged.enroll(features, [mask]),
        "segment": lambda: staged.segment(features, {"x": state}),
    }
    assert "--components all" in refused("stage_missing", calls[stage])


def test_states_and_features_of_other_shapes_are_named() -> None:
    staged = system()
    features = staged.encode([bright(30, 30)[0]])
    wrong = ClassState({"level": np.zeros(2, np.float32)}, 1, FINGERPRINT)
    assert "level" in refused("wrong_shape", lambda: staged.segment(features, {"x": wrong}))
    refused("wrong_inputs", lambda: staged.segment(features, {"x": ClassState({}, 1, FINGERPRINT)}))
