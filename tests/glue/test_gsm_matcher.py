"""GSM around a small Matcher: rows that must be the host itself, weights of shots, the query matched with itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from fssdeploy.engines.torch import TorchEngine
from fssdeploy.glue.gfsam.maps import unit
from fssdeploy.glue.gsm.boost import Boosted
from fssdeploy.glue.gsm.hosts import gsm
from fssdeploy.glue.gsm.matcher import MatcherHost, match_itself
from fssdeploy.glue.gsm.options import ABLATION, GsmOptions
from fssdeploy.glue.gsm.system import Gsm
from fssdeploy.glue.matcher.options import OPTIONS
from fssdeploy.glue.matcher.system import Matcher
from fssdeploy.modules.dinov2 import ViTConfig
from fssdeploy.modules.sam import SamConfig
from fssdeploy.protocol import ClassState, Features
from fssdeploy.systems import matcher

CONFIG = matcher.MatcherConfig(
    ViTConfig(32, 2, 2, patch=4, table=6),
    SamConfig(
        32, 2, 2, image_size=64, patch=8, window=3, global_blocks=(1,), out=32, decoder_heads=2, decoder_mlp=48,
        iou_hidden=24, mask_channels=4,
    ),
    image_size=24,
    capacity=8,
    options=dataclasses.replace(OPTIONS["fss"], sample_range=(1, 3), max_sample_iterations=4),
)  # fmt: skip


def system(**changes: Any) -> Matcher:
    config = dataclasses.replace(CONFIG, **changes)
    model = matcher.build(config)
    matcher.initialise_untrained(model, 5)
    specs = matcher.specs(config)
    engine = TorchEngine(matcher.reference_stages(model), specs)
    return Matcher("matcher", specs, engine, matcher.preprocessing(config), "test")


@pytest.fixture(scope="module")
def host() -> Matcher:
    return system()


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright rectangle somewhere on a textured ground, uint8 (60, 80, 3), and its mask."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 90, (60, 80, 3), np.uint8)
    mask = np.zeros((60, 80), bool)
    top, left = rng.integers(5, 25, 2)
    mask[top : top + 30, left : left + 40] = True
    picture[mask] += np.uint8(150)
    return picture, mask


def enrolled(host: Matcher, shots: int) -> ClassState:
    scenes = [scene(seed) for seed in range(shots)]
    return host.enroll(host.encode([picture for picture, _ in scenes]), [mask for _, mask in scenes])


def query(host: Matcher) -> Features:
    return host.encode([scene(10)[0]])


def boosted(host: Matcher, row: str) -> Gsm[Any]:
    return gsm(host, GsmOptions(**ABLATION[row]))


@pytest.mark.parametrize(("row", "shots"), [("A", 1), ("A", 3), ("D", 1)])
def test_rows_that_change_nothing_give_the_masks_of_the_host(host: Matcher, row: str, shots: int) -> None:
    state = enrolled(host, shots)
    own = host.segment(query(host), {"object": state})
    ours = boosted(host, row).segment(query(host), {"object": state})
    np.testing.assert_array_equal(ours.logits[0]["object"], own.logits[0]["object"])


def test_several_pictures_and_classes_give_the_same_masks_again(host: Matcher) -> None:
    states = {"one": enrolled(host, 1), "two": enrolled(host, 2)}
    features = host.encode([scene(10)[0], scene(11)[0]])
    first, again = (boosted(host, "F").segment(features, states) for _ in range(2))
    for picture in range(2):
        for name in states:
            assert np.isfinite(first.logits[picture][name]).all()
            np.testing.assert_array_equal(first.logits[picture][name], again.logits[picture][name])


def test_the_proxy_brings_points_of_its_own(host: Matcher) -> None:
    trace: dict[str, Any] = {}
    boosted(host, "B").segment(query(host), {"object": enrolled(host, 1)}, trace)
    before, after = ({tuple(point) for point in trace[name].tolist()} for name in ("points", "second_points"))
    assert before < after


def test_flat_states_are_one_reference(host: Matcher) -> None:
    flat = system(kshot="flat")
    state = enrolled(flat, 3)
    adapter = MatcherHost(flat)
    affinity = adapter.affinity(adapter.queries(query(flat), None)[0], state, None)
    assert affinity.positive.shape == (1, flat.side**2)
    boosted(flat, "F").segment(query(flat), {"object": state})


def test_maps_are_mean_cosines(host: Matcher) -> None:
    state, features = enrolled(host, 2), query(host)
    adapter = MatcherHost(host)
    affinity = adapter.affinity(adapter.queries(features, None)[0], state, None)
    cosines = (state.tensors["features"] @ features.tensors["features"][0].T).reshape(2, host.side**2, -1)
    inside = state.tensors["foreground"].reshape(2, -1)
    for shot in range(2):
        np.testing.assert_allclose(affinity.positive[shot], cosines[shot][inside[shot]].mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(affinity.negative[shot], cosines[shot][~inside[shot]].mean(0), rtol=1e-4, atol=1e-5)


def test_a_shot_without_weight_gets_no_similarity(host: Matcher) -> None:
    state, cells = enrolled(host, 2), host.side**2
    maps = np.zeros(cells, np.float32)
    nobody = np.zeros(cells, bool)
    weights = np.array([1.0, 0.0])
    adapter = MatcherHost(host)
    trace: dict[str, Any] = {}
    unweighted: dict[str, Any] = {}
    target = adapter.queries(query(host), None)[0]
    for weight, kept in ((weights, trace), (np.array([0.5, 0.5]), unweighted)):
        adapter.second(target, state, Boosted(maps, maps, maps, weight, weight, nobody, nobody, True), kept)
    assert trace["emd"].shape and not np.array_equal(trace["emd"], unweighted["emd"])


def test_no_patch_is_matched_with_itself() -> None:
    rng = np.random.default_rng(0)
    target = unit(rng.standard_normal((36, 8)).astype(np.float32))
    foreground, background = np.zeros(36, bool), np.zeros(36, bool)
    foreground[:10], background[20:] = True, True
    matches = match_itself(target, foreground, background)
    np.testing.assert_allclose(matches.similarity[:, 10:], target[:10] @ target[10:].T, atol=1e-6)
    assert (matches.columns != matches.rows).all()
    taken = np.flatnonzero(foreground | background)[matches.back]
    assert (taken != matches.columns).all()
