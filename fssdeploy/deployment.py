"""Enrolled classes in use: a system and its bank behind two calls. The local API, and what the server runs.

Never imports torch.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fssdeploy.artifact import load
from fssdeploy.bank.bank import Bank, VersionInfo
from fssdeploy.bank.names import class_name
from fssdeploy.bank.store import store_class
from fssdeploy.errors import InputError
from fssdeploy.images.masks import Mask, load_mask, mask_from_array
from fssdeploy.images.pictures import MAX_PIXELS, check_picture, load_picture
from fssdeploy.pipeline import StagedSystem
from fssdeploy.protocol import ClassState

CACHE_BYTES = 256 * 2**20
REHEARSAL = "\0rehearsal"  # no class of a bank can be called so
# All pictures of one enrolment are in memory at once: together they may have this many times the pixels of one.
PICTURES_OF_ENROLMENT = 4

# A path, the bytes of a file (as `load_picture` and `load_mask` take them), or an array.
PictureSource = str | os.PathLike[str] | bytes | np.ndarray
MaskSource = str | os.PathLike[str] | bytes | np.ndarray


@dataclass(frozen=True)
class Enrolled:
    """What an enrolment stored: the class by its normalised name, its new version, and the shots behind that."""

    name: str
    version: int
    shots: int


@dataclass(frozen=True)
class Found:
    """One class in one picture: mask bool (H, W), the mean probability inside it (0 if empty), the class's version."""

    mask: np.ndarray
    score: float
    version: int


@dataclass(frozen=True)
class Counters:
    """The cache of class states: look-ups answered from it and not, and what it holds."""

    hits: int
    misses: int
    bytes: int
    entries: int


