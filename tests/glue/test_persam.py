"""PerSAM's steps between the stages: fitting, resampling, points, guidance, bad input, videos."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fssdeploy.engines.onnxruntime import OnnxRuntimeEngine
from fssdeploy.engines.torch import TorchEngine
from fssdeploy.errors import InputError, IntegrityError
from fssdeploy.export.lint import lint
from fssdeploy.export.onnx import export_stage
from fssdeploy.glue.persam import fit as persam_fit
from fssdeploy.glue.persam.fit import MixingLoss, fit_mask_weights
from fssdeploy.glue.persam.options import PerSamOptions
from fssdeploy.glue.persam.system import DECODER, ENCODER, REFINE, PerSam
from fssdeploy.glue.persam.video import VideoOptions, VideoTracker, widened
from fssdeploy.glue.sam_frame import tight_box, to_canvas, to_picture
from fssdeploy.images.geometry import place
from fssdeploy.images.masks import Mask
from fssdeploy.modules.sam import PRESETS, SamConfig
from fssdeploy.systems import persam
from fssdeploy.weights.checkpoint import write_checkpoint
from fssdeploy.weights.persam import fill
from fssdeploy.weights.sam import save_sam

RNG = np.random.default_rng(5)
SAM = dataclasses.replace(
    PRESETS["tiny"], dim=16, depth=1, heads=2, image_size=128, patch=8, out=32, decoder_mlp=32, iou_hidden=16
)


def open_system(**options: Any) -> PerSam:
    config = persam.PerSamConfig(SAM, options=PerSamOptions(**{"steps": 5, **options}))
    model = persam.build(config)
    persam.initialise_untrained(model, 3)
    specs = persam.specs(config)
    return PerSam(
        "persam", specs, TorchEngine(persam.reference_stages(model), specs), persam.preprocessing(config), "weights"
    )


@pytest.fixture(scope="module", params=["persam", "persam_f"])
def system(request: pytest.FixtureRequest) -> PerSam:
    return open_system(variant=request.param)


@pytest.fixture(scope="module", params=["persam", "persam_f"])
def original(request: pytest.FixtureRequest) -> PerSam:
    return open_system(variant=request.param, compat="original")


class Emptying:
    """An engine whose masks of the chosen stages are empty everywhere."""

    name = "emptying"

    def __init__(self, system: PerSam, stages: tuple[str, ...]) -> None:
        self.inner, self.stages = system.engine, stages
        self.specs = self.inner.specs
        self.asked: list[tuple[str, Mapping[str, np.ndarray]]] = []

    def run(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.asked.append((stage, inputs))
        found = self.inner.run(stage, inputs)
        if stage in self.stages:
            found["mask_logits"] = -np.abs(found["mask_logits"]) - 1
        return found

    def describe(self) -> dict[str, Any]:
        return {}


# ------------------------------------------------------------------------------------------------- PerSAM-F's fit


def plain_loss(logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Dice and focal loss of a mixture, term by term as the paper's section 3.4 has them."""
    mixed = (1 - weights.sum()) * logits[0] + weights[0] * logits[1] + weights[1] * logits[2]
    p = mixed.sigmoid()
    dice = 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
    entropy = F.binary_cross_entropy_with_logits(mixed, target, reduction="none")
    right = p * target + (1 - p) * (1 - target)
    alpha = 0.25 * target + 0.75 * (1 - target)
    return dice + (alpha * entropy * (1 - right) ** 2).mean()


@pytest.mark.parametrize("scale", [1.0, 10.0, 200.0])
def test_closed_form_gradient_is_that_of_autograd(scale: float) -> None:
    logits = (RNG.standard_normal((3, 40_000)) * scale).astype(np.float32)
    target = RNG.random(40_000) < 0.2
    weights = np.array([0.4, -0.1])
    dice, focal, gradient = MixingLoss(logits, target).at(weights)
    free = torch.tensor(weights, requires_grad=True)
    loss = plain_loss(torch.from_numpy(logits).double(), torch.from_numpy(target).double(), free)
    loss.backward()
    np.testing.assert_allclose(dice + focal, loss.item(), rtol=1e-5)
    assert free.grad is not None
    np.testing.assert_allclose(gradient, free.grad.numpy(), rtol=1e-4, atol=1e-6 * scale)


