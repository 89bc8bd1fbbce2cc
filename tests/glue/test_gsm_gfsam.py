"""GSM around a small GF-SAM: rows that must be the host itself, and what the second pass does not compute again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from fssdeploy.engines.torch import TorchEngine
from fssdeploy.errors import FssError
from fssdeploy.glue.gfsam.system import GFSam
from fssdeploy.glue.gsm.hosts import gsm
from fssdeploy.glue.gsm.options import ABLATION, GsmOptions
from fssdeploy.glue.gsm.system import Gsm
from fssdeploy.modules.dinov2 import ViTConfig
from fssdeploy.modules.sam import SamConfig
from fssdeploy.protocol import ClassState, Features
from fssdeploy.systems import gfsam

CONFIG = gfsam.GFSamConfig(
    encoder=ViTConfig(32, 2, 2, patch=4, table=12),
    sam=SamConfig(
        32, 2, 2, image_size=64, patch=8, window=3, global_blocks=(1,), out=32, decoder_heads=2, decoder_mlp=48,
        iou_hidden=24, mask_channels=4,
    ),
    image_size=48,
    max_points=128,
)  # fmt: skip


class CountingEngine:
    """An engine that counts the rows of every stage."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine, self.rows = engine, Counter[str]()
        self.name, self.specs = engine.name, engine.specs

    def run(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.rows[stage] += len(next(iter(inputs.values())))
        return self.engine.run(stage, inputs)

    def describe(self) -> dict[str, Any]:
        return self.engine.describe()


@pytest.fixture(scope="module")
def host() -> GFSam:
    model = gfsam.build(CONFIG)
    gfsam.initialise_untrained(model, 3)
    specs = gfsam.specs(CONFIG)
    engine = CountingEngine(TorchEngine(gfsam.reference_stages(model), specs))
    return GFSam("gfsam", specs, engine, gfsam.preprocessing(CONFIG), "test")


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright rectangle somewhere on a textured ground, uint8 (60, 80, 3), and its mask."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 90, (60, 80, 3), np.uint8)
    mask = np.zeros((60, 80), bool)
    top, left = rng.integers(5, 25, 2)
    mask[top : top + 30, left : left + 40] = True
    picture[mask] += np.uint8(150)
    return picture, mask


@pytest.fixture(scope="module")
def classes(host: GFSam) -> dict[str, ClassState]:
    """A class of one shot and a class of three."""
    shots = [scene(seed) for seed in range(3)]
    features = host.encode([picture for picture, _ in shots])
    masks = [mask for _, mask in shots]
    return {"one": host.enroll(features[0], masks[:1]), "three": host.enroll(features, masks)}


def queries(host: GFSam) -> Features:
    return host.encode([scene(10)[0], scene(11)[0]])


def boosted(host: GFSam, row: str) -> Gsm[Any]:
    return gsm(host, GsmOptions(**ABLATION[row]))


@pytest.mark.parametrize(("row", "name"), [("A", "one"), ("A", "three"), ("D", "one")])
def test_rows_that_change_nothing_give_the_masks_of_the_host(
    host: GFSam, classes: dict[str, ClassState], row: str, name: str
) -> None:
    own = host.segment(queries(host), {name: classes[name]})
    ours = boosted(host, row).segment(queries(host), {name: classes[name]})
    for picture in range(2):
        np.testing.assert_array_equal(ours.logits[picture][name], own.logits[picture][name])
        np.testing.assert_array_equal(ours.prior[picture][name], own.prior[picture][name])


def test_five_shots_reweighed_and_proxies_change_the_prior(host: GFSam, classes: dict[str, ClassState]) -> None:
    own = host.segment(queries(host), {"three": classes["three"]})
    for row in ("B", "D", "F"):
        ours = boosted(host, row).segment(queries(host), {"three": classes["three"]})
        assert not np.array_equal(ours.prior[0]["three"], own.prior[0]["three"])


def test_the_second_pass_asks_sam_about_new_cells_only(host: GFSam, classes: dict[str, ClassState]) -> None:
    query = queries(host)[0]
    rows = host.engine.rows  # type: ignore[attr-defined]
    rows.clear()
    trace: dict[str, Any] = {}
    boosted(host, "F").segment(query, {"three": classes["three"]}, trace)
    assert "second_points_cell" in trace
    first, second = ({tuple(cell) for cell in trace[f"{step}points_cell"].tolist()} for step in ("", "second_"))
    compared = sum(len(classes["three"].tensors[name]) for name in ("positive", "negative", "object"))
    assert rows == {"affinity": compared, "sam_encoder": 1, "decoder": len(first | second)}
    assert len(first & second) > 0


def test_several_pictures_and_classes_are_encoded_once(host: GFSam, classes: dict[str, ClassState]) -> None:
    query = queries(host)
    rows = host.engine.rows  # type: ignore[attr-defined]
    rows.clear()
    system = boosted(host, "F")
    masks = system.segment(query, classes)
    again = system.segment(query, classes)
    assert (rows["encoder"], rows["sam_encoder"]) == (0, 2)
    assert masks.names == ["one", "three"] and len(masks.logits) == 2
    for picture in range(2):
        for name in classes:
            assert masks.logits[picture][name].shape == (60, 80)
            np.testing.assert_array_equal(masks.logits[picture][name], again.logits[picture][name])


def test_the_verbs_of_the_host_are_passed_on(host: GFSam, classes: dict[str, ClassState]) -> None:
    system = boosted(host, "F")
    assert (system.name, system.fingerprint) == ("gfsam+gsm", host.fingerprint)
    picture, mask = scene(0)
    features = system.encode([picture])
    state = system.enroll(features, [mask])
    for name, tensor in classes["one"].tensors.items():
        np.testing.assert_allclose(state.tensors[name], tensor, rtol=1e-5, atol=1e-6)
    with pytest.raises(FssError, match="no class"):
        system.segment(features, {})


def test_a_system_without_affinity_maps_is_refused() -> None:
    with pytest.raises(FssError, match="gfsam or matcher"):
        gsm(object())


def test_a_picture_of_one_colour_and_a_support_as_its_own_query(host: GFSam, classes: dict[str, ClassState]) -> None:
    flat = np.full((40, 50, 3), 120, np.uint8)
    trace: dict[str, Any] = {}
    masks = boosted(host, "F").segment(host.encode([flat, scene(0)[0]]), {"one": classes["one"]}, trace)
    assert all(np.isfinite(masks.logits[picture]["one"]).all() for picture in range(2))
    assert isinstance(trace["skipped"], list)
