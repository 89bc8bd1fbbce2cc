"""Folders that are made for a result and go again if there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fssdeploy.errors import MachineError
from fssdeploy.files import made_folder, staged_folder


def test_a_folder_with_something_in_it_stays(tmp_path: Path) -> None:
    with made_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()


def test_empty_folders_go_again_but_only_those_made_here(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with made_folder(tmp_path / "mine" / "a" / "b"):
        pass
    assert os.listdir(tmp_path / "mine") == []
    with pytest.raises(KeyboardInterrupt), made_folder(tmp_path / "a" / "b") as folder:
        (folder.parent / "file").touch()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "a") == ["file"]


def test_folders_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(MachineError) as caught, made_folder(path):
            pass
        assert caught.value.code == "not_a_folder"
    with pytest.raises(MachineError) as caught, made_folder(tmp_path / "new" / ("n" * 300)):
        pass
    assert caught.value.code == "name_too_long"
    assert os.listdir(tmp_path) == ["file"]


def test_relative_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with made_folder("a/b") as folder:
        (folder / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()


def test_a_staged_folder_is_renamed_or_gone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), staged_folder(tmp_path / "new" / "target") as folder:
        (folder / "half").touch()
        assert folder.parent == tmp_path / "new" and folder.name.startswith(".target.partial-")
        raise ValueError("no")
    assert os.listdir(tmp_path) == []
    with staged_folder(tmp_path / "new" / "target") as folder:
        (folder / "whole").touch()
        os.rename(folder, tmp_path / "new" / "target")
    assert os.listdir(tmp_path / "new") == ["target"]
    assert os.listdir(tmp_path / "new" / "target") == ["whole"]
