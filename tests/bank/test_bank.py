"""Storing, finding, extending and removing classes."""

import shutil
import sqlite3
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from fssdeploy.bank import Bank
from fssdeploy.errors import InputError, IntegrityError
from fssdeploy.protocol import ClassState

FINGERPRINT = "f" * 64


def assert_equal(left: ClassState, right: ClassState) -> None:
    assert left.tensors.keys() == right.tensors.keys()
    for name, array in left.tensors.items():
        other = right.tensors[name]
        assert (array.dtype, array.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(array, other)
    assert (left.shots, left.fingerprint, left.meta) == (right.shots, right.fingerprint, right.meta)


def test_a_state_comes_back_as_it_was(bank, make_state):
    state = make_state(3, shots=5)
    assert bank.put("cup", state) == 1
    assert_equal(bank.get("cup"), state)
    with Bank.open(bank.directory) as again:
        assert again.fingerprint == FINGERPRINT
        assert_equal(again.get("cup"), state)


def test_a_loaded_state_can_be_changed_without_changing_the_bank(bank, make_state):
    bank.put("cup", make_state(1))
    bank.get("cup").tensors["prototype"][:] = 0
    assert_equal(bank.get("cup"), make_state(1))


def test_versions_count_up_for_each_class(bank, make_state):
    assert [bank.put("cup", make_state(seed)) for seed in range(3)] == [1, 2, 3]
    assert bank.put("plate", make_state(9)) == 1
    assert bank.names() == ["cup", "plate"]
    assert_equal(bank.get("cup"), make_state(2))
    assert_equal(bank.get("cup", 1), make_state(0))
    infos = bank.versions("cup")
    assert [(info.name, info.version, info.shots, info.meta) for info in infos] == [
        ("cup", number, 1, {"seed": number - 1}) for number in (1, 2, 3)
    ]
    for info in infos:
        file = bank.directory / "states" / f"{info.sha256}.safetensors"
        assert file.stat().st_size == info.bytes
        assert abs(datetime.fromisoformat(info.created) - datetime.now(UTC)) < timedelta(minutes=5)


def test_the_newest_versions_of_all_or_of_some(bank, make_state):
    assert bank.newest() == []
    for name in ("plate", "cup", "cup", "a'b"):
        bank.put(name, make_state(len(name)))
    assert [(info.name, info.version) for info in bank.newest()] == [("a'b", 1), ("cup", 2), ("plate", 1)]
    chosen = bank.newest(["plate", "a'b", "plate"])
    assert [info.name for info in chosen] == ["plate", "a'b"]
    assert chosen[0] == bank.versions("plate")[-1]
    assert bank.newest([]) == []
    bank.put("\u00e9", make_state(1))
    assert [info.name for info in bank.newest(["e\u0301"])] == ["\u00e9"]
    with pytest.raises(InputError) as caught:
        bank.newest(["cup", "cap"])
    assert caught.value.code == "class_unknown" and "'cap'" in str(caught.value)


def test_reading_what_was_listed(bank, make_state):
    bank.put("cup", make_state(1))
    (info,) = bank.newest(["cup"])
    assert_equal(bank.read(info), make_state(1))
    bank.put("cup", make_state(2))
    assert_equal(bank.read(info), make_state(1))  # the version, not the class
    bank.prune()
    assert bank.read(info) is None
    (info,) = bank.newest(["cup"])
    (bank.directory / "states" / f"{info.sha256}.safetensors").unlink()
    with pytest.raises(IntegrityError) as caught:
        bank.read(info)
    assert caught.value.code == "state_damaged"


def test_meta_is_added_to_that_of_the_state(bank, make_state):
    bank.put("cup", make_state(1), meta={"who": "Zoë", "pictures": ["a.png", "b.png"], "score": 0.5})
    expected = {"seed": 1, "who": "Zoë", "pictures": ["a.png", "b.png"], "score": 0.5}
    assert bank.versions("cup")[0].meta == expected
    assert bank.get("cup").meta == expected


def test_equal_states_share_one_file(bank, make_state):
    for name in ("cup", "mug", "cup"):
        bank.put(name, make_state(1, shots=2), meta={"b": 1, "a": 2})
    assert len(list((bank.directory / "states").iterdir())) == 1
    bank.remove("cup")
    assert bank.prune().files == 0
    assert_equal(bank.get("mug"), ClassState(make_state(1).tensors, 2, FINGERPRINT, {"seed": 1, "a": 2, "b": 1}))


def test_extending_equals_enrolling_all_shots_together(bank, make_state):
    first, second = make_state(1, shots=3), make_state(2, shots=2)
    bank.put("cup", first)
    assert bank.extend("cup", second) == 2
    assert_equal(bank.get("cup"), first.merge(second))
    assert bank.versions("cup")[-1].shots == 5
    assert_equal(bank.get("cup", 1), first)


def test_extending_with_other_shapes_is_refused(bank, make_state):
    bank.put("cup", make_state(1))
    other = make_state(2)
    other.tensors["prototype"] = other.tensors["prototype"][:1]  # would broadcast silently
    with pytest.raises(InputError) as caught:
        bank.extend("cup", other)
    assert caught.value.code == "state_shapes"
    assert len(bank.versions("cup")) == 1


def test_extending_an_unknown_class_is_refused(bank, make_state):
    with pytest.raises(InputError) as caught:
        bank.extend("cup", make_state())
    assert caught.value.code == "class_unknown"


def test_removing_forgets_the_class_but_never_reuses_a_version(bank, make_state):
    bank.put("cup", make_state(1))
    bank.put("cup", make_state(2))
    assert bank.remove("cup") == 2
    assert bank.names() == []
    for call in (bank.get, bank.versions, bank.remove):
        with pytest.raises(InputError) as caught:
            call("cup")
        assert caught.value.code == "class_unknown"
    assert bank.put("cup", make_state(3)) == 3
    assert_equal(bank.get("cup"), make_state(3))


def test_pruning_keeps_the_newest_versions_and_deletes_the_other_files(bank, make_state):
    for seed in range(4):
        bank.put("cup", make_state(seed))
    bank.put("plate", make_state(9))
    bank.put("gone", make_state(10))
    bank.remove("gone")
    sizes = [info.bytes for info in bank.versions("cup")]
    report = bank.prune(keep=2)
    assert (report.versions, report.files) == (2, 3)
    assert report.bytes > sum(sizes[:2])
    assert [info.version for info in bank.versions("cup")] == [3, 4]
    assert_equal(bank.get("plate"), make_state(9))
    assert len(list((bank.directory / "states").iterdir())) == 3
    assert bank.verify() == []
    assert bank.prune(keep=2).files == 0
    with pytest.raises(InputError) as caught:
        bank.get("cup", 1)
    assert caught.value.code == "version_unknown"
    assert "4, 3" in caught.value.why


def test_pruning_removes_leftovers_but_not_files_of_others(bank, make_state):
    bank.put("cup", make_state())
    states = bank.directory / "states"
    for name in ("0" * 64 + ".safetensors", ".0123456789abcdef.tmp", "notes.txt", "cup.safetensors"):
        (states / name).write_bytes(b"12345")
    report = bank.prune()
    assert (report.versions, report.files, report.bytes) == (0, 2, 10)
    assert {"notes.txt", "cup.safetensors"} < {path.name for path in states.iterdir()}
    assert_equal(bank.get("cup"), make_state())


@pytest.mark.parametrize("keep", [0, -1])
def test_pruning_everything_is_refused(bank, keep):
    with pytest.raises(InputError) as caught:
        bank.prune(keep)
    assert caught.value.code == "prune_keep"


@pytest.mark.parametrize("number", [0, -1, 7, 2**70])
def test_numbers_out_of_range(bank, make_state, number):
    bank.put("cup", make_state())
    with pytest.raises(InputError) as caught:
        bank.get("cup", number)
    assert caught.value.code == "version_unknown"
    assert bank.prune(2**70).versions == 0


def test_unknown_class_names_those_that_look_alike_first(bank, make_state):
    for name in ("anvil", "bolt", "teacup", "cups", *(f"part {number}" for number in range(20))):
        bank.put(name, make_state())
    with pytest.raises(InputError) as caught:
        bank.get("cup")
    error = caught.value
    assert error.code == "class_unknown"
    assert error.why.index("'cups'") < error.why.index("'teacup'") < error.why.index("'anvil'")
    assert "16 more" in error.why
    assert "\n" not in error.line()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"shots": 0}, "state_empty"),
        ({"tensors": {}}, "state_empty"),
        ({"tensors": {"x": np.array(["text"])}}, "state_dtype"),
        ({"meta": {"x": object()}}, "meta_not_json"),
        ({"meta": {"x": float("nan")}}, "meta_not_json"),
        ({"fingerprint": "e" * 64}, "state_of_other_artifact"),
    ],
)
def test_states_that_cannot_be_stored_leave_no_trace(bank, make_state, change, code):
    state = make_state()
    for key, value in change.items():
        setattr(state, key, value)
    with pytest.raises(InputError) as caught:
        bank.put("cup", state)
    assert caught.value.code == code
    assert bank.names() == []
    assert list((bank.directory / "states").iterdir()) == []
    assert bank.put("cup", make_state()) == 1


