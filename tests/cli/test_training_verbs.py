"""`fssdeploy pretrain`, `distill`, `train`: each feeds the next, goes on where it stopped, says what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fssdeploy.systems import fsdino
from fssdeploy.training.loop import LOG, read_log
from fssdeploy.weights.checkpoint import Checkpoint, read_checkpoint
from fssdeploy.weights.fsdino import fill
from tests.cli.command import Answer, fssdeploy

ROOT = Path(__file__).parents[2]
QUICK = ["--threads", 1, "--workers", 0, "--log-every", 1, "--save-every", 2, "--json"]
SIZE = ["--model", "image_size=28", "--phases", "2x2x28"]


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pretrain(out: Path, *arguments: object) -> Answer:
    return fssdeploy("pretrain", "dino", "--pictures", 6, "--phases", "2x2x28", "--out", out, *QUICK, *arguments)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Answer]]:
    """The four steps of docs/training.md, two training steps each."""
    runs = tmp_path_factory.mktemp("runs")
    encoder, sam, adapter = (
        runs / "dino/encoder.safetensors",
        runs / "sam/sam.safetensors",
        runs / "distill/adapter.safetensors",
    )
    few = ["--pictures", 6]
    answers = {"dino": pretrain(runs / "dino")}
    answers["sam"] = fssdeploy("pretrain", "sam", *few, "--phases", "2x1x208", "--out", runs / "sam", *QUICK)
    teacher = ["--encoder", encoder, "--teacher", sam]
    answers["distill"] = fssdeploy("distill", "fsdino", *few, *SIZE, *teacher, "--out", runs / "distill", *QUICK)
    weights = [part for file in (encoder, sam, adapter) for part in ("--weights", file)]
    answers["train"] = fssdeploy("train", "fsdino", *SIZE, *weights, "--out", runs / "train", *QUICK)
    return runs, answers


def test_the_chain_of_verbs(chain: tuple[Path, dict[str, Answer]]) -> None:
    runs, answers = chain
    for verb, answer in answers.items():
        assert answer.code == 0 and answer.err == "", (verb, answer.err)
        report = answer.json
        assert (report["steps"], report["skipped"]) == (2, 0)
        assert Path(report["weights"]).parent == Path(report["plot"]).parent == runs / verb
        assert Image.open(report["plot"]).size[0] > 500
        log = read_log(runs / verb)
        assert [line["step"] for line in log] == [1, 2]
        assert report["loss"] == log[-1]["loss"]


def test_the_result_holds_what_it_was_made_of(chain: tuple[Path, dict[str, Answer]]) -> None:
    """Frozen encoder and adapter are those that were given; the settings and the sources are in the file."""
    runs, _ = chain
    end: Checkpoint = read_checkpoint(runs / "train/fsdino.safetensors")
    encoder = read_checkpoint(runs / "dino/encoder.safetensors")
    adapter = read_checkpoint(runs / "distill/adapter.safetensors")
    for name, tensor in encoder.tensors.items():
        assert torch.equal(end.tensors[f"encoder.{name}"], tensor), name
    for name, tensor in adapter.tensors.items():
        assert torch.equal(end.tensors[name], tensor), name
    settings = json.loads(end.metadata["settings"])
    sam = read_checkpoint(runs / "sam/sam.safetensors")
    assert settings["weights"] == [encoder.sha256, sam.sha256, adapter.sha256]
    assert (settings["dataset"], settings["fold"], settings["recipe"]) == ("shapes-5i", 0, "train fsdino")
    decoder = "decoder.transformer.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(end.tensors[decoder], sam.tensors[f"mask_{decoder}"])

    model = fsdino.build(fsdino.FSDinoConfig.from_dict(settings["config"]))
    assert fill(model, [runs / "train/fsdino.safetensors"], None).status == "trained"


def test_a_finished_run_says_so_again(chain: tuple[Path, dict[str, Answer]]) -> None:
    runs, answers = chain
    before = read_checkpoint(runs / "dino/encoder.safetensors").tensors
    again = pretrain(runs / "dino")
    assert again.code == 0 and again.json["steps"] == 0
    assert again.json["loss"] == answers["dino"].json["loss"]
    after = read_checkpoint(runs / "dino/encoder.safetensors").tensors
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_sam_continues_another_with_every_mask_taught(chain: tuple[Path, dict[str, Answer]], tmp_path: Path) -> None:
    """It begins with the weights that are given, and the settings say so."""
    runs, _ = chain
    begin = read_checkpoint(runs / "sam/sam.safetensors")
    arguments = ["--pictures", 6, "--phases", "2x1x208", "--weights", begin.file, *QUICK]
    found = {}
    for name, flags in (("every", ["--every-mask"]), ("usual", [])):
        answer = fssdeploy("pretrain", "sam", *arguments, *flags, "--out", tmp_path / name)
        assert answer.code == 0, answer.err
        found[name] = read_checkpoint(tmp_path / name / "sam.safetensors")
    settings = json.loads(found["every"].metadata["settings"])
    assert settings["every_mask"] is True and settings["weights"] == begin.sha256
    single = "mask_decoder.output_hypernetworks_mlps.0.layers.2.weight"
    for each in found.values():
        assert not torch.equal(each.tensors[single], begin.tensors[single])
        near = (each.tensors[single] - begin.tensors[single]).abs().max()
        assert near < 0.1  # it began there, and not at random
    assert found["every"].metadata["settings"] != found["usual"].metadata["settings"]


def test_text_for_people(tmp_path: Path) -> None:
    arguments = [each for each in QUICK if each != "--json"]
    answer = fssdeploy("pretrain", "dino", "--pictures", 3, "--phases", "1x1x28", "--out", tmp_path / "run", *arguments)
    assert answer.code == 0, answer.err
    for words in ("pretrain dino", "encoder.safetensors", "examples skipped", "last loss", "run.png"):
        assert words in answer.out


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code", "named"),
    [
        (["--seed", 1], "other_settings", 3, "seed is 0 there, 1 here"),
        (["--set", "rate=0.5"], "other_settings", 3, "rate is "),
        (["--fold", 1], "other_settings", 3, "fold is 0 there, 1 here"),
        (["--phases", "3x2x28"], "other_settings", 3, "phases is "),
        (["--phases", "nonsense"], "phases", 3, "nonsense"),
        (["--phases", "2x2x30"], "phases", 3, "30 pixels"),
        (["--set", "speed=2"], "option_unknown", 3, "speed"),
        (["--set", "rate=fast"], "option_unknown", 3, "fast"),
        (["--set", "accumulate=0"], "setting", 3, "accumulate"),
        (["--set", "accumulate=3"], "batch", 3, "a batch of 2"),
        (["--set", "precision=fp8"], "precision", 3, "fp8"),
        (["--fold", 9], "fold_unknown", 3, "9"),
        (["--pictures", 0], "no_pictures", 3, ""),
        (["--preset", "giant"], "preset_unknown", 3, "giant"),
        (["--dataset", "nothing"], "dataset_unknown", 3, "nothing"),
        (["--threads", 0], "usage", 3, "--threads"),
        (["--log-every", 0], "usage", 3, "--log-every"),
        (["--workers", -1], "usage", 3, "--workers"),
    ],
)
def test_refusals(
    chain: tuple[Path, dict[str, Answer]], arguments: list[object], code: str, exit_code: int, named: str
) -> None:
    run = chain[0] / "dino"
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert named in pretrain(run, *arguments).check_refused(code, exit_code)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_refusal_leaves_no_folder_behind(tmp_path: Path) -> None:
    pretrain(tmp_path / "new/run", "--set", "accumulate=0").check_refused("setting", 3)
    assert not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_is_exit_code_5(tmp_path: Path) -> None:
    assert pretrain(tmp_path).code == 0
    data = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(data[: len(data) // 2])
    pretrain(tmp_path).check_refused("checkpoint_damaged", 5)


def test_what_the_other_verbs_refuse(chain: tuple[Path, dict[str, Answer]], tmp_path: Path) -> None:
    runs, _ = chain
    encoder, sam = runs / "dino/encoder.safetensors", runs / "sam/sam.safetensors"
    out = ["--out", tmp_path / "run", *QUICK]
    train = ["train", "fsdino", "--weights", encoder, *out]
    fssdeploy(*train, *SIZE).check_refused("weights_missing", 3)  # an adapter is not to be trained from scratch
    fssdeploy(*train, "--weights", runs / "nowhere").check_refused("file_missing", 3)
    fssdeploy(*train, "--recipe", "secret").check_refused("option_unknown", 3)
    fssdeploy("train", "matcher", "--weights", encoder, *out).check_refused("system_unknown", 3)
    adapter = ["--weights", runs / "distill/adapter.safetensors"]
    fssdeploy(*train, *adapter, *SIZE, "--phases", "2x2x56").check_refused("phases", 3)
    distill = ["distill", "fsdino", *SIZE, *out]
    fssdeploy(*distill, "--encoder", sam, "--teacher", sam).check_refused("checkpoint_architecture", 3)
    fssdeploy(*distill, "--encoder", encoder, "--teacher", encoder).check_refused("checkpoint_architecture", 3)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """A class in a folder; one picture of eight is cut short."""
    rng = np.random.default_rng(0)
    mask = np.zeros((30, 40), np.uint8)
    mask[5:20, 10:30] = 1
    root = tmp_path / "data"
    for kind in ("images", "masks"):
        (root / "bolt" / kind).mkdir(parents=True)
    for index in range(8):
        picture = rng.integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(picture).save(root / "bolt/images" / f"p{index}.png")
        Image.fromarray(mask).save(root / "bolt/masks" / f"p{index}.png")
    damaged = root / "bolt/images/p3.png"
    damaged.write_bytes(damaged.read_bytes()[:900])
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_is_skipped_and_counted(own_data: Path, tmp_path: Path, workers: int) -> None:
    arguments = ["pretrain", "dino", "--dataset", "folder", "--data-dir", own_data, "--phases", "6x4x28", *QUICK]
    answers = [
        fssdeploy(*arguments, "--out", tmp_path / str(turn), "--workers", (workers, 0)[turn]) for turn in range(2)
    ]
    assert [answer.code for answer in answers] == [0, 0], answers[0].err
    assert answers[0].json["skipped"] == answers[1].json["skipped"] > 0
    assert answers[0].json["loss"] == answers[1].json["loss"]
    assert read_log(tmp_path / "0")[-1]["skipped"] == answers[0].json["skipped"]

    for path in (own_data / "bolt/images").iterdir():
        path.write_bytes(path.read_bytes()[:900])
    line = fssdeploy(*arguments, "--out", tmp_path / "none", "--workers", workers).check_refused("data_unusable", 3)
    assert "fssdeploy data check" in line


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs Gloo")
def test_torchrun_trains_as_one_process(tmp_path: Path) -> None:
    arguments = ["pretrain", "dino", "--pictures", 6, "--phases", "2x4x28", "--set", "precision=fp32", *QUICK]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "fssdeploy", *map(str, arguments), "--out", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    two = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert two.returncode == 0, two.stderr
    report = json.loads(two.stdout)  # the first process alone reports
    one = fssdeploy(*arguments, "--out", tmp_path / "one")
    assert one.code == 0, one.err
    assert report["loss"] == pytest.approx(one.json["loss"], rel=1e-4)
    logs = [[line["loss"] for line in read_log(tmp_path / out)] for out in ("two", "one")]
    assert len(logs[0]) == 2 and logs[0] == pytest.approx(logs[1], rel=1e-4)
    found, wanted = (read_checkpoint(tmp_path / out / "encoder.safetensors").tensors for out in ("two", "one"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)
    assert (tmp_path / "two" / LOG).exists()
