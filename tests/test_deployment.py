"""Enrolled classes in use: what is found, what is cached, what other processes change meanwhile."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fssdeploy.artifact import load
from fssdeploy.bank.bank import Bank
from fssdeploy.deployment import Deployment, StateCache, open_deployment
from fssdeploy.errors import InputError, IntegrityError
from fssdeploy.images.masks import load_mask
from fssdeploy.images.pictures import load_picture
from fssdeploy.protocol import ClassState
from tests.test_pipeline import FINGERPRINT, bright, refused, system


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    return Deployment(system(), tmp_path / "bank")


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def files(folder: Path) -> set[str]:
    """Everything below a folder, without what SQLite adds while a bank is open."""
    paths = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {path for path in paths if not path.endswith(("-wal", "-shm"))}


def counted(deployment: Deployment) -> tuple[int, int]:
    return deployment.counters.hits, deployment.counters.misses


def test_every_kind_of_source_gives_the_same_answer(deployment: Deployment, tmp_path: Path) -> None:
    picture, mask = bright(40, 60)
    query, expected = bright(30, 50, 190)
    for suffix, write in (("png", png), ("npy", npy)):
        (tmp_path / f"mask.{suffix}").write_bytes(write(mask))
    (tmp_path / "picture.png").write_bytes(png(picture))
    (tmp_path / "query.png").write_bytes(png(query))
    pictures = [picture, png(picture), npy(picture), tmp_path / "picture.png", str(tmp_path / "picture.png")]
    masks = [
        mask,
        mask.astype(np.uint8) * 255,
        png(mask),
        npy(mask),
        tmp_path / "mask.png",
        tmp_path / "mask.npy",
        "box:0,0,30,20",
        b"box:0,0,30,20",
        b' {"size": [40, 60], "counts": [0' + b",20,20" * 29 + b",20,1220]}",
    ]
    for number in range(max(len(pictures), len(masks))):
        deployment.enroll(str(number), [pictures[number % len(pictures)]], [masks[number % len(masks)]])
    shas = {info.sha256 for info in Bank.open(deployment.bank).newest()}
    assert len(shas) == 1  # equal states are equal files
    answers = [deployment.segment(source, ["0"])["0"] for source in (query, png(query), npy(query))]
    answers.append(deployment.segment(tmp_path / "query.png")["8"])
    for answer in answers:
        assert answer.mask.dtype == bool and answer.mask.shape == (30, 50)
        np.testing.assert_array_equal(answer.mask, answers[0].mask)
        assert answer.score == answers[0].score and answer.version == 1
    assert (answers[0].mask == expected).mean() > 0.9


def test_answers_are_those_of_the_three_verbs(tiny_artifact: Path, tmp_path: Path, picture: np.ndarray) -> None:
    """Bit for bit, on ONNX Runtime, with shots of two sizes and several classes."""
    deployment = open_deployment(tiny_artifact, tmp_path / "bank", threads=1)
    files = [png(picture), png(np.ascontiguousarray(picture[:70, ::-1]))]
    marks = ["box:45,15,95,65", "box:25,15,75,66"]
    assert deployment.enroll("disc", files, marks).shots == 2
    deployment.enroll("corner", files[:1], ["box:0,0,30,40"])
    staged = load(tiny_artifact, threads=1)
    loaded = [load_picture(file) for file in files]
    shown = [load_mask(mark, item.shape[:2]) for mark, item in zip(marks, loaded, strict=True)]
    states = {
        "disc": staged.enroll(staged.encode(loaded), shown),
        "corner": staged.enroll(staged.encode(loaded[:1]), [load_mask("box:0,0,30,40", (90, 120))]),
    }
    expected = staged.segment(staged.encode([loaded[1]]), states)
    found = deployment.segment(files[1], ["disc", "corner"])
    assert list(found) == ["disc", "corner"]
    for name in states:
        np.testing.assert_array_equal(found[name].mask, expected.binary(0, name))
        assert found[name].score == expected.score(0, name)


def test_hits_and_misses(deployment: Deployment) -> None:
    picture, mask = bright(30, 30)
    deployment.enroll("a", [picture], [mask])
    deployment.enroll("b", [bright(30, 30, 90)[0]], [mask])
    assert counted(deployment) == (0, 0)  # enrolling reads nothing
    deployment.segment(picture, ["a"])
    assert counted(deployment) == (0, 1)
    deployment.segment(picture, ["a", "a"])  # one look-up: a name twice is one class
    assert counted(deployment) == (1, 1)
    deployment.segment(picture)
    assert counted(deployment) == (2, 2)
    assert deployment.counters.entries == 2 and deployment.counters.bytes == 8
    deployment.enroll("a", [bright(30, 30, 150)[0]], [mask])
    assert deployment.segment(picture, ["a"])["a"].version == 2
    assert counted(deployment) == (2, 3)


def test_the_cache_keeps_what_was_used_last() -> None:
    def state(count: int) -> ClassState:
        return ClassState({"level": np.zeros(count, np.float32)}, 1, FINGERPRINT)

    cache = StateCache(100)
    for name in "abc":
        cache.put(name, state(10))
    assert cache.counters.bytes == 80 and cache.counters.entries == 2
    assert cache.get("a") is None and cache.get("b") is not None
    cache.put("d", state(10))  # c goes: b was used after it
    assert cache.get("c") is None and cache.get("b") is not None and cache.get("d") is not None
    cache.put("large", state(26))
    assert cache.get("large") is None and cache.counters.bytes == 80
    cache.put("b", state(10))
    assert cache.counters.bytes == 80
    assert (cache.counters.hits, cache.counters.misses) == (3, 3)


def test_no_cache_at_all(tmp_path: Path) -> None:
    deployment = Deployment(system(), tmp_path / "bank", cache_bytes=0)
    picture, mask = bright(30, 30)
    deployment.enroll("a", [picture], [mask])
    for _ in range(3):
        assert deployment.segment(picture)["a"].mask.any()
    assert counted(deployment) == (0, 3) and deployment.counters.bytes == 0


def test_another_process_enrols_anew(deployment: Deployment) -> None:
    picture, mask = bright(30, 30)
    deployment.enroll("a", [picture], [mask])
    first = deployment.segment(picture)["a"]
    code = (
        "import sys; from tests.test_deployment import *;"
        "picture, mask = bright(30, 30, 60);"
        "print(Deployment(system(), sys.argv[1]).enroll('a', [picture], [mask]).version)"
    )
    command = [sys.executable, "-c", code, str(deployment.bank)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "2\n"
    second = deployment.segment(picture)["a"]
    assert (first.version, second.version) == (1, 2)
    assert first.mask.any() and not second.mask.any()


def test_adding_shots(deployment: Deployment) -> None:
    picture, mask = bright(30, 30, 100)
    other = bright(30, 30, 200)[0]
    refused("bank_missing", lambda: deployment.enroll("a", [picture], [mask], add=True))
    assert deployment.enroll("a", [picture], [mask]).shots == 1
    added = deployment.enroll("a", [other], [mask], add=True)
    assert (added.version, added.shots) == (2, 2)
    refused("class_unknown", lambda: deployment.enroll("b", [picture], [mask], add=True))
    together = Deployment(system(), deployment.bank.with_name("together"))
    together.enroll("a", [picture, other], [mask, mask])
    level = Bank.open(deployment.bank).get("a").tensors["level"]
    np.testing.assert_allclose(level, Bank.open(together.bank).get("a").tensors["level"], rtol=1e-6)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/abs", "a/b", "..", "C:\\x", "ключ 鍵 🔑", "e\u0301", "%2e%2e"])
def test_any_text_is_a_name_and_never_a_path(deployment: Deployment, tmp_path: Path, name: str) -> None:
    picture, mask = bright(30, 30)
    deployment.enroll("first", [picture], [mask])
    before = files(tmp_path)
    enrolled = deployment.enroll(name, [picture], [mask])
    assert list(deployment.segment(picture, [name])) == [enrolled.name]
    assert enrolled.name in deployment.classes()
    assert files(tmp_path) == before  # not even a new file: it is the same state


def test_one_visible_name_is_one_class(deployment: Deployment) -> None:
    picture, mask = bright(30, 30)
    assert deployment.enroll("e\u0301", [picture], [mask]).version == 1
    assert deployment.enroll("\u00e9", [picture], [mask]).version == 2
    assert list(deployment.segment(picture, ["\u00e9", "e\u0301"])) == ["\u00e9"]


def test_what_cannot_be_done_leaves_nothing_behind(deployment: Deployment, tmp_path: Path) -> None:
    picture, mask = bright(30, 40)
    assert deployment.classes() == []
    refused("bank_missing", lambda: deployment.segment(picture))
    for name in ("", " ", "a\nb", "x" * 201, "\x00"):
        refused("class_name", lambda name=name: deployment.enroll(name, [picture], [mask]))
    refused("no_pictures", lambda: deployment.enroll("a", [], []))
    refused("masks_count", lambda: deployment.enroll("a", [picture], []))
    refused("file_missing", lambda: deployment.enroll("a", [tmp_path / "none.png"], [mask]))
    refused("file_empty", lambda: deployment.enroll("a", [b""], [mask]))
    assert "mask 2" in refused("mask_size", lambda: deployment.enroll("a", [picture] * 2, [mask, mask.T]))
    assert "mask 2" in refused("mask_size", lambda: deployment.enroll("a", [picture] * 2, [mask, png(mask.T)]))
    assert "picture 2" in refused(
        "picture_unreadable", lambda: deployment.enroll("a", [picture, b"what is this?"], [mask, mask])
    )
    for bad in (picture[..., 0], picture.astype(np.float32), picture[:0], np.array(None)):
        refused("not_a_picture", lambda bad=bad: deployment.enroll("a", [bad], [mask]))
        refused("not_a_picture", lambda bad=bad: deployment.segment(bad, ["a"]))
    assert not deployment.bank.exists()
    deployment.enroll("a", [picture], [mask])
    refused("class_unknown", lambda: deployment.segment(picture, ["a", "b"]))
    refused("no_classes", lambda: deployment.segment(picture, []))
    with Bank.open(deployment.bank) as bank:
        bank.remove("a")
    refused("class_unknown", lambda: deployment.segment(picture, ["a"]))
    refused("bank_empty", lambda: deployment.segment(picture))


def test_limits(tmp_path: Path) -> None:
    deployment = Deployment(system(), tmp_path / "bank", max_pixels=1000, max_mask_bytes=1500)
    picture, mask = bright(20, 50)
    large, _ = bright(20, 51)
    deployment.enroll("a", [picture] * 4, [mask] * 4)
    refused("pictures_too_large", lambda: deployment.enroll("a", [picture] * 5, [mask] * 5))
    for source in (large, png(large), npy(large)):
        assert "0.001 million" in refused("picture_too_large", lambda source=source: deployment.segment(source))
    refused("picture_too_large", lambda: deployment.enroll("a", [picture], [png(np.ones((20, 51), bool))]))
    deployment.enroll("b", [picture], [mask])
    assert len(deployment.segment(picture[:10])) == 2
    refused("masks_too_large", lambda: deployment.segment(picture))


def test_a_bank_put_in_the_place_of_another(deployment: Deployment) -> None:
    picture, mask = bright(30, 30)
    deployment.enroll("a", [picture], [mask])
    before = deployment.segment(picture)["a"]
    other = Deployment(system(), deployment.bank.with_name("other"))
    other.enroll("a", [bright(30, 30, 60)[0]], [mask])
    shutil.move(deployment.bank, deployment.bank.with_name("old"))
    refused("bank_missing", lambda: deployment.segment(picture))
    shutil.move(other.bank, deployment.bank)
    after = deployment.segment(picture)["a"]
    assert (before.version, after.version) == (1, 1)  # the number alone would not tell them apart
    assert before.mask.any() and not after.mask.any()
    shutil.rmtree(deployment.bank)
    Bank.open(deployment.bank, "0" * 64, create=True).close()
    refused("bank_of_other_artifact", lambda: deployment.segment(picture), IntegrityError)


def test_a_class_pruned_between_index_and_file(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, mask = bright(30, 30)
    deployment.enroll("a", [picture], [mask])
    newest: Callable[..., object] = Bank.newest
    calls = []

    def newest_then_enrolled(bank: Bank, names: list[str] | None = None) -> object:
        listed = newest(bank, names)
        if not calls:
            Deployment(system(), deployment.bank).enroll("a", [bright(30, 30, 60)[0]], [mask])
            bank.prune()
        calls.append(listed)
        return listed

    monkeypatch.setattr(Bank, "newest", newest_then_enrolled)
    assert deployment.segment(picture)["a"].version == 2
    assert len(calls) == 2


def test_threads_never_see_a_mixture(deployment: Deployment) -> None:
    """Version v of the class is enrolled from grey 20 v: mask and version must belong together."""
    mask = np.ones((30, 30), bool)

    def grey(version: int) -> np.ndarray:
        return np.full((30, 30, 3), 20 * version, np.uint8)

    deployment.enroll("a", [grey(1)], [mask])
    problems: list[object] = []
    done = threading.Event()

    def ask(level: int) -> None:
        try:
            while not done.is_set():
                found = deployment.segment(grey(level), ["a"])["a"]
                # The system finds what is less than 30 away in brightness.
                if found.mask.all() != (abs(found.version - level) * 20 < 30):
                    problems.append((level, found.version))
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=ask, args=(level,)) for level in (1, 4, 7, 10)]
    for thread in threads:
        thread.start()
    for version in range(2, 11):
        assert deployment.enroll("a", [grey(version)], [mask]).version == version
    done.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert deployment.segment(grey(10))["a"].version == 10


def test_a_damaged_state_is_named(deployment: Deployment) -> None:
    picture, mask = bright(30, 30)
    deployment.enroll("a", [picture], [mask])
    (file,) = (deployment.bank / "states").iterdir()
    file.write_bytes(b"x" + file.read_bytes()[1:])
    with pytest.raises(IntegrityError) as caught:
        deployment.segment(picture)
    assert caught.value.code == "state_damaged" and "'a'" in str(caught.value)


def test_it_never_imports_torch() -> None:
    code = "import sys, fssdeploy.deployment; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_fingerprint_of_another_artifact(tmp_path: Path) -> None:
    Bank.open(tmp_path / "bank", "0" * 64, create=True).close()
    deployment = Deployment(system(), tmp_path / "bank")
    picture, mask = bright(30, 30)
    with pytest.raises(IntegrityError):
        deployment.enroll("a", [picture], [mask])
    with pytest.raises((IntegrityError, InputError)):
        deployment.segment(picture)


def test_a_rehearsal_needs_no_bank_and_leaves_none(tiny_artifact: Path, tmp_path: Path, picture: np.ndarray) -> None:
    deployment = open_deployment(tiny_artifact, tmp_path / "bank", threads=1)
    ((name, found),) = deployment.rehearse(picture).items()
    assert found.mask.shape == picture.shape[:2] and found.version == 0
    assert not (tmp_path / "bank").exists()
    with pytest.raises(InputError):  # nobody can enrol a class of this name
        deployment.enroll(name, [picture], [np.ones(picture.shape[:2], bool)])
