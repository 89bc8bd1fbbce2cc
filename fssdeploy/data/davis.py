"""DAVIS 2017 (Pont-Tuset et al., arXiv 1704.00675), validation: follow the objects of a video from its first frame.

Layout (480p): ``JPEGImages/480p/SEQUENCE/NNNNN.jpg``, ``Annotations/480p/SEQUENCE/NNNNN.png`` (indexed: 0 background,
n the n-th object, 255 ignored) and the list ``ImageSets/2017/val.txt`` (30 sequences; DAVIS 2016 had 20).

A class is an object of a sequence, ``SEQUENCE/N``; the objects are those of the first annotation. Its first frame is
the only support and each later frame a query, so that episodes are not drawn and a seed changes nothing. J&F is a mean
over objects: what was found of a sequence's objects is merged per frame by arg-max, and the official tool leaves out
the first and the last frame, see `Davis17.scored`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fssdeploy.data.dataset import IGNORE, Dataset, Finding, Listing, Split
from fssdeploy.data.episodes import Episode
from fssdeploy.data.layout import (
    counted,
    files_finding,
    inside,
    label_mask,
    read_labels,
    read_lines,
    require_any,
    stems_in,
)
from fssdeploy.errors import InputError
from fssdeploy.images.pictures import load_picture

SOURCE = "DAVIS-2017-trainval-480p.zip from davischallenge.org."
SEQUENCES = 30
_PICTURES, _MASKS, _LIST = "JPEGImages/480p", "Annotations/480p", "ImageSets/2017/val.txt"


class Davis17(Dataset):
    """The validation sequences in a directory. An item is ``SEQUENCE/NNNNN``.

    `frames` and `objects` hold the frames (items, in order) and object numbers of every sequence; sequences without
    frames or without their first annotation have no objects, and `check` reports them. InputError as `open_dataset`.
    """

    name = "davis-17"

    def __init__(self, root: Path) -> None:
        require_any(root, "DAVIS 2017", (_PICTURES, _MASKS, _LIST), SOURCE)
        self.root = root
        names = [inside(line) for line in read_lines(root / _LIST)] if (root / _LIST).exists() else []
        self.frames = {name: [f"{name}/{stem}" for stem in stems_in(root / _PICTURES / name, ".jpg")] for name in names}
        self.objects = {name: self._objects_of(frames) for name, frames in self.frames.items()}
        self._targets = [(name, each) for name, objects in self.objects.items() for each in objects]
        self.class_names = [f"{name}/{each}" for name, each in self._targets]
        self._episodes = [
            Episode(index, query, (self.frames[name][0],))
            for index, (name, _) in enumerate(self._targets)
            for query in self.frames[name][1:]
        ]
        self.test_episodes = len(self._episodes)
        self.notes = [f"{len(names)} validation sequences of DAVIS 2017, {len(self._targets)} objects"]

    def _objects_of(self, frames: list[str]) -> list[int]:
        if not frames or not self._annotation(frames[0]).exists():
            return []
        return [int(label) for label in np.unique(read_labels(self._annotation(frames[0]))) if label not in (0, IGNORE)]

    def _annotation(self, item: str) -> Path:
        return self.root / _MASKS / f"{inside(item)}.png"

    def classes(self, fold: int, split: Split) -> range:
        self.check_fold(fold)
        if split == "train":
            raise InputError("split_missing", f"{self.name} has no classes to train on", "it is only tested on")
        return range(len(self._targets))

    def listing(self, fold: int, split: Split) -> Listing:
        return {index: self.frames[self._targets[index][0]] for index in self.classes(fold, split)}

    def target(self, class_index: int) -> tuple[str, int]:
        """Sequence and object number of a class."""
        return self._targets[class_index]

    def scored(self, episode: Episode) -> bool:
        """Whether the official tool counts this query: the last frame of a sequence is left out, as is the first."""
        sequence, _ = self._targets[episode.class_index]
        return episode.query not in (self.frames[sequence][0], self.frames[sequence][-1])

    def episode(self, fold: int, split: Split, shot: int, seed: int, index: int) -> Episode:
        """The `index`-th pair of an object and a later frame, frame by frame; `shot` must be 1, `seed` is not used."""
        self.classes(fold, split)
        if shot != 1:
            raise InputError(
                "shots", f"{shot} shots were asked for", "the first frame is the only support", "Use 1 shot."
            )
        if not 0 <= index < len(self._episodes):
            raise InputError(
                "episodes_too_many",
                f"{self.name} has no episode {index}",
                f"its objects and frames make {len(self._episodes):,}",
                "Ask for fewer episodes.",
            )
        return self._episodes[index]

    def picture(self, item: str) -> np.ndarray:
        return load_picture(self.root / _PICTURES / f"{inside(item)}.jpg")

    def mask(self, item: str, class_index: int) -> np.ndarray:
        return label_mask(read_labels(self._annotation(item)), self._targets[class_index][1])

    def check(self) -> list[Finding]:
        items = [frame for frames in self.frames.values() for frame in frames]
        empty = [name for name, objects in self.objects.items() if not objects]
        findings = [
            counted(f"sequences in {_LIST}", len(self.frames), SEQUENCES, SOURCE),
            files_finding("annotations of the frames", self.root / _MASKS, [f"{item}.png" for item in items], SOURCE),
        ]
        if empty:
            detail = f"without frames or objects in the first one: {', '.join(empty[:5])}"
            findings.append(Finding("sequences that can be used", "missing", detail, SOURCE))
        return findings


def open_dataset(root: Path) -> Dataset:
    """DAVIS 2017 under `root`. InputError ``data_missing`` if nothing of it is there."""
    return Davis17(root)
