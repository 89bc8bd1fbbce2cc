"""One contestant of a latency benchmark in a process of its own: peak memory is then its own, and runs can interleave.

Reads one JSON command per line from standard input, answers one JSON object per line:
{"do": "prepare"}, {"do": "run", "case": "query", "shots": 5}, {"do": "stages"}, {"do": "memory"}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fssdeploy import shipped
from fssdeploy.artifact import Artifact, load
from fssdeploy.benchmarks.machine import peak_memory_mib
from fssdeploy.engines import available_cores, open_engine
from fssdeploy.pipeline import StagedSystem
from fssdeploy.protocol import ClassState, Features

CLASS = "class"


class Contestant:
    """A system of some runtime with a query picture and states of several shot counts."""

    def __init__(self, artifact: Path, variant: str, weights: list[str], threads: int) -> None:
        self.variant, self.threads = variant, threads
        self.research: Callable[[int], None] | None = None
        if variant.startswith("torch"):
            self.system = self._torch_system(artifact, weights)
        else:
            self.system = load(artifact, variant.removesuffix("-portable"), threads=threads, verify=False)
            if variant.endswith("-portable"):
                opened = Artifact.open(artifact)
                graphs = {stage: opened.graph(stage, "portable") for stage in opened.specs}
                self.system.engine = open_engine("onnxruntime", graphs, opened.specs, threads=threads)
        rng = np.random.default_rng(0)
        # Speed does not depend on what is in a picture; parity of the results is checked elsewhere.
        self.pictures = [rng.integers(0, 256, (480, 640, 3), np.uint8) for _ in range(2)]
        self.mask = np.zeros((480, 640), bool)
        self.mask[120:360, 160:480] = True
        self.states: dict[int, ClassState] = {}
        self.features: Features | None = None
        self.stage_inputs: dict[str, dict[str, np.ndarray]] = {}

    def prepare(self, shots: list[int]) -> None:
        """Warm up and enrol; many shots repeat one support, whose cost to a query is the same."""
        if self.variant == "torch-recompute":
            self.run("query", 1)
            return
        self.features = self.system.encode(self.pictures[:1])
        for count in shots:
            tensors = {name: np.repeat(array, count, 0) for name, array in self.features.tensors.items()}
            repeated = Features(tensors, self.features.placements * count, self.features.fingerprint)
            self.states[count] = self.system.enroll(repeated, [self.mask] * count)
        for case in ("query", "query", *(f"stage:{stage}" for stage in self.system.specs)):
            self.run(case, shots[0])

    def run(self, case: str, shots: int) -> None:
        """One timed unit of work."""
        if self.research:
            self.research(shots)
        elif case == "query":
            features = self.system.encode(self.pictures[1:])
            self.system.segment(features, {CLASS: self.states[shots]})
        elif case == "encode":
            self.system.encode(self.pictures[1:])
        elif case == "enroll":
            assert self.features
            self.system.enroll(self.features, [self.mask])
        elif case == "segment":
            assert self.features
            self.system.segment(self.features, {CLASS: self.states[shots]})
        else:  # one stage alone, without the glue around it: "stage:encoder"
            self._run_stage(case.removeprefix("stage:"))

    def _run_stage(self, stage: str) -> None:
        if stage not in self.stage_inputs:
            rng = np.random.default_rng(0)
            inputs = self.stage_inputs[stage] = {}
            for tensor in self.system.specs[stage].inputs:
                shape = [1 if isinstance(dim, str) else dim for dim in tensor.shape]
                high = 255 if tensor.dtype == "uint8" else 1
                inputs[tensor.name] = (rng.random(shape) * high).astype(tensor.dtype)
        self.system.engine.run(stage, self.stage_inputs[stage])

    def _torch_system(self, artifact: Path, weights: list[str]) -> StagedSystem:
        import torch

        from fssdeploy.benchmarks.baselines.fsdino_research import joint_forward
        from fssdeploy.engines.torch import TorchEngine
        from fssdeploy.errors import InputError
        from fssdeploy.systems import fsdino
        from fssdeploy.weights.fsdino import fill
        from fssdeploy.weights.provenance import fingerprint

        torch.set_num_threads(self.threads)
        opened = Artifact.open(artifact)
        config = fsdino.FSDinoConfig.from_dict(opened.manifest["config"])
        model = fsdino.build(config)
        seed = opened.manifest["weights"]["seed"]
        if not weights and seed is None:  # a trained one, perhaps of those that come with the package
            weights = [str(file) for file in shipped.checkpoints(fsdino.NAME, opened.manifest["preset"])]
        fill(model, weights, seed)
        if fingerprint(model, config.to_dict(), fsdino.STATE_PARAMETERS) != opened.fingerprint:
            raise InputError(
                "weights_missing",
                "PyTorch cannot be compared",
                "the weights are not those of the artifact",
                "Pass the --weights that the artifact was exported with.",
            )
        modules = fsdino.reference_stages(model)
        if self.variant == "torch-compile":
            modules = {name: torch.compile(module) for name, module in modules.items()}  # type: ignore[misc]
        specs = fsdino.specs(config)
        if self.variant == "torch-recompute":
            size = config.image_size
            generator = torch.Generator().manual_seed(0)
            pictures = torch.randint(0, 256, (2, 3, size, size), generator=generator, dtype=torch.uint8)
            mask = torch.zeros(1, 1, size, size)
            mask[..., size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 1

            def research(shots: int) -> None:
                with torch.inference_mode():
                    supports = pictures[:1].expand(shots, -1, -1, -1)
                    joint_forward(model, pictures[1:], supports, mask.expand(shots, -1, -1, -1))

            self.research = research
        return StagedSystem(
            "torch", specs, TorchEngine(modules, specs), fsdino.preprocessing(config), opened.fingerprint
        )


def main() -> None:
    """Serve commands until standard input ends."""
    artifact, variant, weights = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    contestant: Contestant | None = None
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if command["do"] == "prepare":
                contestant = Contestant(artifact, variant, weights, available_cores())
                contestant.prepare(command["shots"])
                answer["engine"] = contestant.system.engine.describe()
            elif command["do"] == "run":
                assert contestant
                cpu, wall = time.process_time(), time.perf_counter()
                contestant.run(command["case"], command["shots"])
                answer["wall"] = time.perf_counter() - wall
                answer["cpu"] = time.process_time() - cpu
            elif command["do"] == "memory":
                answer["peak_mib"] = peak_memory_mib()
        except Exception as error:  # the parent reports it and drops this contestant
            answer["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
