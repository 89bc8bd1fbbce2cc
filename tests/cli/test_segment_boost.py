"""`fssdeploy segment` and `evaluate` with training-free systems: --system, --boost gsm, --explain."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from fssdeploy import data, shipped
from fssdeploy.artifact import load
from fssdeploy.batch import run as batch_run
from fssdeploy.engines.onnxruntime import OnnxRuntimeEngine
from fssdeploy.evaluation.predictors import CachedEncoder, StagedPredictor
from fssdeploy.export.artifact import ExportRequest, export_artifact
from fssdeploy.glue.gfsam.system import GFSam
from fssdeploy.glue.gsm.hosts import gsm
from fssdeploy.glue.gsm.options import GsmOptions
from fssdeploy.images.mark import is_marked
from fssdeploy.images.masks import load_mask
from fssdeploy.images.pictures import load_picture
from fssdeploy.modules.dinov2 import ViTConfig
from fssdeploy.modules.sam import SamConfig
from fssdeploy.systems import get_system, gfsam
from fssdeploy.weights.gfsam import fill
from tests.batch.jobs import in_process
from tests.cli.command import Answer, fssdeploy
from tests.evaluation.squares import Squares

if TYPE_CHECKING:
    from tests.cli.conftest import Workplace

SMALL = gfsam.GFSamConfig(
    encoder=ViTConfig(32, 2, 2, patch=4, table=6),
    sam=SamConfig(
        32, 2, 2, (1,), image_size=64, patch=8, window=3, out=32, decoder_heads=2, decoder_mlp=48, iou_hidden=24,
        mask_channels=4,
    ),
    image_size=48,
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``artifacts/gfsam-tiny`` is a small GF-SAM with seeded weights."""
    model = gfsam.build(SMALL)
    provenance = fill(model, [], untrained_seed=0)
    folder = tmp_path_factory.mktemp("home")
    out = folder / "artifacts" / "gfsam-tiny"
    export_artifact(model, provenance, ExportRequest(get_system("gfsam"), "tiny", SMALL), out)
    return folder


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def segment(workplace: Workplace, out: Path, *arguments: object) -> Answer:
    support = f"{workplace.first}:{workplace.mask}"
    return fssdeploy(
        "segment", "--support", support, "--query", workplace.second, "-o", out, "--threads", 1, *arguments
    )


def read_mask(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)) == 255


@pytest.mark.parametrize("settings", [{}, {"qsm": False, "gain": 2.0, "regions": 3, "evidence": "aligned"}])
def test_masks_are_those_of_the_api(workplace: Workplace, tmp_path: Path, settings: dict[str, Any]) -> None:
    given = [text for name, value in settings.items() for text in ("--boost-set", f"{name}={value}".lower())]
    answer = segment(workplace, tmp_path, "--system", "gfsam", "--boost", "gsm", *given, "--json")
    assert answer.code == 0 and answer.err == "", answer.err
    options = GsmOptions(**settings)
    system = gsm(load("artifacts/gfsam-tiny", threads=1), options)
    state = system.enroll(system.encode([load_picture(workplace.first)]), [load_mask(str(workplace.mask), (90, 120))])
    masks = system.segment(system.encode([load_picture(workplace.second)]), {"object": state})
    np.testing.assert_array_equal(read_mask(tmp_path / "second.object.png"), masks.binary(0, "object"))
    expected = {"name": "gsm", **options.to_dict()}
    assert answer.json["boost"] == json.loads((tmp_path / "masks.json").read_text())["info"]["boost"] == expected
    assert "UNTRAINED" in answer.json["notes"][0]


def test_without_a_boost_nothing_of_it_is_written(workplace: Workplace, tmp_path: Path) -> None:
    answer = segment(workplace, tmp_path, "artifacts/gfsam-tiny", "--json")
    assert answer.code == 0 and "boost" not in answer.json
    assert "boost" not in json.loads((tmp_path / "masks.json").read_text())["info"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "masks.json",
        "second.object.png",
        "second.overlay.jpg",
    ]


def test_a_system_that_is_not_exported_names_the_command(workplace: Workplace, tmp_path: Path) -> None:
    line = segment(workplace, tmp_path / "out", "--system", "matcher").check_refused("artifact_missing", 3)
    assert line.endswith("Run: fssdeploy export matcher") and "artifacts/matcher-tiny" in line
    assert not (tmp_path / "out").exists()


def test_an_artifact_of_another_system(workplace: Workplace, tmp_path: Path) -> None:
    answer = segment(workplace, tmp_path / "out", workplace.artifact, "--system", "gfsam")
    assert "it is 'fsdino'" in answer.check_refused("artifact_system", 3)