def test_fit_walks_the_path_of_the_optimiser() -> None:
    logits = RNG.standard_normal((3, 5000)).astype(np.float32) * 4
    target = logits[1] + RNG.standard_normal(5000) > 2
    steps, trace = 30, dict[str, np.ndarray]()
    found = fit_mask_weights(logits, target, steps, 0.01, trace)

    weights = torch.full((2,), 1 / 3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.AdamW([weights], lr=0.01, eps=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    path: list[np.ndarray] = []
    rates = []
    for _ in range(steps):
        optimiser.zero_grad()
        plain_loss(torch.from_numpy(logits).double(), torch.from_numpy(target).double(), weights).backward()
        optimiser.step()
        schedule.step()
        path.append(weights.detach().numpy().copy())
        rates.append(float(schedule.get_last_lr()[0]))
    np.testing.assert_allclose(trace["weights_after_step"], path, atol=1e-6)
    np.testing.assert_allclose(trace["learning_rate"], rates, atol=1e-9)
    np.testing.assert_allclose(found, [1 - path[-1].sum(), *path[-1]], atol=1e-6)
    assert found[1] > 1 / 3 > found[2], "the second mask is the one that was asked for"


def test_fit_does_not_depend_on_the_order_or_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = RNG.standard_normal((3, 1000)).astype(np.float32)
    target = RNG.random(1000) < 0.5
    whole = fit_mask_weights(logits, target, 10)
    monkeypatch.setattr(persam_fit, "_BLOCK", 7)
    order = RNG.permutation(1000)
    np.testing.assert_allclose(fit_mask_weights(logits[:, order], target[order], 10), whole, atol=1e-6)


def test_fit_refuses_what_cannot_be_fitted() -> None:
    logits = np.zeros((3, 4), np.float32)
    with pytest.raises(InputError, match="marks nothing"):
        fit_mask_weights(logits, np.zeros(4, bool))
    with pytest.raises(InputError) as caught:
        fit_mask_weights(logits, np.ones(5, bool))
    assert caught.value.code == "wrong_shape"


def test_fit_of_a_mask_that_fills_the_picture() -> None:
    assert np.isfinite(fit_mask_weights(RNG.standard_normal((3, 50)).astype(np.float32), np.ones(50, bool), 5)).all()


# ----------------------------------------------------------------------------------------------------- the frame


@pytest.mark.parametrize(("height", "width"), [(96, 128), (150, 100), (33, 200), (128, 128), (1, 7)])
@pytest.mark.parametrize("steps", [(), (64,)])
def test_to_picture_equals_the_passes_one_by_one(height: int, width: int, steps: tuple[int, ...]) -> None:
    where = place(height, width, 128, "letterbox")
    maps = RNG.standard_normal((2, 3, 16, 16))
    expected = torch.from_numpy(maps)
    for side in (*steps, 128):
        expected = F.interpolate(expected, (side, side), mode="bilinear", align_corners=False)
    expected = expected[..., : where.rows, : where.cols]
    expected = F.interpolate(expected, (height, width), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(to_picture(maps, where, steps), expected.numpy(), atol=2e-5)
    assert to_picture(maps.astype(np.float32), where).dtype == np.float32


def test_extremes_in_a_corner_are_exact_ties_and_the_first_is_taken(system: PerSam) -> None:
    where = place(96, 128, 128, "letterbox")
    cells = RNG.random((1, 16, 16))
    cells[0, 0, 15] = 2
    picture = to_picture(cells, where, (64,))[0]
    tied = np.argwhere(picture == picture.max())
    assert len(tied) > 1
    located = dataclasses.replace(system.locate(encoded(system), unit_rows(1)), picture=picture[None])
    assert located.best(1)[0, 0].tolist() == tied[0][::-1].tolist()
    assert located.best(2)[0].tolist() == tied[:2, ::-1].tolist()


def test_boxes_are_the_outermost_pixels() -> None:
    mask = np.zeros((20, 30), bool)
    mask[4, 7] = mask[9, 3] = True
    box = tight_box(mask)
    assert box is not None and box.tolist() == [3, 4, 7, 9]
    assert tight_box(np.zeros((5, 5), bool)) is None
    grown = widened(np.array([[3, 4, 28, 19]]), 10, (20, 30))
    assert grown.tolist() == [[0, 0, 30, 20]]


def test_points_are_scaled_by_each_axis() -> None:
    where = place(75, 50, 128, "letterbox")
    assert (where.rows, where.cols) == (128, 85)
    np.testing.assert_allclose(to_canvas(np.array([[50, 75], [10, 0]]), where), [[85, 128], [17, 0]], rtol=1e-6)


# ----------------------------------------------------------------------------------------------------- the verbs


def picture_of(seed: int, height: int = 96, width: int = 128) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def box_mask(height: int = 96, width: int = 128, box: tuple[int, int, int, int] = (20, 20, 60, 70)) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def encoded(system: PerSam, *seeds: int) -> Any:
    return system.encode([picture_of(seed) for seed in seeds or (0,)])


def unit_rows(count: int) -> np.ndarray:
    rows = RNG.standard_normal((count, SAM.out)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_padding_is_nothing_to_the_encoder(system: PerSam) -> None:
    """The canvas beyond the picture is zero after normalisation, whatever colour lies there."""
    where = place(60, 128, 128, "letterbox")
    canvas = RNG.integers(0, 256, (2, 3, 128, 128), np.uint8)
    canvas[1, :, : where.rows] = canvas[0, :, : where.rows]
    extent = np.array([[where.rows, where.cols]] * 2, np.int32)
    found = system.engine.run(ENCODER, {"picture": canvas, "extent": extent})["embedding"]
    np.testing.assert_array_equal(found[0], found[1])


def test_several_classes_and_pictures_equal_one_by_one(system: PerSam) -> None:
    features = encoded(system, 1, 2)
    states = {
        f"class {number}": system.enroll(encoded(system, number), [box_mask(box=(4 * number, 10, 70, 80))])
        for number in range(1, 12)  # more than one decoder call answers at once
    }
    together = system.segment(features, states)
    for index in range(2):
        for name, state in states.items():
            alone = system.segment(features[index], {name: state})
            np.testing.assert_allclose(together.logits[index][name], alone.logits[0][name], rtol=1e-3, atol=1e-4)
    assert together.logits[0]["class 1"].shape == (96, 128)
    assert together.prior[0]["class 1"].shape == (16, 16)


def test_a_state_of_several_shots_maps_like_the_mean_of_their_maps(system: PerSam) -> None:
    masks = [box_mask(), box_mask(box=(50, 30, 100, 90))]
    both = system.enroll(encoded(system, 1, 2), masks)
    single = [system.enroll(encoded(system, seed), [mask]) for seed, mask in zip((1, 2), masks, strict=True)]
    assert both.shots == 2
    query = encoded(system, 7)
    maps = [system.locate(query, state.tensors["target_feat"][None]).picture for state in (both, *single)]
    np.testing.assert_allclose(maps[0], (maps[1] + maps[2]) / 2, atol=1e-6)
    merged = single[0].merge(single[1])
    for name, tensor in both.tensors.items():
        np.testing.assert_allclose(merged.tensors[name], tensor, rtol=1e-5, atol=1e-7)
        assert tensor.nbytes == single[0].tensors[name].nbytes


def test_state_is_small_and_of_the_variant(system: PerSam) -> None:
    state = system.enroll(encoded(system), [box_mask()])
    second = "target_embedding" if system.options.variant == "persam" else "mask_weights"
    assert set(state.tensors) == {"target_feat", second}
    np.testing.assert_allclose(np.linalg.norm(state.tensors["target_feat"]), 1, rtol=1e-5)


def test_support_may_be_the_query(system: PerSam) -> None:
    features = encoded(system)
    trace: dict[str, Any] = {}
    masks = system.segment(features, {"object": system.enroll(features, [box_mask()])}, trace)
    assert np.isfinite(masks.logits[0]["object"]).all()
    assert trace["point_values"][0, 0] == trace["sim_picture"].max()


@pytest.mark.parametrize("colour", [0, 255])
def test_pictures_of_one_colour(original: PerSam, colour: int) -> None:
    plain = np.full((96, 128, 3), colour, np.uint8)
    features = original.encode([plain])
    masks = original.segment(features, {"object": original.enroll(features, [box_mask()])})
    assert np.isfinite(masks.logits[0]["object"]).all()


def test_a_picture_of_one_pixel(original: PerSam) -> None:
    features = original.encode([np.zeros((1, 1, 3), np.uint8)])
    state = original.enroll(features, [np.ones((1, 1), bool)])
    assert np.isfinite(original.segment(features, {"object": state}).logits[0]["object"]).all()


@pytest.mark.slow
def test_exported_stages_give_the_same_masks(tmp_path: Path) -> None:
    config = persam.PerSamConfig(SAM)
    model = persam.build(config)
    persam.initialise_untrained(model, 3)
    specs, modules = persam.specs(config), persam.stages(model)
    graphs = {}
    for name, spec in specs.items():
        files = export_stage(modules[name], spec, tmp_path, precision="fp32", fuse=False)
        graphs[name] = tmp_path / files.portable
        assert not [finding for finding in lint(graphs[name], spec) if finding.severity == "error"]
    reference = TorchEngine(persam.reference_stages(model), specs)
    answers = []
    for engine in (reference, OnnxRuntimeEngine(graphs, specs, 1)):
        system = PerSam("persam", specs, engine, persam.preprocessing(config), "weights")
        states = {name: system.enroll(encoded(system, seed), [box_mask()]) for seed, name in enumerate("abc")}
        answers.append(system.segment(encoded(system, 8), states).logits[0])
    for name, expected in answers[0].items():
        np.testing.assert_allclose(answers[1][name], expected, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------ original, corrected


def test_bias_lies_over_the_picture_unless_original() -> None:
    """The release squeezes the picture's map into the whole grid; corrected, it stays where the picture is."""
    biases = {}
    for compat in ("original", "corrected"):
        system = open_system(compat=compat)
        features = encoded(system)
        located = system.locate(features, unit_rows(1))
        located.cells[:] = -1
        located.cells[0, 2, 3] = 1
        located = dataclasses.replace(located, picture=to_picture(located.cells, features.placements[0], (64,)))
        biases[compat] = system.attention_bias(located, features.placements[0]).reshape(16, 16)
    corrected, squeezed = biases["corrected"], biases["original"]
    assert np.unravel_index(corrected.argmax(), corrected.shape) == (2, 3)
    assert (corrected[12:] == 0).all() and (corrected[:12] > 0).all()
    assert np.unravel_index(squeezed.argmax(), squeezed.shape) == (3, 3), "12 of 16 rows are squeezed into 16"
    assert (squeezed[12:] > 0).all()


def test_constant_map_gives_a_bias_of_one_half() -> None:
    system = open_system(compat="original")
    located = system.locate(encoded(system), unit_rows(1))
    located.cells[:], located.picture[:] = 0.3, 0.3
    np.testing.assert_array_equal(system.attention_bias(located, place(96, 128, 128, "letterbox")), 0.5)


def selected(system: PerSam, mask: np.ndarray) -> np.ndarray:
    trace: dict[str, Any] = {}
    system.enroll(encoded(system), [mask], trace)
    return trace["shots"][0]["ref_mask_selected"]


def test_mask_value_decides_how_full_a_cell_must_be() -> None:
    """Of a cell only the four pixels in its middle count; grey 128 wants all of them, 255 two."""
    mask = np.zeros((96, 128), bool)
    mask[16:24, 16:20] = True  # the left half of the cell in row 2, column 2, thus two of the four
    mask[32:40, 32:40] = True  # all of a cell
    grey, white = (selected(open_system(compat="original", mask_value=value), mask) for value in (128, 255))
    assert np.argwhere(grey).tolist() == [[4, 4]]
    assert np.argwhere(white).tolist() == [[2, 2], [4, 4]]
    assert np.argwhere(selected(open_system(compat="corrected"), mask)).tolist() == [[2, 2], [4, 4]]


@pytest.mark.parametrize("compat", ["original", "corrected"])
def test_object_thinner_than_every_rule_keeps_its_fullest_cell(compat: str) -> None:
    mask = np.zeros((96, 128), bool)
    mask[40:47, 56:59] = True  # 21 of the 64 pixels of the cell in row 5, column 7, and none of its middle columns
    assert np.argwhere(selected(open_system(compat=compat), mask)).tolist() == [[5, 7]]


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("masks", "code"),
    [
        ([np.zeros((96, 128), bool)], "mask_empty"),
        ([box_mask(box=(5, 5, 6, 6))], "object_vanishes"),
        ([box_mask(128, 96)], "mask_size"),
        ([box_mask(), box_mask()], "masks_count"),
        ([], "masks_count"),
    ],
)
def test_masks_that_cannot_be_used(original: PerSam, masks: list[np.ndarray], code: str) -> None:
    with pytest.raises(InputError) as caught:
        original.enroll(encoded(original), masks)
    assert caught.value.code == code


def test_no_shot_no_class_no_picture(system: PerSam) -> None:
    features = encoded(system)
    nothing = dataclasses.replace(features, placements=[], tensors={"embedding": features.tensors["embedding"][:0]})
    for call, code in (
        (lambda: system.enroll(nothing, []), "no_pictures"),
        (lambda: system.encode([]), "no_pictures"),
        (lambda: system.segment(features, {}), "no_classes"),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.code == code


def test_features_and_states_of_other_weights_are_refused(system: PerSam) -> None:
    features = encoded(system)
    state = system.enroll(features, [box_mask()])
    other = dataclasses.replace(features, fingerprint="others")
    for call in (
        lambda: system.enroll(other, [box_mask()]),
        lambda: system.segment(other, {"object": state}),
        lambda: system.segment(features, {"object": dataclasses.replace(state, fingerprint="others")}),
    ):
        with pytest.raises(IntegrityError):
            call()


def test_empty_masks_on_the_way_give_no_box(system: PerSam) -> None:
    """The release ends with an exception; here the next call goes without a box, and the answer may be empty."""
    features = encoded(system)
    state = system.enroll(features, [box_mask()])
    emptying = Emptying(system, (DECODER, REFINE))
    broken = PerSam("persam", system.specs, emptying, preprocessing_of(system), "weights")
    trace: dict[str, Any] = {}
    masks = broken.segment(features, {"object": state}, trace)
    assert not masks.binary(0, "object").any() and masks.score(0, "object") == 0
    assert (trace["step3_box"] == -1).all()
    labels = emptying.asked[-1][1]["labels"][0].tolist()
    assert labels.count(-1) == 1 and not {2, 3} & set(labels), "the padding point stands in for the box"


def preprocessing_of(system: PerSam) -> dict[str, Any]:
    return persam.preprocessing(persam.PerSamConfig(SAM, options=system.options))


def test_ignored_pixels_do_not_count_in_the_fit() -> None:
    system = open_system(variant="persam_f", steps=50)
    ignore = np.zeros((96, 128), bool)
    ignore[:, 64:] = True
    features = encoded(system)
    trace: dict[str, Any] = {}
    counted = system.enroll(features, [Mask(box_mask(), ignore)], trace)
    everywhere = system.enroll(features, [Mask(box_mask() & ~ignore, np.zeros_like(ignore))])
    expected = fit_mask_weights(trace["shots"][0]["logits_high"][:, ~ignore.ravel()], box_mask()[~ignore], 50)
    np.testing.assert_allclose(counted.tensors["mask_weights"], expected, rtol=1e-6)
    assert not np.allclose(counted.tensors["mask_weights"], everywhere.tensors["mask_weights"], rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"variant": "persam_x"}, {"compat": "other"}, {"mask_value": 100}, {"steps": 0}, {"learning_rate": float("nan")}],
)
def test_options_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        PerSamOptions(**options)
    assert caught.value.code == "option_unknown"


def test_configuration_survives_json_and_small_stages_are_refused() -> None:
    config = persam.PerSamConfig(SAM, 7, PerSamOptions(variant="persam_f", steps=7))
    assert persam.PerSamConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError):
        persam.PerSamConfig(SAM, 3)
    assert isinstance(config.sam, SamConfig)


def test_weights_are_one_sam_or_none_at_all(tmp_path: Path) -> None:
    model = persam.build(persam.PerSamConfig(SAM))
    first = fill(model, [], 1)
    assert (first.status, first.untrained_groups, first.seed) == ("untrained", ["sam"], 1)
    file = tmp_path / "sam.safetensors"
    save_sam(model.sam, file, {})
    other = persam.build(persam.PerSamConfig(SAM))
    assert fill(other, [file], None).status == "trained"
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=0)
    stranger = tmp_path / "other.safetensors"
    write_checkpoint(stranger, {"weight": torch.zeros(1)}, {})
    for files, code in (
        ([], "weights_missing"),
        ([file, file], "weights_missing"),
        ([stranger], "checkpoint_architecture"),
    ):
        with pytest.raises(InputError) as caught:
            fill(other, files, None)
        assert caught.value.code == code


# --------------------------------------------------------------------------------------------------------- videos


def tracker_of(compat: str, boxes: list[tuple[int, int, int, int]], **options: Any) -> VideoTracker:
    system = open_system(variant="persam_f", compat=compat)
    return VideoTracker(system, picture_of(0), [box_mask(box=box) for box in boxes], VideoOptions(**options))


def forget(tracker: VideoTracker, present: list[int]) -> list[list[int]]:
    """Boxes after a frame in which only the `present` objects were found."""
    labels = np.zeros((96, 128), np.uint8)
    for number in present:
        labels[10 * number : 10 * number + 5, 30:40] = number
    tracker._remember(labels)
    return [box.tolist() for box in tracker._boxes]


def test_an_object_that_vanishes() -> None:
    boxes = [(10, 10, 40, 40), (50, 50, 90, 90)]
    second = [30, 20, 39, 24]
    assert forget(tracker_of("original", boxes), [2]) == [second], "the second moves up"
    assert forget(tracker_of("corrected", boxes), [2]) == [[10, 10, 39, 39], second]
    gone = tracker_of("original", boxes)
    assert forget(gone, []) == []
    assert not gone.track(picture_of(1)).any()


def test_first_mask_is_the_largest_unless_original(monkeypatch: pytest.MonkeyPatch) -> None:
    low = np.full((1, 3, 64, 64), -1, np.float32)
    low[0, 0, :32, :32] = 1  # 64 x 64 pixels of the picture: 0 modulo 256
    low[0, 1, :8, :9] = 1  # 16 x 18: 32 modulo 256

    class Fixed(Emptying):
        def run(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = super().run(stage, inputs)
            return {**found, "mask_logits": low} if stage == DECODER else found

    for compat, choice in (("original", 1), ("corrected", 0)):
        tracker = tracker_of(compat, [(10, 10, 40, 40)])
        monkeypatch.setattr(tracker._system, "engine", Fixed(tracker._system, ()))
        trace: dict[str, Any] = {}
        tracker.track(picture_of(1), trace)
        assert trace["step1_areas"].tolist() == [[4096, 288, 0]]
        assert trace["step1_choice"].tolist() == [choice]


def test_what_cannot_be_followed() -> None:
    with pytest.raises(InputError) as caught:
        tracker_of("corrected", [])
    assert caught.value.code == "objects"
    with pytest.raises(InputError) as caught:
        VideoTracker(open_system(), picture_of(0), [box_mask()])
    assert caught.value.code == "variant"
    tracker = tracker_of("corrected", [(10, 10, 40, 40)])
    with pytest.raises(InputError) as caught:
        tracker.track(picture_of(0, 50, 50))
    assert caught.value.code == "frame_size"
    with pytest.raises(InputError) as caught:
        tracker_of("corrected", [(10, 10, 40, 40)], topk=3).track(picture_of(1))
    assert caught.value.code == "too_many_points"
    with pytest.raises(InputError):
        VideoOptions(topk=0)
