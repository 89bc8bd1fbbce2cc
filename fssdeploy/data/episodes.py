"""Episodes: a class, k support pictures, one query; drawn from a seed and kept as a list that reproduces them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fssdeploy.errors import InputError
from fssdeploy.files import open_file, write_atomic

FORMAT = "fssdeploy-episodes"


@dataclass(frozen=True)
class Episode:
    """One test or training case: find class `class_index` in `query`, given `support` (k items, none the query)."""

    class_index: int
    query: str
    support: tuple[str, ...]


def draw_episode(
    listing: Mapping[int, Sequence[str]], uniform_over: str, shot: int, key: Sequence[int], class_names: Sequence[str]
) -> Episode:
    """Draw one episode with a generator of its own, seeded with `key`: independent of every other and of workers.

    The supports are distinct and differ from the query. InputError if a class has fewer than shot + 1 pictures.
    """
    if shot < 1:
        raise InputError("shots", f"{shot} shots were asked for", "an episode has at least one support picture")
    if not listing:
        raise InputError("no_classes", "there is no class to draw episodes of", "the list of this split is empty")
    for index, items in listing.items():
        if len(items) <= shot:
            raise InputError(
                "class_too_small",
                f"class '{class_names[index]}' has {len(items)} picture(s)",
                f"{shot} shot(s) and a query need {shot + 1}",
                "Add pictures, take fewer shots, or leave the class out.",
            )
    generator = np.random.default_rng([*key])
    classes = list(listing)
    weights = None
    if uniform_over == "pictures":
        sizes = np.array([len(items) for items in listing.values()], float)
        weights = sizes / sizes.sum()
    chosen = classes[generator.choice(len(classes), p=weights)]
    items = listing[chosen]
    query, *support = generator.choice(len(items), shot + 1, replace=False)
    return Episode(int(chosen), items[query], tuple(items[each] for each in support))


@dataclass(frozen=True)
class EpisodeList:
    """Episodes and the protocol they were drawn under. Written as JSON lines, the first one the protocol."""

    dataset: str
    fold: int
    shot: int
    seed: int
    episodes: tuple[Episode, ...]

    def save(self, path: str | Path) -> None:
        """Write atomically. MachineError if it cannot be written."""
        head = {"format": FORMAT, "version": 1, **{key: getattr(self, key) for key in _HEAD}, "count": len(self)}
        lines = [json.dumps(head), *(json.dumps(asdict(episode)) for episode in self.episodes)]
        write_atomic(path, ("\n".join(lines) + "\n").encode())

    @staticmethod
    def load(path: str | Path) -> EpisodeList:
        """InputError if the file is missing, cut short or something else."""
        with open_file(path) as stream:
            data = stream.read()
        try:
            head, *rows = [json.loads(line) for line in data.decode().splitlines() if line.strip()]
            if head["format"] != FORMAT or head["count"] != len(rows):
                raise ValueError(f"it announces {head['count']} episodes and holds {len(rows)}")
            episodes = tuple(_episode(row, head["shot"]) for row in rows)
            return EpisodeList(**{key: head[key] for key in _HEAD}, episodes=episodes)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                "episodes_format",
                f"'{path}' is not a list of episodes",
                str(error),
                "Use a file that fssdeploy evaluate wrote.",
            ) from error

    def __len__(self) -> int:
        return len(self.episodes)


_HEAD = ("dataset", "fold", "shot", "seed")


def _episode(row: Mapping[str, Any], shot: int) -> Episode:
    episode = Episode(int(row["class_index"]), str(row["query"]), tuple(str(item) for item in row["support"]))
    if len(episode.support) != shot or episode.query in episode.support:
        raise ValueError(f"an episode does not hold {shot} supports beside its query")
    return episode
