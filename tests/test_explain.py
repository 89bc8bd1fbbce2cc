"""The figure of a mask: its panels hold what the trace holds, in the right place, for every system."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from fssdeploy import explain
from fssdeploy.engines.torch import TorchEngine
from fssdeploy.explain import SIDE, figure
from fssdeploy.glue.gfsam.system import GFSam
from fssdeploy.glue.gsm.hosts import gsm
from fssdeploy.glue.gsm.options import ABLATION, GsmOptions
from fssdeploy.glue.matcher.options import OPTIONS
from fssdeploy.glue.matcher.system import Matcher
from fssdeploy.glue.persam.options import PerSamOptions
from fssdeploy.glue.persam.system import PerSam
from fssdeploy.images.colours import class_colour
from fssdeploy.images.geometry import place
from fssdeploy.modules.dinov2 import ViTConfig
from fssdeploy.modules.sam import SamConfig
from fssdeploy.systems import gfsam, matcher, persam

ENCODER = ViTConfig(32, 2, 2, patch=4, table=6)
SAM = SamConfig(
    32, 2, 2, image_size=64, patch=8, window=3, global_blocks=(1,), out=32, decoder_heads=2, decoder_mlp=48,
    iou_hidden=24, mask_channels=4,
)  # fmt: skip
FEW = dataclasses.replace(OPTIONS["fss"], sample_range=(1, 3), max_sample_iterations=4)
CONFIGS: dict[str, tuple[Any, Any, Any]] = {
    "gfsam": (gfsam, GFSam, gfsam.GFSamConfig(ENCODER, SAM, image_size=48)),
    "matcher": (matcher, Matcher, matcher.MatcherConfig(ENCODER, SAM, image_size=24, options=FEW)),
    "persam": (persam, PerSam, persam.PerSamConfig(SAM)),
    "persam_f": (persam, PerSam, persam.PerSamConfig(SAM, options=PerSamOptions(variant="persam_f", steps=3))),
}
Captions = list[tuple[str, list[str]]]


def system(name: str) -> Any:
    module, opened, config = CONFIGS[name]
    model = module.build(config)
    module.initialise_untrained(model, 3)
    specs = module.specs(config)
    engine = TorchEngine(module.reference_stages(model), specs)
    return opened(name, specs, engine, module.preprocessing(config), "test")


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright rectangle somewhere on a textured ground, uint8 (60, 80, 3), and its mask."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 90, (60, 80, 3), np.uint8)
    mask = np.zeros((60, 80), bool)
    top, left = rng.integers(5, 25, 2)
    mask[top : top + 30, left : left + 40] = True
    picture[mask] += np.uint8(150)
    return picture, mask


def explained(opened: Any, monkeypatch: pytest.MonkeyPatch, shots: int = 1, shown: int | None = None) -> Captions:
    """Headings and captions of the figure of a query; the figure must be a picture of sensible size."""
    rows: Captions = []
    original = explain._section

    def listening(heading: str, panels: Any) -> np.ndarray:
        rows.append((heading, [caption for _, caption in panels]))
        return original(heading, panels)

    monkeypatch.setattr(explain, "_section", listening)
    supports = [scene(seed) for seed in range(shots)]
    state = opened.enroll(opened.encode([each for each, _ in supports]), [mask for _, mask in supports])
    query = scene(10)[0]
    features = opened.encode([query])
    trace: dict[str, Any] = {}
    masks = opened.segment(features, {"it": state}, trace)
    drawn = figure(
        "a title", query, features.placements[0], supports[:shown], masks.binary(0, "it"), masks.prior[0]["it"], trace
    )
    assert drawn.dtype == np.uint8 and drawn.shape[2] == 3
    assert drawn.shape[0] > len(rows) * SIDE * 60 / 80 and drawn.shape[1] > SIDE * max(len(each) for _, each in rows)
    return rows


def starts(captions: list[str]) -> list[str]:
    return [caption.split(":")[0] for caption in captions]


def test_gfsam(monkeypatch: pytest.MonkeyPatch) -> None:
    (title, first), (_, maps), (_, masks) = explained(system("gfsam"), monkeypatch)
    assert title == "a title" and starts(first) == ["support 1 of 1", "query", "answer"]
    assert starts(maps)[:3] == ["S+", "S-", "prior"] and "kept" in maps[3]
    assert masks[0].startswith("all ") and masks[-1] == "final mask" and 3 <= len(masks) <= 6


def test_gfsam_boosted(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = explained(gsm(system("gfsam")), monkeypatch, shots=5)
    headings = [heading.split(":")[0] for heading, _ in rows]
    assert headings == ["a title", "Host", "Host", "GSM", "Second pass", "Second pass"]
    assert starts(rows[0][1]) == ["support 1 of 5", "support 2 of 5", "support 3 of 5", "query", "answer"]
    assert rows[2][1][-1] == "the host's answer" and rows[5][1][-1] == "final mask"
    expected = ["regions of the picture", "S+ less S-", "mined regions", "mined object", "both agree"]
    assert starts(rows[3][1]) == expected


def test_a_boost_that_changes_nothing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = explained(gsm(system("gfsam"), GsmOptions(**ABLATION["A"])), monkeypatch, shown=0)
    assert starts(rows[0][1]) == ["query", "answer"]  # enrolled elsewhere: no support to show
    assert rows[-1] == ("GSM: no map changed, the host's answer stands", ["final mask"])


def test_what_gsm_left_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    host = system("gfsam")
    monkeypatch.setattr(host, "finish", lambda query, maps, trace: np.full((64, 64), -9, np.float32))
    rows = explained(gsm(host), monkeypatch)
    assert "\nLeft out - TSR: the proxy mask has no foreground cell" in rows[-1][0]


def test_matcher(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (_, maps), (_, masks) = explained(system("matcher"), monkeypatch)
    assert starts(maps)[0] == "S+, the prior" and maps[1].endswith(" matched points")
    assert masks[0].startswith("all ") and "score" in masks[1] and masks[-1] == "final mask"
    boosted = explained(gsm(system("matcher")), monkeypatch)
    assert [heading.split(":")[0] for heading, _ in boosted][-3:] == ["GSM", "Second pass", "Second pass"]


@pytest.mark.parametrize(("name", "first"), [("persam", "step 1: guided"), ("persam_f", "step 1: three scales, mixed")])
def test_persam(monkeypatch: pytest.MonkeyPatch, name: str, first: str) -> None:
    _, (_, maps), (_, masks) = explained(system(name), monkeypatch)
    assert starts(maps)[0] == "S+, the prior" and len(maps) == 2
    assert masks[0] == first and starts(masks)[1:] == ["step 2", "step 3", "final mask"]


def test_a_system_without_a_trace() -> None:
    picture, mask = scene(0)
    bare = figure("t", picture, place(60, 80, 32, "squash"), [], mask, None, {})
    prior = figure("t", picture, place(60, 80, 32, "squash"), [], mask, np.eye(8, dtype=np.float32), {})
    assert 0 < len(bare) < len(prior)


@pytest.mark.parametrize("geometry", ["squash", "letterbox"])
def test_cells_and_points_come_to_lie_where_they_are(geometry: str) -> None:
    """A picture of 60 x 120 on a canvas of 8 x 8 cells of 8 pixels: the letterbox fills the upper half."""
    picture = np.zeros((60, 120, 3), np.uint8)
    view = explain._View.of(picture, place(60, 120, 64, geometry))
    assert view.picture.shape == (150, 300, 3)
    cells = np.arange(64, dtype=np.float32)
    spread = view.spread(cells)
    last = 63 if geometry == "squash" else 31
    assert (spread[0, 0], spread[0, -1], spread[-1, -1]) == (0, 7, last)
    corner = view.on_panel(np.array([[64, 64 if geometry == "squash" else 32]]))
    np.testing.assert_allclose(corner, [[300, 150]])
    bright, caption = view.heat(cells, "map")
    assert caption == f"map: 0 to {last}"
    assert bright[-1, -1].sum() > bright[0, 0].sum()
    dotted = view.dots([(np.array([[150.0, 75.0]]), class_colour(2))])
    assert tuple(dotted[75, 150]) == class_colour(2) and not dotted[75, 170].any()


def test_a_flat_map_and_pictures_of_any_form() -> None:
    for height, width in ((1, 700), (700, 1), (1, 1), (900, 1600)):
        where = place(height, width, 64, "squash")
        drawn = figure(
            "t",
            np.zeros((height, width, 3), np.uint8),
            where,
            [],
            np.zeros((height, width), bool),
            np.ones((4, 4), np.float32),
            {},
        )
        assert drawn.shape[2] == 3 and drawn.shape[1] < 3 * SIDE


def test_neither_torch_nor_matplotlib_is_needed() -> None:
    code = "import sys, fssdeploy.explain; sys.exit(int(any(n in sys.modules for n in ('torch', 'matplotlib'))))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
