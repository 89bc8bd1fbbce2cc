"""The journal: what was finished is found again, whatever ended the run; what belongs elsewhere is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fssdeploy.errors import IntegrityError, MachineError
from fssdeploy.evaluation.journal import open_journal
from tests.evaluation.refusal import refused

BINDING = {"dataset": "squares", "seed": 1}


def begin(path: Path, count: int) -> None:
    with open_journal(path, BINDING) as journal:
        journal.add_thresholds({"a": 0.25})
        for index in range(count):
            journal.add_episode({"index": index, "what": "é" * index})


def test_entries_come_back_in_any_number_of_sessions(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    begin(path, 2)
    with open_journal(path, BINDING) as journal:
        assert journal.thresholds == {"a": 0.25}
        assert journal.episodes == {0: {"index": 0, "what": ""}, 1: {"index": 1, "what": "é"}}
        journal.add_episode({"index": 7})
        assert 7 in journal.episodes
    with open_journal(path, BINDING) as journal:
        assert list(journal.episodes) == [0, 1, 7]


def test_lines_are_in_the_file_before_it_is_closed(tmp_path: Path) -> None:
    with open_journal(tmp_path / "journal", BINDING) as journal:
        journal.add_episode({"index": 0})
        assert (tmp_path / "journal").read_bytes().endswith(b'{"index": 0}\n')


def test_a_file_cut_anywhere_goes_on_with_its_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    begin(path, 3)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        whole = data[:length].count(b"\n")
        with open_journal(path, BINDING) as journal:
            assert list(journal.episodes) == list(range(max(0, whole - 2)))
            if whole < 2:
                journal.add_thresholds({"a": 0.25})
            for index in range(max(0, whole - 2), 3):
                journal.add_episode({"index": index, "what": "é" * index})
        assert path.read_bytes() == data


def test_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    begin(path, 1)
    data = path.read_bytes()

    def other(**changes: object) -> str:
        with refused("evaluation_of_other") as caught, open_journal(path, {**BINDING, **changes}):
            pass
        return str(caught.value)

    assert "seed is 1 there and 2 here" in other(seed=2)
    assert "shot is None there and 1 here" in other(shot=1)
    assert path.read_bytes() == data
    for content in (
        b"something else",
        b"something\nelse\n",
        b"[1]\n",
        b'{"format": 1}\n',
        b"\xff\n",
        b"[" * 100_000 + b"\n",
    ):
        path.write_bytes(content)
        assert "not the record of an evaluation" in other()
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b"7", b'"index"', b"{}", b'{"index": "x"}', b"\xff", b'{"thresholds": 1}']
)
def test_a_damaged_line_before_the_last(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "journal"
    begin(path, 1)
    path.write_bytes(path.read_bytes() + line + b"\n" + b'{"index": 1}\n')
    with refused("evaluation_damaged", IntegrityError), open_journal(path, BINDING):
        pass


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with refused("is_a_folder", MachineError), open_journal(tmp_path, BINDING):
        pass
    with refused("folder_missing", MachineError), open_journal(tmp_path / "none" / "journal", BINDING):
        pass