def test_a_system_that_cannot_be_boosted(workplace: Workplace, tmp_path: Path) -> None:
    answer = segment(workplace, tmp_path / "out", workplace.artifact, "--boost", "gsm")
    assert "gfsam or matcher" in answer.check_refused("boost_unsupported", 3)
    arguments = ["--dataset", "shapes-5i", "--artifact", workplace.artifact, "--boost", "gsm", "-o", tmp_path / "out"]
    fssdeploy("evaluate", "fsdino", *arguments).check_refused("boost_unsupported", 3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--boost", "gms"], "boost_unknown", "Choose gsm."),
        (["--boost-set", "qsm=false"], "usage", "Add --boost gsm."),
        (["--boost", "gsm", "--boost-set", "edges=4"], "option_unknown", "connectivity, edge_cells"),
        (["--boost", "gsm", "--boost-set", "regions=2.5"], "option_unknown", "a whole number"),
        (["--boost", "gsm", "--boost-set", "tsr=maybe"], "option_unknown", "true or false"),
        (["--boost", "gsm", "--boost-set", "tsr"], "option_unknown", "true or false"),
        (["--boost", "gsm", "--boost-set", "temperature=inf"], "option_unknown", "a number"),
        (["--boost", "gsm", "--boost-set", "gain=nan"], "option_unknown", "'auto'"),
        (["--boost", "gsm", "--boost-set", "broadcast=sideways"], "option_unknown", "product"),
        (["--boost", "gsm", "--boost-set", "tsr=false"], "option_unknown", "Switch tsr on."),
    ],
)
def test_boosts_that_are_refused(
    workplace: Workplace, tmp_path: Path, arguments: list[str], code: str, said: str
) -> None:
    answer = segment(workplace, tmp_path / "out", "--system", "gfsam", *arguments)
    assert said in answer.check_refused(code, 3)
    assert not (tmp_path / "out").exists()


def test_what_gsm_left_out_is_in_the_notes(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GFSam, "finish", lambda self, query, maps, trace: np.full((64, 64), -9, np.float32))
    more = ["--query", workplace.first, "--json"]
    answer = segment(workplace, tmp_path, "--system", "gfsam", "--boost", "gsm", *more)
    (note,) = [each for each in answer.json["notes"] if each.startswith("Left out by gsm")]
    assert note.startswith("Left out by gsm in 2 of 2 masks - TSR: the proxy mask has no foreground cell")
    assert [list(each["skipped"]) for each in answer.json["pictures"]] == [["object"], ["object"]]


def test_explain_writes_a_figure_for_every_picture_and_class(workplace: Workplace, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    for name in ("disc", "explain"):
        arguments = ["--image", workplace.first, "--mask", workplace.mask, "--bank", bank]
        assert fssdeploy("enroll", "artifacts/gfsam-tiny", name, *arguments).code == 0
    out, plain = tmp_path / "out", tmp_path / "plain"
    arguments = ["artifacts/gfsam-tiny", workplace.first, workplace.second, "--bank", bank, "--boost", "gsm"]
    answer = fssdeploy("segment", *arguments, "--explain", "-o", out, "--json")
    assert answer.code == 0, answer.err
    for picture, stem in zip(answer.json["pictures"], ("first", "second"), strict=True):
        names = picture["written"]["explain"]
        assert names == {"disc": f"{stem}.disc.explain.png", "explain": f"{stem}.%65xplain.explain.png"}
        for name in names.values():
            assert is_marked(out / name) and Image.open(out / name).width > 1000
    assert fssdeploy("segment", *arguments, "-o", plain).code == 0
    for name in ("first.disc.png", "second.disc.png", "second.labels.png"):
        assert (out / name).read_bytes() == (plain / name).read_bytes()
    assert not list(plain.glob("*.explain.png"))


def test_explain_of_a_system_without_a_trace(workplace: Workplace, tmp_path: Path) -> None:
    answer = segment(workplace, tmp_path, workplace.artifact, "--explain", "--class", "my thing")
    assert answer.code == 0, answer.err
    assert Image.open(tmp_path / "second.my thing.explain.png").height > 600  # two rows of panels


@pytest.fixture
def squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "open_dataset", lambda name, root: Squares())


def evaluate(*arguments: object) -> Answer:
    fixed = ["--dataset", "squares", "--fold", 0, "--shot", 2, "--episodes", 3, "--threads", 1]
    return fssdeploy("evaluate", "gfsam", *fixed, *arguments)