class StateCache:
    """Class states by the sha256 of their files, those used last, up to a number of bytes. Safe among threads.

    The sha256 comes from the bank's index at every request, so nothing here can be out of date.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._states: OrderedDict[str, tuple[ClassState, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._hits = self._misses = self._bytes = 0

    def get(self, sha256: str) -> ClassState | None:
        """The state, which then counts as the one used last; None, and a miss, if it is not here."""
        with self._lock:
            if sha256 not in self._states:
                self._misses += 1
                return None
            self._hits += 1
            self._states.move_to_end(sha256)
            return self._states[sha256][0]

    def put(self, sha256: str, state: ClassState) -> None:
        """Keep a state and let go of those not used for longest; one larger than the limit is not kept."""
        size = sum(array.nbytes for array in state.tensors.values())
        with self._lock:
            if size > self._limit or sha256 in self._states:
                return
            self._states[sha256] = (state, size)
            self._bytes += size
            while self._bytes > self._limit:
                self._bytes -= self._states.popitem(last=False)[1][1]

    @property
    def counters(self) -> Counters:
        with self._lock:
            return Counters(self._hits, self._misses, self._bytes, len(self._states))


class Deployment:
    """A system with the bank of its classes. Safe among threads; other processes may change the bank meanwhile.

    The bank is looked at in every call, so a class that any process enrols or removes is seen by the next call, and a
    bank that does not exist yet is made by the first enrolment. One call sees one version of each class.
    `max_pixels` limits a picture, `PICTURES_OF_ENROLMENT` times as many all pictures of an enrolment, `max_mask_bytes`
    the masks of one call, of one byte for each pixel and class.
    """

    def __init__(
        self,
        system: StagedSystem,
        bank: str | os.PathLike[str],
        *,
        cache_bytes: int = CACHE_BYTES,
        max_pixels: int = MAX_PIXELS,
        max_mask_bytes: int | None = None,
    ) -> None:
        self.system = system
        self.bank = Path(bank).absolute()
        self._max_pixels = max_pixels
        self._max_mask_bytes = max_mask_bytes
        self._cache = StateCache(cache_bytes)
        self._lock = threading.Lock()
        self._opened: tuple[Bank, tuple[int, int] | None] | None = None

    def enroll(
        self, name: str, pictures: Sequence[PictureSource], masks: Sequence[MaskSource], *, add: bool = False
    ) -> Enrolled:
        """Store a class from its pictures and one mask for each; with `add`, the shots join its newest version.

        Sources are paths, the bytes of files, or arrays: pictures uint8 (H, W, 3), masks as `mask_from_array`; a mask
        may also be ``box:...`` or ``polygon:...`` as in `load_mask`. When this returns, the version is on disk.
        Raises InputError, IntegrityError and MachineError of reading, of `StagedSystem.enroll` and of `store_class`.
        """
        name = class_name(name)
        if len(pictures) != len(masks):
            raise InputError(
                "masks_count",
                f"{len(pictures)} pictures came with {len(masks)} masks",
                "",
                "Give one mask for each picture.",
            )
        if add:  # known before the work: there is something to add to
            self._current_bank().newest([name])
        loaded: list[np.ndarray] = []
        pixels = 0
        for number, source in enumerate(pictures, 1):
            picture = self._picture(source, f"picture {number}")
            pixels += picture.shape[0] * picture.shape[1]
            if pixels > PICTURES_OF_ENROLMENT * self._max_pixels:
                raise InputError(
                    "pictures_too_large",
                    f"the {len(pictures)} pictures are too large together",
                    f"they have more than {PICTURES_OF_ENROLMENT * self._max_pixels / 1e6:g} million pixels",
                    "Enrol some of them, and add the others later.",
                )
            loaded.append(picture)
        marked = [
            self._mask(source, picture, f"mask {number}")
            for number, (source, picture) in enumerate(zip(masks, loaded, strict=True), 1)
        ]
        state = self.system.enroll(self.system.encode(loaded), marked)
        version, shots = store_class(self.bank, name, state, add=add)
        return Enrolled(name, version, shots)

    def segment(self, picture: PictureSource, names: Sequence[str] | None = None) -> dict[str, Found]:
        """Look for classes (default: all of the bank) in a picture: what was found, by normalised name, in their order.

        Raises InputError ``bank_missing``, ``bank_empty``, ``no_classes``, ``class_unknown`` and those of reading the
        picture; IntegrityError; MachineError.
        """
        loaded = self._picture(picture, "picture")
        states = self._states(names)
        size = len(states) * loaded.shape[0] * loaded.shape[1]
        if self._max_mask_bytes is not None and size > self._max_mask_bytes:
            raise InputError(
                "masks_too_large",
                f"the masks of {len(states)} classes in this picture are too large together",
                f"they have {size / 2**20:.0f} MiB, at most {self._max_mask_bytes / 2**20:g} MiB are allowed",
                "Ask for fewer classes at a time, or send a smaller picture.",
            )
        features = self.system.encode([loaded])
        found = {}
        for name, (info, state) in states.items():  # one by one: logits at the picture's size are large
            masks = self.system.segment(features, {name: state})
            found[name] = Found(masks.binary(0, name), masks.score(0, name), info.version)
        return found

    def segment_once(
        self, pictures: Sequence[PictureSource], supports: Sequence[PictureSource], masks: Sequence[MaskSource]
    ) -> list[Found]:
        """Look for what the masks mark in the supports in other pictures; nothing is stored, every version is 0.

        Raises InputError ``masks_count`` and those of reading, of `StagedSystem.encode` and `StagedSystem.enroll`.
        """
        if len(supports) != len(masks):
            raise InputError(
                "masks_count",
                f"{len(supports)} support pictures came with {len(masks)} masks",
                "",
                "Send one mask for each support picture.",
            )
        loaded = [self._picture(source, f"support picture {number}") for number, source in enumerate(supports, 1)]
        marked = [
            self._mask(source, picture, f"mask {number}")
            for number, (source, picture) in enumerate(zip(masks, loaded, strict=True), 1)
        ]
        searched = [self._picture(source, f"picture {number}") for number, source in enumerate(pictures, 1)]
        state = self.system.enroll(self.system.encode(loaded), marked)
        found = self.system.segment(self.system.encode(searched), {"object": state})
        return [Found(found.binary(i, "object"), found.score(i, "object"), 0) for i in range(len(searched))]

    def rehearse(self, picture: PictureSource) -> dict[str, Found]:
        """What `segment` does, with the picture's own middle as the one class: all its code runs, no bank is needed.

        The class is called `REHEARSAL`, its version is 0. Raises the errors of reading the picture.
        """
        loaded = self._picture(picture, "picture")
        height, width = loaded.shape[:2]
        middle = np.zeros((height, width), bool)
        middle[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
        features = self.system.encode([loaded])
        masks = self.system.segment(features, {REHEARSAL: self.system.enroll(features, [middle])})
        return {REHEARSAL: Found(masks.binary(0, REHEARSAL), masks.score(0, REHEARSAL), 0)}

    def classes(self) -> list[str]:
        """The names of the classes; none where the bank does not exist yet."""
        try:
            return self._current_bank().names()
        except InputError as error:
            if error.code != "bank_missing":
                raise
            return []

    @property
    def counters(self) -> Counters:
        """What the cache of class states did so far."""
        return self._cache.counters

    def _picture(self, source: PictureSource, name: str) -> np.ndarray:
        if isinstance(source, np.ndarray):
            return check_picture(source, name, max_pixels=self._max_pixels)
        return load_picture(source, name if isinstance(source, bytes) else None, max_pixels=self._max_pixels)

    def _mask(self, source: MaskSource, picture: np.ndarray, name: str) -> Mask:
        if isinstance(source, np.ndarray):
            return mask_from_array(source, name)
        called = name if isinstance(source, bytes) else None
        return load_mask(source, picture.shape[:2], name=called, max_pixels=self._max_pixels)

    def _states(self, names: Sequence[str] | None) -> dict[str, tuple[VersionInfo, ClassState]]:
        """The newest versions of the classes, as they are listed at one moment, with their states."""
        if names is not None and not names:
            raise InputError("no_classes", "there is no class to look for", "no name was given", "Name at least one.")
        bank = self._current_bank()
        while True:
            infos = bank.newest(names)
            if not infos:
                raise InputError(
                    "bank_empty", f"bank '{self.bank}' holds no class", "", "Enrol one with fssdeploy enroll."
                )
            states = {info.name: (info, state) for info in infos if (state := self._state(bank, info)) is not None}
            if len(states) == len(infos):
                return states
            # One was removed or pruned between the two steps: what is listed now counts.

    def _state(self, bank: Bank, info: VersionInfo) -> ClassState | None:
        state = self._cache.get(info.sha256)
        if state is None:
            state = bank.read(info)
            if state is not None:
                self._cache.put(info.sha256, state)
        return state

    def _current_bank(self) -> Bank:
        """The bank as it stands at its place now: opened once, and again when another was put there."""
        with self._lock:
            place = self._place()
            if self._opened is None or self._opened[1] != place:
                # The one before is not closed: another thread may be reading it.
                self._opened = Bank.open(self.bank, self.system.fingerprint), place
            return self._opened[0]

    def _place(self) -> tuple[int, int] | None:
        """What tells one index file from another at the same path; None if there is none."""
        try:
            status = os.stat(self.bank / "index.sqlite")
        except OSError:  # opening the bank says what is wrong
            return None
        return status.st_dev, status.st_ino


def open_deployment(
    artifact: str | os.PathLike[str],
    bank: str | os.PathLike[str],
    runtime: str = "onnxruntime",
    threads: int | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Deployment:
    """The deployment of an exported artifact with a bank, which need not exist yet. Raises what `load` raises."""
    return Deployment(load(artifact, runtime, threads=threads), bank, cache_bytes=cache_bytes)
