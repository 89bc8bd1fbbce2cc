"""New weights into a live repository, and back, without a failed request.

A version is written beside the others under a name that the server skips, compiled, forced to disk, and renamed: it
appears whole or not at all (an incomplete one makes the server wait for ever). Then the server loads it: until the new
version has answered its warm-up the old one serves. At last the server's answer is held against the local one of the
same artifact; whatever fails takes everything back.

Only weights with the same fingerprint can follow each other: features and class states of both versions may meet, in
one request while the models change over, and in the bank.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fssdeploy import __version__
from fssdeploy.artifact import Artifact, load
from fssdeploy.errors import CheckFailedError, InputError, IntegrityError, MachineError
from fssdeploy.files import storage_error, sync_folder, write_atomic
from fssdeploy.report import Report
from fssdeploy.serving.control import Control, NoAnswerError, Tensor
from fssdeploy.serving.names import ARTIFACT, Names
from fssdeploy.serving.repository import (
    MANIFEST,
    Repository,
    origin,
    pack_strings,
    png,
    sample_shot,
    sealed_text,
    seals,
    sync_tree,
    write_version,
)

LOAD_SECONDS = 600.0
PROBE_SECONDS = 120.0
# Pixels that may differ between the server and this machine: none with the same runtime, some with another or a GPU.
PROBE_DIFFERENCE = 0.02

# The server reads leading digits of a folder's name as a version, so that "2.old" would be version 2.
_HIDDEN = re.compile(r"\.[0-9a-f]{16}")

Progress = Callable[[str], None]


def promote(
    directory: Path,
    system: str,
    artifact_path: Path,
    url: str | None = None,
    plans: Path | None = None,
    progress: Progress = lambda _: None,
) -> Report:
    """Serve a system's new weights from `artifact_path` as the next version of its models.

    With `url` (host:port) the server there loads them; without, it takes them when it starts. Raises InputError or
    IntegrityError for an artifact that cannot follow the one served, CheckFailedError `promotion_failed` when the
    server refuses it or answers wrongly; in all cases the version before goes on serving and nothing stays behind.
    """
    control = None if url is None else _control(url)
    with _locked(directory):
        repository, names = _opened(directory, system)
        artifact = Artifact.open(artifact_path)
        artifact.verify()
        _check_successor(repository, names, artifact)
        number = _next(repository, names)
        progress(f"writing version {number}")
        staged = _stage(repository, names, artifact, number, plans)
        placed = {folder: folder.with_name(str(number)) for folder in staged}
        try:
            for folder, target in placed.items():
                _rename(folder, target)
            if control:
                _load(control, names, number, progress)
                progress("probing")
                _probe(control, names, artifact)
        except BaseException as error:
            _take_back(placed, control, names)
            if isinstance(error, _RefusedError):
                raise CheckFailedError(
                    "promotion_failed",
                    f"version {number} of '{system}' was not promoted",
                    str(error),
                    f"Version {repository.manifest['systems'][system]['current']} goes on serving.",
                ) from error
            raise
        entry = {**repository.manifest["systems"][system], "current": number, "last": number}
        entry["versions"] = {**entry["versions"], str(number): origin(artifact)}
        _seal(repository, names, entry)
    return _report("promoted", directory, names, number, artifact.manifest["digest"], url)


def rollback(directory: Path, system: str, url: str | None = None, progress: Progress = lambda _: None) -> Report:
    """Serve the version before the newest again, and remove the newest.

    Raises InputError `no_earlier_version`, CheckFailedError `rollback_failed` when the server refuses it (the newest
    goes on serving).
    """
    control = None if url is None else _control(url)
    with _locked(directory):
        repository, names = _opened(directory, system)
        entry = repository.manifest["systems"][system]
        current = entry["current"]
        earlier = [int(number) for number in entry["versions"] if int(number) < current]
        if not earlier:
            raise InputError(
                "no_earlier_version",
                f"'{system}' has no version before {current}",
                "",
                "Promote other weights instead.",
            )
        number = max(earlier)
        # What an interrupted promotion left is newer than what the manifest knows, and would be served.
        newer = [
            folder
            for model in names.versioned
            for folder in (repository.path / model).iterdir()
            if folder.name.isdecimal() and int(folder.name) > number
        ]
        retired = {folder: _hidden(folder.parent) for folder in newer}
        try:
            for folder, target in retired.items():
                _rename(folder, target)
            if control:
                _load(control, names, number, progress)
        except BaseException as error:
            _take_back(retired, control, names, remove=False)
            if isinstance(error, _RefusedError):
                raise CheckFailedError(
                    "rollback_failed",
                    f"'{system}' was not rolled back to version {number}",
                    str(error),
                    f"Version {current} goes on serving.",
                ) from error
            raise
        for target in retired.values():
            shutil.rmtree(target, ignore_errors=True)
        versions = {key: value for key, value in entry["versions"].items() if int(key) <= number}
        _seal(repository, names, {**entry, "current": number, "versions": versions})
    return _report("rolled back", directory, names, number, versions[str(number)]["digest"], url)


class _RefusedError(Exception):
    """The server does not serve what it should."""


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Nobody else promotes or rolls back meanwhile. MachineError `repository_busy`."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise InputError(
                "repository_missing",
                f"'{directory}' is not a repository",
                "",
                "Name a directory that fssdeploy repo wrote.",
            ) from error
        raise storage_error(error, directory) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise MachineError(
                "repository_busy",
                f"'{directory}' is being changed",
                "another promotion or rollback is running",
                "Wait for it.",
            ) from error
        yield
    finally:
        os.close(descriptor)


def _opened(directory: Path, system: str) -> tuple[Repository, Names]:
    """The repository and the system's names, freed of what a killed promotion had not yet put in place."""
    repository = Repository.open(directory)
    written = repository.manifest["fssdeploy"]
    if written != __version__:
        raise IntegrityError(
            "repository_version",
            f"fssdeploy {written} wrote '{directory}'",
            f"this is fssdeploy {__version__}, whose models do not fit its configs",
            "Write it again with this version.",
        )
    known = {names.system: names for names in repository.systems}
    if system not in known:
        raise InputError(
            "system_unknown",
            f"'{repository.path}' serves no system '{system}'",
            f"it serves {', '.join(known)}",
            "Name one of these.",
        )
    for model in known[system].versioned:
        for folder in (repository.path / model).iterdir():
            if _HIDDEN.fullmatch(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
    return repository, known[system]


def _check_successor(repository: Repository, names: Names, artifact: Artifact) -> None:
    """Whether an artifact may follow the one that is served."""
    entry = repository.manifest["systems"][names.system]
    served = entry["versions"][str(entry["current"])]
    if artifact.fingerprint != served["fingerprint"]:
        raise IntegrityError(
            "other_fingerprint",
            f"artifact '{artifact.path}' cannot follow the one that '{names.system}' serves",
            f"its encoder, enrolment or preprocessing differ ({artifact.fingerprint[:12]}, served is "
            f"{served['fingerprint'][:12]}): the enrolled classes would not fit",
            "Write a repository of its own, with a bank of its own.",
        )
    if artifact.manifest["digest"] == served["digest"]:
        raise InputError(
            "already_served", f"'{names.system}' already serves this artifact", "", "Name another, or leave it so."
        )
    folder = repository.path / names.segment / str(entry["current"]) / ARTIFACT
    old = Artifact.open(folder).manifest
    if any(old["stages"][stage]["spec"] != spec.to_dict() for stage, spec in artifact.specs.items()):
        raise InputError(
            "other_shapes",
            f"artifact '{artifact.path}' has stages of other shapes than the one served",
            "the models' configs are made for those",
            "Export it with the same options (--dynamic-batch), or write a new repository.",
        )


def _next(repository: Repository, names: Names) -> int:
    """A number that no version ever had: caches and clients may remember it."""
    taken = [repository.manifest["systems"][names.system]["last"]]
    for model in names.versioned:
        taken += [int(each.name) for each in (repository.path / model).iterdir() if each.name.isdecimal()]
    return int(max(taken)) + 1


def _stage(repository: Repository, names: Names, artifact: Artifact, number: int, plans: Path | None) -> list[Path]:
    """The new version of every model that carries weights, complete and on disk, each in a hidden folder beside."""
    staged: list[Path] = []
    try:
        for model in names.versioned:
            folder = _hidden(repository.path / model)
            staged.append(folder)
            write_version(folder, model, names, artifact, repository.options, plans)
            sync_tree(folder)
    except BaseException as error:
        for folder in staged:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise storage_error(error, repository.path) from error
        raise
    return staged


def _hidden(model: Path) -> Path:
    """A new name beside a model's versions that the server skips."""
    return model / f".{secrets.token_hex(8)}"


def _rename(folder: Path, target: Path) -> None:
    try:
        os.rename(folder, target)
        sync_folder(target.parent)
    except OSError as error:
        raise storage_error(error, target) from error


def _take_back(placed: Mapping[Path, Path], control: Control | None, names: Names, *, remove: bool = True) -> None:
    """Undo renames, load what is there then, and remove what was undone."""
    for folder, target in placed.items():
        if target.exists():
            os.rename(target, folder)
    if control:
        for model in names.versioned:
            try:
                control.load(model, timeout=LOAD_SECONDS)
            except NoAnswerError:
                break  # it has gone, and will find the old versions when it starts
    for folder in placed if remove else ():
        shutil.rmtree(folder, ignore_errors=True)


def _load(control: Control, names: Names, number: int, progress: Progress) -> None:
    """Have the server load every model, and make sure that it serves version `number`."""
    for model in names.versioned:
        progress(f"loading {model}")
        try:
            answer = control.load(model, timeout=LOAD_SECONDS)
            if not answer.ok:
                raise _RefusedError(f"the server does not load '{model}': {_gist(answer.error)}")
            states = [state for state in control.states() if state["name"] == model]
        except NoAnswerError as error:
            raise _RefusedError(f"the server did not answer: {error}") from error
        ready = [state.get("version") for state in states if state.get("state") == "READY"]
        if ready != [str(number)]:
            served = " and ".join(map(str, ready)) or "none"
            raise _RefusedError(f"the server serves version {served} of '{model}': does it run on this repository?")


def _probe(control: Control, names: Names, artifact: Artifact) -> None:
    """One stateless request with a rendered picture, held against the local answer of the same artifact."""
    (picture, mask), (query, _) = sample_shot(0), sample_shot(1)
    inputs = {"pictures": query, "support_pictures": picture, "support_masks": mask}
    tensors = [Tensor(name, "BYTES", [1], pack_strings([png(array)])) for name, array in inputs.items()]
    try:
        answer = control.infer(names.stateless, tensors, PROBE_SECONDS)
    except NoAnswerError as error:
        raise _RefusedError(f"the server did not answer the probe: {error}") from error
    if not answer.ok:
        raise _RefusedError(f"the server failed the probe: {_gist(answer.error)}")
    found = _first_output(answer.body, "masks", query.shape[:2])
    system = load(artifact.path, threads=1, verify=False)
    state = system.enroll(system.encode([picture]), [mask])
    expected = system.segment(system.encode([query]), {"sample": state}).binary(0, "sample")
    difference = float((found != expected).mean())
    if difference > PROBE_DIFFERENCE:
        raise _RefusedError(f"the server's mask of a rendered picture differs from the local one in {difference:.1%}")


def _first_output(body: bytes, name: str, size: tuple[int, ...]) -> np.ndarray:
    """The mask, bool (H, W), in an answer: JSON, then the outputs' bytes in the order in which the JSON lists them."""
    header, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    for output in header["outputs"]:
        length = output["parameters"]["binary_data_size"]
        if output["name"] == name and length == size[0] * size[1]:
            return np.frombuffer(body, np.uint8, length, end).reshape(size).astype(bool)
        end += length
    raise _RefusedError(f"the server's answer holds no '{name}' of the picture's size")


def _seal(repository: Repository, names: Names, entry: Mapping[str, Any]) -> None:
    """Write the manifest with a system's new entry and the files of its models as they are now."""
    models = set(names.versioned)
    files = {name: seal for name, seal in repository.manifest["files"].items() if name.split("/")[0] not in models}
    for model in names.versioned:
        files |= seals(repository.path, repository.path / model)
    systems = {**repository.manifest["systems"], names.system: dict(entry)}
    content = {**repository.manifest, "systems": systems, "files": dict(sorted(files.items()))}
    write_atomic(repository.path / MANIFEST, sealed_text(content).encode(), sync=True)


def _control(url: str) -> Control:
    host, _, port = url.removeprefix("http://").rstrip("/").rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(
            "url", f"'{url}' is not the address of a server", "", "Give host:port, as fssdeploy serve prints it."
        )
    return Control(host.strip("[]"), int(port))


def _gist(text: str) -> str:
    return " ".join(text.split())[:400]


def _report(title: str, directory: Path, names: Names, number: int, digest: str, url: str | None) -> Report:
    facts = {"repository": str(directory), "system": names.system, "version": number, "artifact": digest[:16]}
    facts["server"] = url or "takes it when it starts"
    data = {"repository": str(directory), "system": names.system, "version": number, "digest": digest, "url": url}
    return Report(title, facts, [], [], data)
