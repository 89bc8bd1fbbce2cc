"""PerSAM, PerSAM-F and PerSAM in videos against recorded stages of the released code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fssdeploy.engines.torch import TorchEngine
from fssdeploy.glue.persam.options import PerSamOptions
from fssdeploy.glue.persam.system import GUIDED, PerSam
from fssdeploy.glue.persam.video import VideoOptions, VideoTracker
from fssdeploy.glue.sam_frame import to_picture
from fssdeploy.images.geometry import fit_picture
from fssdeploy.modules.sam import PIXEL_MEAN, PIXEL_STD, SamConfig
from fssdeploy.systems import persam
from fssdeploy.weights.persam import fill
from tests.conftest import golden_cases, read_case

pytestmark = pytest.mark.golden

Arrays = dict[str, Any]


def sam_config(sizes: dict[str, Any]) -> SamConfig:
    assert sizes["pixel_mean"] == list(PIXEL_MEAN) and sizes["pixel_std"] == list(PIXEL_STD)
    assert (sizes["dec_depth"], sizes["num_multimask_outputs"], sizes["iou_head_depth"]) == (2, 3, 3)
    assert sizes["qkv_bias"] and sizes["use_rel_pos"] and sizes["layer_norm_eps_encoder"] == 1e-6
    return SamConfig(
        dim=sizes["enc_dim"],
        depth=sizes["enc_depth"],
        heads=sizes["enc_heads"],
        global_blocks=tuple(sizes["enc_global"]),
        image_size=sizes["img_size"],
        patch=sizes["patch_size"],
        mlp_ratio=sizes["enc_mlp_ratio"],
        window=sizes["enc_window"],
        out=sizes["dim"],
        decoder_heads=sizes["dec_heads"],
        decoder_mlp=sizes["dec_mlp"],
        iou_hidden=sizes["iou_hidden"],
        mask_channels=sizes["mask_in_chans"],
    )


class Recorded:
    """One case: its configuration, inputs, and the system on PyTorch stages with the recorded weights."""

    def __init__(self, folder: Path) -> None:
        self.case = read_case(folder)
        self.config = self.case["config"]
        files = {name: folder / path for name, path in self.case["files"].items()}
        self.inputs, self.expected = load_file(files["inputs"]), load_file(files["stages"])
        pipeline = self.config["pipeline"]
        options = PerSamOptions(
            variant="persam" if pipeline == "one_shot" else "persam_f",
            compat="original",
            mask_value=self.config.get("mask_grey_value", 128),
            steps=self.config.get("train_epoch", 1000),
            learning_rate=self.config.get("lr", 1e-3),
        )
        config = persam.PerSamConfig(sam_config(self.config["sam"]), 3 + 2 * self.config.get("topk", 1), options)
        self.model = persam.build(config)
        fill(self.model, [files["weights"]], None)
        specs = persam.specs(config)
        engine = TorchEngine(persam.reference_stages(self.model), specs)
        self.system = PerSam("persam", specs, engine, persam.preprocessing(config), "recorded")

    def support(self, trace: Arrays) -> tuple[Arrays, Any]:
        """Features and state of the reference, and the trace of its one shot."""
        red = self.inputs["ref_mask_red"]
        features = self.system.encode([self.inputs["ref_picture"]])
        state = self.system.enroll(features, [red > 0], trace)
        return {"ref_features": features.tensors["embedding"][0], **trace["shots"][0]}, state

    def one_shot(self) -> Arrays:
        found, state = self.support({})
        topk = self.config["topk"]
        query = self.inputs["query_picture"]
        features = self.system.encode([query])
        states = {name: array[None] for name, array in state.tensors.items()}
        located = self.system.locate(features, states["target_feat"])
        best, worst = located.best(topk)[0], located.worst(topk)[0]
        given, given_labels = self.inputs["points_used"], self.inputs["point_labels"]
        if topk == 1:
            chosen, labels = self.system.points(located)
            np.testing.assert_array_equal(chosen[0], np.concatenate([best, worst]))
            np.testing.assert_array_equal(labels[0], given_labels)
        tokens: list[tuple[np.ndarray, np.ndarray]] = []  # before and after the transformer, of every call

        def remember(_module: object, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
            tokens.append((inputs[2].numpy(), outputs[0].numpy()))

        hook = self.model.sam.mask_decoder.transformer.register_forward_hook(remember)
        trace: Arrays = {}
        logits = self.system.mask_logits(features, states, located, given[None], given_labels[None], trace)
        hook.remove()
        where = features.placements[0]
        fitted = fit_picture(query, where)[: where.rows, : where.cols]
        tokens_in, tokens_out = tokens[0]
        capacity = int(self.system.specs[GUIDED].inputs[1].shape[1])
        present = slice(0, tokens_in.shape[1] - capacity + len(given) + 1)  # behind the one padding point: absent
        boxes = {"step2_box": trace["step3_box"][0]}  # the box of the second call's mask, given to the third
        return (
            found
            | shot_of(trace, "step1", "step2", "step3")
            | boxes
            | {
                "query_resized": fitted,
                "target_embedding": state.tensors["target_embedding"][None, None],
                "target_feat": states["target_feat"],
                "query_features": trace["query_features"][0],
                "sim_cells": trace["sim_cells"][0],
                "sim_picture": trace["sim_picture"][0],
                "positive_point": best,
                "negative_point": worst,
                "point_values": located.at(np.concatenate([best, worst])[None])[0],
                "attn_sim": trace["attention_bias"][:, None, None],
                "step1_tokens_in": tokens_in[:, present],
                "step1_tokens_out": tokens_out[:, present],
                "final_mask": logits[0] > 0,
            }
        )

    def finetune(self) -> Arrays:
        found, state = self.support({})
        query = self.system.encode([self.inputs["query_picture"]])
        trace: Arrays = {}
        masks = self.system.segment(query, {"object": state}, trace)
        where = query.placements[0]
        return (
            found
            | shot_of(trace, "step2", "step3")
            | {
                "target_feat": state.tensors["target_feat"][None],
                "weights_final": state.tensors["mask_weights"][:, None],
                "query_sim_cells": trace["sim_cells"][0],
                "query_point": trace["points"][0],
                "mixed_low_logits": trace["mixed_low_logits"][0],
                "mixed_mask": to_picture(trace["mixed_low_logits"], where)[0] > 0,
                "final_mask": masks.binary(0, "object"),
            }
        )

    def video(self) -> Arrays:
        config = self.config
        assert config["box_prompt"] and config["large"] and config["center"]
        options = VideoOptions(config["topk"], config["threshold"], config["exp"])
        trace: Arrays = {}
        frames = self.inputs["frames"]
        tracker = VideoTracker(self.system, frames[0], list(self.inputs["first_masks"] > 0), options, trace)
        found = {f"object{number}_feature": steps["feature"][None] for number, steps in enumerate(trace["objects"])}
        for index, frame in enumerate(frames[1:], 1):
            steps: Arrays = {}
            found[f"frame{index}_labels"] = tracker.track(frame, steps)
            for name, rows in steps.items():
                for number, row in enumerate(rows):
                    found[f"frame{index}_object{number}_{name}"] = np.atleast_1d(row)
        return found


def shot_of(trace: Arrays, *steps: str) -> Arrays:
    """What decoder calls returned for the only class."""
    rows = {name: rows[0] for name, rows in trace.items() if name.startswith(steps)}
    return {name: np.atleast_1d(row) for name, row in rows.items()}


def assert_matches(name: str, got: np.ndarray, expected: np.ndarray, compare: dict[str, Any]) -> None:
    kind = compare["kind"]
    if kind == "close":
        np.testing.assert_allclose(got, expected, rtol=compare["rtol"], atol=compare["atol"], err_msg=name)
    elif kind == "equal":
        np.testing.assert_array_equal(got, expected, err_msg=name)
    elif kind == "set":
        rows = [sorted(map(tuple, np.reshape(each, (len(each), -1)).tolist())) for each in (got, expected)]
        assert rows[0] == rows[1], name
    elif kind == "iou":
        for label in np.union1d(np.unique(got), np.unique(expected)):
            mine, theirs = got == label, expected == label
            assert (mine & theirs).sum() >= compare["min"] * (mine | theirs).sum(), f"{name}, label {label}"
    else:
        raise AssertionError(f"stage {name}: a comparison '{kind}' is not known")


@pytest.mark.parametrize("folder", golden_cases("persam"), ids=lambda folder: f"persam-{folder.name}")
def test_every_stage_equals_the_original(folder: Path) -> None:
    recorded = Recorded(folder)
    pipelines = {"one_shot": recorded.one_shot, "finetune": recorded.finetune, "video": recorded.video}
    found = pipelines[recorded.config["pipeline"]]()

    assert recorded.case["stages"], "the case records no stage"
    for stage in recorded.case["stages"]:
        name = stage["name"]
        assert name in found, f"stage {name} of the case is not computed here"
        assert list(np.shape(found[name])) == stage["shape"], name
        assert_matches(name, np.asarray(found[name]), recorded.expected[name], stage["compare"])
