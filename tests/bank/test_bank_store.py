"""A class into a bank that does not exist yet: a whole bank, or nothing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fssdeploy.bank import Bank, store_class
from fssdeploy.bank import bank as module
from fssdeploy.errors import FssError, InputError, MachineError

FINGERPRINT = "f" * 64


def test_a_new_bank_holds_its_first_class(tmp_path, make_state):
    folder = tmp_path / "new" / "bank"
    assert store_class(folder, "cup", make_state(1)) == (1, 1)
    assert os.listdir(tmp_path / "new") == ["bank"]
    with Bank.open(folder, FINGERPRINT) as bank:
        assert bank.names() == ["cup"] and bank.verify() == []
        np.testing.assert_array_equal(bank.get("cup").tensors["prototype"], make_state(1).tensors["prototype"])
    plain = tmp_path / "plain"
    plain.mkdir()
    assert folder.stat().st_mode == plain.stat().st_mode


def test_versions_and_shots(tmp_path, make_state):
    assert store_class(tmp_path / "bank", "cup", make_state(1, shots=2)) == (1, 2)
    assert store_class(tmp_path / "bank", "cup", make_state(2)) == (2, 1)
    assert store_class(tmp_path / "bank", "cup", make_state(3, shots=4), add=True) == (3, 5)
    assert store_class(tmp_path / "bank", "mug", make_state(3)) == (1, 1)


def test_a_folder_that_is_there_becomes_the_bank(tmp_path, make_state):
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "notes.txt").write_text("mine")
    store_class(tmp_path / "bank", "cup", make_state())
    assert (tmp_path / "bank" / "notes.txt").read_text() == "mine"
    assert Bank.open(tmp_path / "bank").names() == ["cup"]


@pytest.mark.parametrize("problem", ["name", "space", "interrupt", "rename"])
def test_a_failure_leaves_nothing(tmp_path, make_state, monkeypatch, problem):
    def fail(*_, **__):
        raise KeyboardInterrupt if problem == "interrupt" else OSError(28, "No space left on device")

    def full(*_, **__):
        raise MachineError("no_space", "full")

    if problem == "space":
        monkeypatch.setattr(module, "write_atomic", full)
    elif problem == "interrupt":
        monkeypatch.setattr(module, "write_atomic", fail)
    elif problem == "rename":
        monkeypatch.setattr(os, "rename", fail)
    with pytest.raises((FssError, KeyboardInterrupt)):
        store_class(tmp_path / "new" / "bank", " " if problem == "name" else "cup", make_state())
    assert os.listdir(tmp_path) == []


def test_adding_needs_a_bank(tmp_path, make_state):
    with pytest.raises(InputError) as caught:
        store_class(tmp_path / "new" / "bank", "cup", make_state(), add=True)
    assert caught.value.code == "bank_missing"
    assert os.listdir(tmp_path) == []


def test_a_bank_that_somebody_else_makes_meanwhile_is_used(tmp_path, make_state, monkeypatch):
    original = os.rename

    def late(source, target):
        monkeypatch.setattr(os, "rename", original)
        store_class(tmp_path / "bank", "mug", make_state(1))
        original(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert store_class(tmp_path / "bank", "cup", make_state(2)) == (1, 1)
    with Bank.open(tmp_path / "bank") as bank:
        assert bank.names() == ["cup", "mug"]
    assert os.listdir(tmp_path) == ["bank"]


def test_relative_paths(tmp_path, make_state, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store_class(Path("bank"), "cup", make_state())
    assert Bank.open(tmp_path / "bank").names() == ["cup"]