@pytest.mark.usefixtures("squares")
def test_evaluate_boosted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = ["--artifact", "artifacts/gfsam-tiny"]
    plain, same, boosted, other = (
        evaluate(*artifact, *more, "--json").json
        for more in (
            [],
            ["--boost", "gsm", "--boost-set", "tsr=false", "--boost-set", "qsm=false", "--boost-set", "rr=false"],
            ["--boost", "gsm", "-o", tmp_path / "kept"],
            ["--boost", "gsm", "--boost-set", "regions=4"],
        )
    )
    assert plain["miou"] == same["miou"]  # the host itself
    assert len({each["system"]["fingerprint"] for each in (plain, same, boosted, other)}) == 4
    assert "boost" not in plain["system"]
    assert boosted["system"]["name"] == "gfsam-tiny+gsm"
    assert boosted["system"]["boost"] == {"name": "gsm", **GsmOptions().to_dict()}
    assert other["system"]["boost"]["regions"] == 4
    text = evaluate(*artifact, "--boost", "gsm", "--boost-set", "regions=4")
    assert "gsm, regions=4" in text.out
    line = evaluate(*artifact, "--boost", "gsm", "--boost-set", "regions=4", "-o", tmp_path / "kept")
    line.check_refused("evaluation_of_other", 3)

    monkeypatch.setitem(gfsam.PRESETS, "tiny", SMALL)
    monkeypatch.setattr(shipped, "checkpoint", lambda name: None)
    torch = evaluate("--untrained", "--boost", "gsm", "--json").json
    assert torch["miou"] == pytest.approx(boosted["miou"], abs=0.5) and torch["system"]["runtime"] == "torch"


@pytest.mark.usefixtures("squares")
def test_priors_need_tokens() -> None:
    answer = evaluate("--artifact", "artifacts/gfsam-tiny", "--priors")
    assert "--priors" in answer.check_refused("priors_unsupported", 3)


def test_a_picture_goes_through_both_encoders_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: Counter[str] = Counter()
    original = OnnxRuntimeEngine.run

    def counting(self: OnnxRuntimeEngine, stage: str, inputs: Any) -> dict[str, np.ndarray]:
        ran[stage] += 1
        return original(self, stage, inputs)

    monkeypatch.setattr(OnnxRuntimeEngine, "run", counting)
    encoder = CachedEncoder(load("artifacts/gfsam-tiny", threads=1))
    squares = Squares()
    (first, mask), (second, other), (query, _) = (squares.load(item, 0) for item in ("0-1", "0-2", "0-3"))
    supports = [(first, mask == 1), (second, other == 1)]
    host = StagedPredictor(encoder, "gfsam", "1")
    boosted = StagedPredictor(encoder, "gfsam+gsm", "2", GsmOptions())
    for predictor in (host, boosted):
        predictor.predict(supports, query, "red")
    assert (ran["encoder"], ran["sam_encoder"]) == (3, 1)
    # A query becomes one of the supports, beside one that has no embedding; then a support becomes the query.
    boosted.predict([(first, mask == 1), (query, mask == 1)], second, "red")
    boosted.predict(supports, query, "red")
    assert (ran["encoder"], ran["sam_encoder"]) == (3, 2)


def test_a_boosted_batch_writes_the_masks_of_segment(workplace: Workplace, tmp_path: Path) -> None:
    bank, artifact = tmp_path / "bank", "artifacts/gfsam-tiny"
    given = ["--image", workplace.first, "--mask", workplace.mask, "--bank", bank]
    assert fssdeploy("enroll", artifact, "disc", *given).code == 0
    boost = ["--bank", bank, "--boost", "gsm", "--boost-set", "regions=3", "--threads", 1]
    pictures = [workplace.first, workplace.second]
    assert fssdeploy("segment", artifact, *pictures, *boost, "-o", tmp_path / "one").code == 0
    batch = ["batch", "segment", *pictures, "--artifact", artifact, "--workers", 1, "-o", tmp_path / "many"]
    answer = fssdeploy(*batch, *boost, "--json")
    assert answer.code == 0, answer.err
    for name in ("first.disc.png", "second.disc.png"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    told = [json.loads((tmp_path / out / "masks.json").read_text())["info"]["boost"] for out in ("one", "many")]
    assert told[0] == told[1] and told[1]["regions"] == 3
    other = [*batch, "--bank", bank, "--boost", "gsm", "--threads", 1]
    assert fssdeploy(*other).code == 3  # its directory holds the masks of another boost


def test_a_batch_of_a_system_that_cannot_be_boosted(workplace: Workplace, tmp_path: Path) -> None:
    arguments = ["--artifact", workplace.artifact, "--bank", tmp_path / "bank", "-o", tmp_path / "out"]
    answer = fssdeploy("batch", "segment", workplace.first, *arguments, "--boost", "gsm")
    assert "gfsam or matcher" in answer.check_refused("boost_unsupported", 3)


@pytest.mark.usefixtures("squares")
def test_a_boosted_batch_evaluates_as_evaluate_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(batch_run.BACKENDS, "local", in_process)  # which knows the data set
    fixed = ["gfsam", "--dataset", "squares", "--fold", 0, "--shot", 2, "--episodes", 3, "--threads", 1]
    boost = ["--artifact", "artifacts/gfsam-tiny", "--boost", "gsm", "--boost-set", "regions=4", "--json"]
    alone = fssdeploy("evaluate", *fixed, *boost).json
    shared = fssdeploy("batch", "evaluate", *fixed, *boost, "--workers", 1, "-o", tmp_path).json
    assert shared["miou"] == alone["miou"]
    assert (
        shared["system"]["fingerprint"] == alone["system"]["fingerprint"] and shared["system"]["boost"]["regions"] == 4
    )
