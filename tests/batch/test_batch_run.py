"""A batch in its folder: nothing is lost, nothing is done twice, and the manifest says what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from fssdeploy.batch.plan import Shard, locked
from fssdeploy.batch.run import Means, run_batch
from fssdeploy.errors import FssError, InputError, IntegrityError, MachineError
from tests.batch.jobs import Notes, attempts, in_process, means, plan_of, read_manifest, states


def journals(out: Path) -> list[Path]:
    return sorted((out / "batch").glob("*.jsonl"))


def test_everything_is_done_once_however_often_it_is_run(tmp_path: Path) -> None:
    for _ in range(2):
        outcome = run_batch(plan_of("abc", colour="red"), Notes(tmp_path), tmp_path, means())
        assert outcome.complete and outcome.failure() is None
    assert {name: len(by) for name, by in attempts(tmp_path).items()} == {"a": 1, "b": 1, "c": 1}
    found = read_manifest(tmp_path)
    assert (found["kind"], found["configuration"]) == ("notes", {"colour": "red"})
    assert (found["total"], found["done"], found["failed"], found["missing"]) == (3, 3, 0, 0) and found["complete"]
    assert found["items"][1] == {"input": "b", "state": "done", "outputs": ["b.txt"]}


def test_what_cannot_be_read_is_told_and_tried_again(tmp_path: Path) -> None:
    outcome = run_batch(plan_of("abc"), Notes(tmp_path, {"b": "unreadable"}), tmp_path, means())
    error = outcome.failure()
    assert error and error.code == "items_failed" and error.exit_code == 3 and "1 of 3" in error.what
    assert states(tmp_path) == {"a": "done", "b": "failed", "c": "done"}
    assert read_manifest(tmp_path)["items"][1]["error"]["code"] == "file_empty"
    assert any(note.startswith("FAILED 'b' is empty") for note in outcome.notes())
    run_batch(plan_of("abc"), Notes(tmp_path), tmp_path, means())
    assert set(states(tmp_path).values()) == {"done"}
    assert {name: len(by) for name, by in attempts(tmp_path).items()} == {"a": 1, "b": 2, "c": 1}


def test_done_stays_done_whatever_fails_later(tmp_path: Path) -> None:
    run_batch(plan_of("a"), Notes(tmp_path), tmp_path, means())
    never = {"usable": lambda entry: False}
    run_batch(plan_of("a"), Notes(tmp_path, {"a": "unreadable"}), tmp_path, means(), **never)
    assert states(tmp_path) == {"a": "done"} and len(attempts(tmp_path)["a"]) == 2


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MachineError("no_space", "full")])
def test_a_manifest_is_written_whatever_ends_it(tmp_path: Path, stop: type[BaseException] | FssError) -> None:
    def stopped(setup, items, workers, finished):  # type: ignore[no-untyped-def]
        in_process(setup, items[:1], workers, finished)
        raise stop

    seen = []
    with pytest.raises(stop if isinstance(stop, type) else MachineError):
        run_batch(plan_of("abc"), Notes(tmp_path), tmp_path, means(stopped), collect=seen.append)
    assert states(tmp_path) == {"a": "done", "b": "missing", "c": "missing"}
    assert not read_manifest(tmp_path)["complete"] and [len(outcome.done) for outcome in seen] == [1]


def test_a_torn_line_costs_its_item_alone(tmp_path: Path) -> None:
    run_batch(plan_of("abc"), Notes(tmp_path), tmp_path, means())
    (journal,) = journals(tmp_path)
    data = journal.read_bytes()
    for cut in (1, len(data.splitlines(keepends=True)[-1]) - 1):
        journal.write_bytes(data[:-cut])
        (tmp_path / "attempts").unlink()
        run_batch(plan_of("abc"), Notes(tmp_path), tmp_path, means())
        assert list(attempts(tmp_path)) == ["c"] and set(states(tmp_path).values()) == {"done"}
        journals(tmp_path)[-1].unlink()
    journal.write_bytes(data[:10])  # of the first line
    assert run_batch(plan_of("abc"), Notes(tmp_path), tmp_path, means()).complete
    assert list(attempts(tmp_path)) == ["c", "a", "b"]


def test_damage_and_other_plans_are_refused(tmp_path: Path) -> None:
    run_batch(plan_of("abc", colour="red"), Notes(tmp_path), tmp_path, means())
    for plan, part in (
        (plan_of("abc", colour="blue"), "colour is red there and blue here"),
        (plan_of("abcd", colour="red"), "items is 3 there and 4 here"),
        (plan_of("abd", colour="red"), "list of items is"),
        (plan_of("abc"), "colour is red there and None here"),
    ):
        with pytest.raises(InputError, match=part) as caught:
            run_batch(plan, Notes(tmp_path), tmp_path, means())
        assert caught.value.code == "batch_of_other"
    (journal,) = journals(tmp_path)
    data = journal.read_bytes()
    for damaged in (data.replace(b'"done"', b'"dine"', 1), data.replace(b"}\n", b"\n", 2), b"hello\n"):
        journal.write_bytes(damaged)
        with pytest.raises(IntegrityError) as damage:
            run_batch(plan_of("abc", colour="red"), Notes(tmp_path), tmp_path, means())
        assert damage.value.code == "batch_damaged" and journal.name in str(damage.value)
    journal.write_bytes(data.replace(b'"plan": "', b'"plan": "0'))
    with pytest.raises(InputError, match="another plan"):
        run_batch(plan_of("abc", colour="red"), Notes(tmp_path), tmp_path, means())
    (tmp_path / "batch" / "plan.json").write_text("[]")
    with pytest.raises(IntegrityError, match="is damaged"):
        run_batch(plan_of("abc", colour="red"), Notes(tmp_path), tmp_path, means())


def test_shards_make_one_manifest(tmp_path: Path) -> None:
    for number, missing in ((2, 5), (3, 3), (1, 0)):
        outcome = run_batch(plan_of("abcdefg"), Notes(tmp_path), tmp_path, means(shard=f"{number}/3"))
        assert outcome.count("missing") == read_manifest(tmp_path)["missing"] == missing
        assert any("INCOMPLETE" in note for note in outcome.notes()) == (missing > 0)
    assert outcome.complete and read_manifest(tmp_path)["complete"]
    assert list(attempts(tmp_path)) == ["b", "e", "c", "f", "a", "d", "g"]


def test_one_process_for_each_shard(tmp_path: Path) -> None:
    run_batch(plan_of("ab"), Notes(tmp_path), tmp_path, means(shard="1/2"))
    with locked(tmp_path / "batch" / "shard-2-of-2.lock", wait=False):
        run_batch(plan_of("ab"), Notes(tmp_path), tmp_path, means(shard="1/2"))
        with pytest.raises(MachineError, match="being worked on") as caught:
            run_batch(plan_of("ab"), Notes(tmp_path), tmp_path, means(shard="2/2"))
        assert caught.value.code == "batch_busy"
    assert run_batch(plan_of("ab"), Notes(tmp_path), tmp_path, means(shard="2/2")).complete


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/", "-1/2", "a/b", "1/2/3", "²/3"])
def test_shards_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="there is no shard"):
        Shard.parse(text)


def test_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fssdeploy.batch.run.available_cores", lambda: 12)
    chosen = [Means.choose(workers, None, "1/1", "local") for workers in (None, 3, 5, 20)]
    assert [(each.workers, each.threads) for each in chosen] == [(8, 1), (3, 4), (5, 2), (20, 1)]
    assert Means.choose(2, 3, "1/1", "local").threads == 3
