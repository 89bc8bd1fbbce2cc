"""Workers as actors of Ray Data, on one machine or a cluster: a thin adapter around the same `Worker`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fssdeploy.batch.plan import Item
from fssdeploy.batch.worker import CHUNK, Setup, Worker, revive
from fssdeploy.errors import FssError, MachineError


class RayWorker:
    """What Ray makes an actor of. Items and answers travel as JSON text: file names need not be valid Unicode."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._worker: Worker | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        answers: list[dict[str, Any]] = []
        try:
            self._worker = self._worker or Worker(self._setup, self._setup.journal_path())
            for text in batch["item"]:
                answers.append({"state": self._worker.finish(json.loads(str(text)))})
        except FssError as error:  # Ray would wrap it beyond recognition
            answers.append({"refused": error.to_dict()})
        return {"answer": np.array([json.dumps(answer) for answer in answers], object)}


def process_on_ray(setup: Setup, items: Sequence[Item], workers: int, finished: Callable[[str], None]) -> None:
    """As `process_locally`, on `workers` actors of the cluster in RAY_ADDRESS, or of one started here.

    Ray itself replaces an actor that dies and repeats its items once; one that kills two ends the batch. Raises what
    `Worker` raises, and MachineError ``package_missing`` and ``ray_failed``.
    """
    # Ray reports its use to its makers unless told before the import. Nothing here may use the network unasked.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MachineError(
            "package_missing", "Ray is not installed", str(error), "Run: pip install 'fssdeploy[batch]'"
        ) from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    answers = ray.data.from_items([{"item": json.dumps(item)} for item in items]).map_batches(
        RayWorker,
        fn_constructor_args=[setup],
        batch_size=CHUNK,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
        num_cpus=setup.threads,
        max_task_retries=1,  # else an item that kills its worker would do so for ever
    )
    try:
        for row in answers.iter_rows():
            answer = json.loads(row["answer"])
            if "refused" in answer:
                raise revive(answer["refused"])
            finished(answer["state"])
    except FssError:
        raise
    except Exception as error:  # its errors share no base class
        raise MachineError(
            "ray_failed",
            "Ray gave up",
            f"{type(error).__name__}: {error}".splitlines()[0],
            "Run it again; with --backend local an item that kills its worker is found and left out.",
        ) from error
