"""Train the weights that come with the project, from nothing: encoder, SAM, adapter, segmenter, artifact, figures.

    .venv/bin/python tools/train_tiny.py [--work runs/tiny] [--ablation] [--prompted]

Fold 0 of shapes-5i is held out. Every stage continues where it was broken off. Results go to fssdeploy/shipped and
benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "fssdeploy" / "shipped"
RESULTS = ROOT / "benchmarks" / "results"
# Not the seed of the training pictures: shapes-5i draws other pictures for another seed.
EVALUATION_SEED = 1
# The paper's other version: our small SAM teaches the adapter too little to leave it as it is.
ADAPTER = ["--model", "train_adapter=true"]
PROMPTED = "5000x8x208"
ABLATION = {"ba-pcs": ["--variant", "compact", "--model", "svp=none"], "ba-svp-pcs": ["--variant", "compact"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "tiny", help="runs, caches, logs")
    parser.add_argument("--ablation", action="store_true", help="also train and measure the rows without 4D and SVP")
    parser.add_argument("--prompted", action="store_true", help="also train the SAM of the training-free systems")
    arguments = parser.parse_args()
    work: Path = arguments.work
    data = ["--data-dir", str(work / "pictures"), "--fold", "0"]
    encoder, sam = work / "dino" / "encoder.safetensors", work / "sam" / "sam.safetensors"
    adapter = work / "distill" / "adapter.safetensors"
    work.mkdir(parents=True, exist_ok=True)
    spent = work / "seconds.json"
    seconds: dict[str, float] = json.loads(spent.read_text()) if spent.exists() else {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        """Adds to what the stage took before it was broken off."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds[name] = seconds.get(name, 0) + time.perf_counter() - start
            spent.write_text(json.dumps(seconds))
            print(f"{name}: {seconds[name]:.0f} s", flush=True)

    def stage(name: str, *command: str) -> None:
        with timed(name):
            subprocess.run([sys.executable, "-m", "fssdeploy", *command], check=True, cwd=ROOT)

    with timed("render"):
        render(work / "pictures")
    stage("pretrain dino", "pretrain", "dino", *data, "--out", str(work / "dino"))
    stage("pretrain sam", "pretrain", "sam", *data, "--out", str(work / "sam"))
    teach = ["--encoder", str(encoder), "--teacher", str(sam)]
    stage("distill", "distill", "fsdino", *teach, *data, "--pictures", "2000", "--out", str(work / "distill"))
    begin = [part for file in (encoder, sam, adapter) for part in ("--weights", str(file))]
    stage("train", "train", "fsdino", *begin, *data, *ADAPTER, "--out", str(work / "fsdino"))

    halve(work / "fsdino" / "fsdino.safetensors", SHIPPED / "fsdino-tiny.safetensors")
    stage("export", "export", "fsdino", "--dynamic-batch", "--out", str(SHIPPED / "fsdino-tiny"))
    write_card(measure(work, "fsdino-tiny", ["--artifact", str(SHIPPED / "fsdino-tiny")], seconds))
    if arguments.prompted:
        # The teacher of the adapter answers boxes and corrected points; these systems ask for three masks of a point.
        prompted = ["--weights", str(sam), "--every-mask", "--phases", PROMPTED]
        stage("prompted sam", "pretrain", "sam", *data, *prompted, "--out", str(work / "sam-prompted"))
        halve(work / "sam-prompted" / "sam.safetensors", SHIPPED / "sam-tiny.safetensors")
    if arguments.ablation:
        for name, options in ABLATION.items():
            stage(name, "train", "fsdino", *begin, *data, *ADAPTER, *options, "--out", str(work / name))
            chosen = ["--set" if part == "--model" else part for part in options]
            measure(work, name, ["--weights", str(work / name / "fsdino.safetensors"), *chosen], {}, shots=(1,))


def render(folder: Path) -> None:
    """Draw the pictures that the encoders are trained on, on all cores; those that are there stay."""
    from fssdeploy.data.shapes import ShapesDataset
    from fssdeploy.training.pictures import BasePictures

    dataset = ShapesDataset(folder)
    items = BasePictures(dataset, 0).items
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(partial(draw, dataset), items, chunksize=50):
            pass


def draw(dataset: object, item: str) -> None:
    dataset.scene(item)  # type: ignore[attr-defined]


def halve(source: Path, target: Path) -> None:
    """The same weights in float16: half the size; what is evaluated and exported afterwards is this file."""
    from fssdeploy.weights.checkpoint import read_checkpoint, write_checkpoint

    checkpoint = read_checkpoint(source)
    write_checkpoint(target, {name: tensor.half() for name, tensor in checkpoint.tensors.items()}, checkpoint.metadata)


def measure(
    work: Path, name: str, network: list[str], seconds: dict[str, float], shots: tuple[int, ...] = (1, 5)
) -> dict[str, Any]:
    """1,000 episodes of the held-out fold, with training-free priors beside them; kept under benchmarks/results."""
    from fssdeploy.benchmarks.machine import describe_machine

    result: dict[str, Any] = {"command": "python tools/train_tiny.py --ablation"}
    result |= {"machine": describe_machine(), "seconds": dict(seconds)}
    for shot in shots:
        command = ["evaluate", "fsdino", "--dataset", "shapes-5i", "--fold", "0", "--shot", str(shot)]
        command += ["--episodes", "1000", "--seed", str(EVALUATION_SEED), *network, "--json", "--priors"]
        command += ["--out", str(work / f"evaluate-{name}-{shot}")]
        done = subprocess.run([sys.executable, "-m", "fssdeploy", *command], check=True, cwd=ROOT, capture_output=True)
        found = json.loads(done.stdout)
        found.pop("files", None)
        result[f"{shot}-shot"] = found
        print(f"{name} {shot}-shot: mIoU {found['miou']:.1f}, FB-IoU {found['fb_iou']:.1f}", flush=True)
    (RESULTS / f"shapes-5i-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def write_card(result: dict[str, Any]) -> None:
    """The model card of the shipped weights, with the figures of `result`."""
    rows = []
    for shot in (1, 5):
        found = result[f"{shot}-shot"]
        prior, best = max(found["priors"].items(), key=lambda item: item[1]["miou"])
        low, high = found["interval"]
        rows.append(
            f"| {shot}-shot | {found['miou']:.1f} | {low:.1f} to {high:.1f} | {found['fb_iou']:.1f} |"
            f" {prior}: {best['miou']:.1f} |"
        )
    minutes = {name: seconds / 60 for name, seconds in result["seconds"].items()}
    stages = [f"| {name} | {spent:.0f} min |" for name, spent in {**minutes, "together": sum(minutes.values())}.items()]
    machine = f"{result['machine']['cpu']}, {result['machine']['cores']} cores, no GPU"
    template = (ROOT / "tools" / "model_card.md").read_text()
    text = template.format(rows="\n".join(rows), stages="\n".join(stages), machine=machine)
    (SHIPPED / "MODEL_CARD.md").write_text(text)


if __name__ == "__main__":
    main()