def test_shots_may_be_a_numpy_integer(bank, make_state):
    bank.put("cup", make_state(shots=np.int64(4)))
    assert bank.get("cup").shots == bank.versions("cup")[0].shots == 4


def test_a_bank_of_another_artifact_is_refused(bank):
    for create in (False, True):
        with pytest.raises(IntegrityError) as caught:
            Bank.open(bank.directory, "e" * 64, create=create)
        assert caught.value.code == "bank_of_other_artifact"


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_a_missing_bank(tmp_path, make):
    make(tmp_path / "bank")
    with pytest.raises(InputError) as caught:
        Bank.open(tmp_path / "bank", FINGERPRINT)
    assert caught.value.code == "bank_missing"


def test_creating_needs_a_fingerprint(tmp_path):
    with pytest.raises(InputError) as caught:
        Bank.open(tmp_path / "bank", create=True)
    assert caught.value.code == "bank_needs_fingerprint"
    assert not (tmp_path / "bank").exists()


def test_creating_an_existing_bank_opens_it(bank, make_state):
    bank.put("cup", make_state())
    for fingerprint in (FINGERPRINT, None):
        with Bank.open(bank.directory, fingerprint, create=True) as again:
            assert again.names() == ["cup"]


@pytest.mark.parametrize("folder", ["deep/er/bank", "a b?mode=memory&x=%41#y", "ё🙂"])
def test_any_folder_will_do(tmp_path, make_state, folder):
    with Bank.open(tmp_path / folder, FINGERPRINT, create=True) as bank:
        bank.put("cup", make_state())
        assert (tmp_path / folder / "index.sqlite").is_file()
    with Bank.open(tmp_path / folder, FINGERPRINT) as bank:
        assert bank.names() == ["cup"]


def test_a_bank_can_be_moved(bank, make_state, tmp_path):
    bank.put("cup", make_state())
    bank.close()
    shutil.move(bank.directory, tmp_path / "elsewhere")
    with Bank.open(tmp_path / "elsewhere", FINGERPRINT) as moved:
        assert_equal(moved.get("cup"), make_state())


def test_relative_paths_survive_a_change_of_folder(tmp_path, make_state, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Bank.open("bank", FINGERPRINT, create=True) as bank:
        monkeypatch.chdir("/")
        bank.put("cup", make_state())
        assert_equal(bank.get("cup"), make_state())


def test_a_closed_bank_says_so(bank):
    bank.close()
    with pytest.raises(InputError) as caught:
        bank.names()
    assert caught.value.code == "bank_closed"


@pytest.mark.parametrize("change", ["PRAGMA user_version = 2", "UPDATE bank SET format = 2"])
def test_a_bank_of_a_newer_format_is_refused(bank, change):
    bank.close()
    connection = sqlite3.connect(bank.directory / "index.sqlite")
    connection.execute(change)
    connection.commit()
    connection.close()
    with pytest.raises(IntegrityError) as caught:
        Bank.open(bank.directory, FINGERPRINT)
    assert caught.value.code == "bank_newer"
