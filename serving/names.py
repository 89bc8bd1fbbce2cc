"""What the models of a repository are called, and its files."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fssdeploy.errors import InputError

CONFIG = "config.pbtxt"
MODEL_CODE = "model.py"
GRAPH = "model.onnx"
PLAN = "model.plan"
SAMPLES = "warmup"  # the folder where the server looks for the data of warm-up requests
ARTIFACT = "artifact"  # the folder inside a version of the models of the enrolled path

STAGES = ("encoder", "enroll", "segment")

# A name becomes a folder and a part of URLs.
_SYSTEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Names:
    """The models of one system; the stateless one bears the system's own name.

    Where the stages of a system form a chain, that one is an ensemble of them and of helpers around them. A system with
    steps of its own between the stages is one Python model instead. InputError for a name that is not made of letters,
    digits, '_', '-' and '.'.
    """

    system: str
    parts: tuple[str, ...] = STAGES
    chained: bool = True

    def __post_init__(self) -> None:
        if not _SYSTEM.fullmatch(self.system):
            raise InputError(
                "system_name",
                f"{self.system!r} cannot name a system in a repository",
                "it becomes a folder: 1 to 64 letters, digits, '_', '-' and '.', beginning with a letter or digit",
                "Choose another: NAME=ARTIFACT.",
            )

    def stage(self, stage: str) -> str:
        return f"{self.system}_stage_{stage}"

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self.stage(stage) for stage in self.parts)

    @property
    def prepare_query(self) -> str:
        return f"{self.system}_prepare_query"

    @property
    def prepare_support(self) -> str:
        return f"{self.system}_prepare_support"

    @property
    def merge_shots(self) -> str:
        return f"{self.system}_merge_shots"

    @property
    def finish(self) -> str:
        return f"{self.system}_finish"

    @property
    def stateless(self) -> str:
        return self.system

    @property
    def enroll(self) -> str:
        return f"{self.system}_enroll"

    @property
    def segment(self) -> str:
        return f"{self.system}_segment"

    @property
    def versioned(self) -> tuple[str, ...]:
        """The models that carry weights, in the order in which a promotion loads them."""
        return (*self.stages, *self.holders)

    @property
    def holders(self) -> tuple[str, ...]:
        """The models that hold the whole artifact."""
        return (self.enroll, self.segment) if self.chained else (self.enroll, self.segment, self.stateless)

    @property
    def helpers(self) -> tuple[str, ...]:
        """The models around the stages of a chain, which are the same for all weights."""
        return (self.prepare_query, self.prepare_support, self.merge_shots, self.finish) if self.chained else ()

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.versioned, *self.helpers, *((self.stateless,) if self.chained else ()))
