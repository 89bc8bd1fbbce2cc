"""A folder with pictures, a mask and a bank, as a user has one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.command import fssdeploy


@dataclass(frozen=True)
class Workplace:
    """Files that every test reads and none changes: two pictures, the mask of the first, a bank with two classes."""

    artifact: Path
    folder: Path

    @property
    def first(self) -> Path:
        return self.folder / "first.png"

    @property
    def second(self) -> Path:
        return self.folder / "second.png"

    @property
    def mask(self) -> Path:
        return self.folder / "mask.png"

    @property
    def bank(self) -> Path:
        return self.folder / "bank"


@pytest.fixture(scope="session")
def workplace(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tiny_artifact, tmp_path_factory.mktemp("workplace"))
    y, x = np.mgrid[:90, :120]
    disc = (y - 40) ** 2 + (x - 70) ** 2 < 25**2
    picture = np.stack([x * 2, y * 2, np.full_like(x, 60)], -1).astype(np.uint8)
    picture[disc] = (250, 200, 30)
    Image.fromarray(picture).save(place.first)
    Image.fromarray(np.ascontiguousarray(picture[:70, ::-1])).save(place.second)
    Image.fromarray(disc).save(place.mask)
    for name, mask in (("disc", place.mask), ("corner", "box:0,0,30,40")):
        answer = fssdeploy("enroll", tiny_artifact, name, "--image", place.first, "--mask", mask, "--bank", place.bank)
        assert answer.code == 0, answer.err
    return place


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB. Skipped where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
