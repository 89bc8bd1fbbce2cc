"""How far trivial answers get on shapes-5i: each must stay under 25 mIoU, or the benchmark would test nothing.

    python -m fssdeploy.benchmarks.shapes5i [--episodes 1000] [--seed 1]

`largest object` even knows where every object is. `colour histogram` marks pixels whose colour is more frequent in the
support's object than around it; `mean colour` those nearer to the object's mean colour than to its surroundings'.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from fssdeploy.benchmarks.machine import describe_machine
from fssdeploy.data.shapes import FOLDS, VERSION, ShapesDataset
from fssdeploy.evaluation.metrics import mean_iou, measure_areas

LIMIT = 25.0
# Eight levels a channel: finer bins hold too few pixels of a small object.
_LEVELS = 8


def all_foreground(query: np.ndarray) -> np.ndarray:
    return np.ones(query.shape[:2], bool)


def colour_histogram(support: np.ndarray, inside: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Pixels of `query` whose colour bin is likelier in the support's object than outside it."""
    bins = _bins(support)
    within = np.bincount(bins[inside], minlength=_LEVELS**3) / inside.sum()
    around = np.bincount(bins[~inside], minlength=_LEVELS**3) / (~inside).sum()
    likelier: np.ndarray = within > around
    return likelier[_bins(query)]


def mean_colour(support: np.ndarray, inside: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Pixels of `query` nearer to the mean colour of the support's object than to that of its surroundings."""
    pixels = query.astype(np.float32)
    distances = [np.square(pixels - support[part].mean(0)).sum(-1) for part in (inside, ~inside)]
    nearer: np.ndarray = distances[0] < distances[1]
    return nearer


def largest_object(objects: np.ndarray) -> np.ndarray:
    """The object that covers most of the picture; `objects` as in `Scene.objects`."""
    counts = np.bincount(objects.ravel(), minlength=2)
    largest: np.ndarray = objects == counts[1:].argmax() + 1
    return largest


def trivial_mious(fold: int, episodes: int, seed: int) -> dict[str, float]:
    """mIoU in percent of every trivial answer on the 1-shot test episodes of a fold."""
    dataset = ShapesDataset()
    rows: dict[str, dict[int, list[tuple[int, ...]]]] = {}
    for episode in dataset.test_list(fold, 1, episodes, seed):
        support, mask = dataset.load(episode.support[0], episode.class_index)
        scene = dataset.scene(episode.query)
        truth = dataset.mask(episode.query, episode.class_index)
        answers = {
            "all foreground": all_foreground(scene.picture),
            "largest object": largest_object(scene.objects),
            "colour histogram": colour_histogram(support, mask == 1, scene.picture),
            "mean colour": mean_colour(support, mask == 1, scene.picture),
        }
        for name, answer in answers.items():
            by_class = rows.setdefault(name, {})
            by_class.setdefault(episode.class_index, []).append(measure_areas(answer, truth).as_row())
    return {
        name: 100 * mean_iou({index: np.array(areas) for index, areas in by_class.items()})
        for name, by_class in rows.items()
    }


def _bins(picture: np.ndarray) -> np.ndarray:
    levels = picture.astype(np.int64) * _LEVELS // 256
    bins: np.ndarray = (levels[..., 0] * _LEVELS + levels[..., 1]) * _LEVELS + levels[..., 2]
    return bins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "shapes-5i-trivial.json")
    arguments = parser.parse_args()
    folds = {fold: trivial_mious(fold, arguments.episodes, arguments.seed) for fold in range(FOLDS)}
    result = {
        "what": "mIoU of trivial answers on shapes-5i, 1-shot test episodes",
        "command": f"python -m fssdeploy.benchmarks.shapes5i --episodes {arguments.episodes} --seed {arguments.seed}",
        "version": VERSION,
        "limit": LIMIT,
        "folds": folds,
        "machine": describe_machine(),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for fold, figures in folds.items():
        print(fold, ", ".join(f"{name} {value:.1f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
