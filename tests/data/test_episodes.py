"""Episodes: drawn from seed and number alone, kept as a list that gives them back, refused where data are too few."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fssdeploy.data.episodes import Episode, EpisodeList, draw_episode
from fssdeploy.errors import InputError, MachineError
from tests.evaluation.squares import PICTURES, Squares, episode_list

NAMES = ("few", "many")
LISTING = {0: [f"few-{number}" for number in range(4)], 1: [f"many-{number}" for number in range(12)]}


def draw(index: int, shot: int = 2, seed: int = 0, over: str = "classes") -> Episode:
    return draw_episode(LISTING, over, shot, (seed, index), NAMES)


def test_supports_are_distinct_pictures_of_the_class_and_not_the_query() -> None:
    for index in range(200):
        episode = draw(index, shot=3)
        shown = [episode.query, *episode.support]
        assert len(set(shown)) == 4 and set(shown) <= set(LISTING[episode.class_index])


def test_nothing_but_seed_and_number_counts() -> None:
    alone = [draw(index) for index in range(50)]
    assert [draw(index) for index in reversed(range(50))][::-1] == alone
    with ThreadPoolExecutor(4) as workers:
        assert list(workers.map(draw, range(50))) == alone
    assert [draw(index, seed=1) for index in range(50)] != alone
    assert len(set(alone)) > 40

    dataset = Squares()
    assert dataset.test_list(1, 2, 5, 7) == dataset.test_list(1, 2, 20, 7)[:5]
    assert len(dataset.test_list(1, 2, None, 7)) == dataset.test_episodes
    novel = {episode.class_index for episode in dataset.test_list(1, 1, 50, 0)}
    assert novel == set(dataset.classes(1, "test"))


def test_every_class_or_every_picture_is_equally_likely() -> None:
    by_class = Counter(draw(index).class_index for index in range(600))
    by_picture = Counter(draw(index, over="pictures").class_index for index in range(600))
    assert by_class[0] / 600 == pytest.approx(1 / 2, abs=0.06)
    assert by_picture[0] / 600 == pytest.approx(1 / 4, abs=0.06)
    queries = Counter(draw(index, over="pictures").query for index in range(1600))
    assert len(queries) == 16 and max(queries.values()) < 2 * min(queries.values())


def test_too_few_pictures() -> None:
    assert len(set(draw(0, shot=3).support)) == 3
    with pytest.raises(InputError) as caught:
        draw(0, shot=4)  # whichever class would have been drawn
    assert caught.value.code == "class_too_small" and "'few' has 4" in caught.value.what
    with pytest.raises(InputError) as caught:
        draw(0, shot=0)
    assert caught.value.code == "shots"
    with pytest.raises(InputError) as caught:
        draw_episode({}, "classes", 1, (0, 0), ())
    assert caught.value.code == "no_classes"
    with pytest.raises(InputError):
        Squares().episode(0, "test", PICTURES, 0, 0)


def test_a_list_comes_back_as_it_was(tmp_path: Path) -> None:
    episodes = episode_list(Squares(), fold=1, shot=3, seed=5, count=4)
    episodes.save(tmp_path / "list.jsonl")
    assert EpisodeList.load(tmp_path / "list.jsonl") == episodes
    lines = (tmp_path / "list.jsonl").read_text().splitlines()
    assert len(lines) == 5 and json.loads(lines[0])["shot"] == 3
    assert json.loads(lines[1])["query"] == episodes.episodes[0].query
    strange = EpisodeList("söme", 0, 1, 0, (Episode(0, 'a "b"/ü\n.jpg', ("c\\d",)),))
    strange.save(tmp_path / "strange.jsonl")
    assert EpisodeList.load(tmp_path / "strange.jsonl") == strange
    EpisodeList("none", 0, 1, 0, ()).save(tmp_path / "empty.jsonl")
    assert len(EpisodeList.load(tmp_path / "empty.jsonl")) == 0


def changed(**values: object) -> Callable[[list[str]], list[str]]:
    """The first episode with other values."""
    return lambda lines: [lines[0], json.dumps({**json.loads(lines[1]), **values}), *lines[2:]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[:-1],
        lambda lines: lines[1:],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [lines[0].replace("fssdeploy-episodes", "other"), *lines[1:]],
        lambda lines: [*lines[:-1], lines[-1][:-4]],
        lambda lines: ["[]", *lines[1:]],
        lambda lines: ["picture.jpg"],
        changed(support=["2-1"]),
        changed(query="2-2", support=["2-1", "2-2"]),
        changed(class_index="none"),
    ],
)
def test_a_damaged_list_is_refused(tmp_path: Path, damage: Callable[[list[str]], list[str]]) -> None:
    file = tmp_path / "list.jsonl"
    episode_list(Squares(), shot=2).save(file)
    file.write_text("\n".join(damage(file.read_text().splitlines())))
    with pytest.raises(InputError) as caught:
        EpisodeList.load(file)
    assert caught.value.code == "episodes_format" and len(caught.value.line().splitlines()) == 1


def test_lists_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)))
    for name in ("missing", "binary", "."):
        with pytest.raises(InputError):
            EpisodeList.load(tmp_path / name)
    with pytest.raises(MachineError):
        episode_list(Squares()).save(tmp_path / "no" / "folder")
