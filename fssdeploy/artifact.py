"""An exported system on disk: a directory with a manifest that names, describes and seals every file.

Reading only; artifacts are written by fssdeploy.export. Never imports torch.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fssdeploy.errors import InputError, IntegrityError, MachineError
from fssdeploy.files import storage_error
from fssdeploy.protocol import StageSpec

if TYPE_CHECKING:
    from fssdeploy.pipeline import StagedSystem

FORMAT = 1
MANIFEST = "manifest.json"
# Systems with steps of their own between the stages; all others chain their stages by the names of the tensors.
_GLUE = {
    "gfsam": "fssdeploy.glue.gfsam.system:GFSam",
    "matcher": "fssdeploy.glue.matcher.system:Matcher",
    "persam": "fssdeploy.glue.persam.system:PerSam",
}


def digest(manifest: dict[str, Any]) -> str:
    """sha256 over the manifest without its own `digest` entry, in canonical JSON."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A directory with an intact manifest; the files themselves are checked by `verify`."""

    path: Path
    manifest: dict[str, Any]

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Artifact:
        """Read the manifest. InputError if there is none; IntegrityError if it is damaged, altered or too new."""
        folder = Path(path)
        file = folder / MANIFEST
        try:
            text = file.read_text("utf-8")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                "artifact_missing",
                f"'{folder}' is not an artifact",
                f"it holds no {MANIFEST}",
                "Run fssdeploy export, and name the directory it wrote.",
            ) from error
        except UnicodeDecodeError as error:
            raise _damaged(file, "it is not text") from error
        except OSError as error:
            raise storage_error(error, file) from error
        try:
            manifest = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _damaged(file, "it is not JSON") from error
        if not isinstance(manifest, dict) or "digest" not in manifest:
            raise _damaged(file, "it carries no digest")
        if manifest.get("format") != FORMAT:
            raise IntegrityError(
                "artifact_format",
                f"'{folder}' has artifact format {manifest.get('format')}",
                f"this version reads format {FORMAT}",
                "Export it again with this version.",
            )
        if manifest["digest"] != digest(manifest):
            raise _damaged(file, "its digest does not match its content: it was altered after export")
        artifact = Artifact(folder, manifest)
        artifact._check_content(file)
        return artifact

    @property
    def name(self) -> str:
        return f"{self.manifest['system']}-{self.manifest['preset']}"

    @property
    def fingerprint(self) -> str:
        """What banks are bound to: encoder and enrol weights and the preprocessing, whatever the precision."""
        return self.manifest["fingerprint"]

    @property
    def specs(self) -> dict[str, StageSpec]:
        return {name: StageSpec.from_dict(stage["spec"]) for name, stage in self.manifest["stages"].items()}

    @property
    def weights_note(self) -> str:
        """A sentence for every report when the weights are not trained, else an empty string."""
        weights = self.manifest["weights"]
        if weights["status"] == "trained":
            return ""
        missing = ", ".join(weights.get("untrained_groups", ()))
        return f"UNTRAINED weights ({missing}; seed {weights.get('seed')}): the masks mean nothing."

    def graph(self, stage: str, runtime: str) -> Path:
        """The graph of a stage for a runtime: its own file where there is one, else the portable one."""
        files = self.manifest["stages"][stage]["files"]
        return self.path / files.get(runtime, files["portable"])

    def verify(self) -> None:
        """Check presence, size and sha256 of every file; IntegrityError names the first that differs."""
        entries = self.manifest["files"]
        # Two threads: hashing releases the interpreter lock, and one large file dominates anyway.
        with ThreadPoolExecutor(2) as pool:
            for problem in pool.map(self._problem, entries):
                if problem:
                    raise IntegrityError(
                        "artifact_damaged",
                        f"artifact '{self.path}' is damaged",
                        problem,
                        "Export it again or copy it again.",
                    )

    def _check_content(self, file: Path) -> None:
        """IntegrityError unless what is read later is there, and every graph is a sealed file of this directory.

        The digest finds accidents; whoever alters a manifest on purpose can compute it anew.
        """
        manifest = self.manifest
        try:
            entries = [self.name, self.fingerprint, self.specs, manifest["precision"], manifest["weights"]["status"]]
            entries += [manifest["preprocessing"][key] for key in ("canvas", "patch", "geometry")]
            sealed = {name for name, entry in manifest["files"].items() if entry["sha256"] and entry["bytes"] >= 0}
            used = {name for stage in manifest["stages"].values() for name in stage["files"].values()}
            portable = all(stage["files"]["portable"] for stage in manifest["stages"].values())
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise _damaged(file, f"an entry is missing or makes no sense ({error!r})") from error
        if not (all(entries) and portable and used <= sealed and all(Path(name).name == name for name in sealed)):
            raise _damaged(file, "its entries do not belong together")

    def _problem(self, name: str) -> str:
        entry, file = self.manifest["files"][name], self.path / name
        try:
            size = file.stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
            return "" if file_sha256(file) == entry["sha256"] else f"{name} does not match its sha256"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            raise storage_error(error, file) from error


def load(
    path: str | os.PathLike[str], runtime: str = "onnxruntime", *, threads: int | None = None, verify: bool = True
) -> StagedSystem:
    """Open an artifact and return its system, ready for encode, enroll and segment.

    `runtime` is "onnxruntime" or "openvino"; `threads` defaults to the cores this process may use. With `verify`, the
    sha256 of every file is checked first. Raises InputError, IntegrityError or MachineError (runtime not installed).
    """
    from fssdeploy.engines import open_engine

    artifact = Artifact.open(path)
    if artifact.manifest["precision"] == "bf16" and runtime == "onnxruntime":
        raise InputError(
            "runtime_precision",
            f"ONNX Runtime cannot run '{artifact.path}'",
            "the artifact is bfloat16, which its CPU kernels do not take",
            "Use --runtime openvino.",
        )
    if verify:
        artifact.verify()
    graphs = {stage: artifact.graph(stage, runtime) for stage in artifact.manifest["stages"]}
    engine = open_engine(runtime, graphs, artifact.specs, threads=threads)
    opened = system_class(artifact.manifest["system"])
    return opened(artifact.name, artifact.specs, engine, artifact.manifest["preprocessing"], artifact.fingerprint)


def has_glue(system: str) -> bool:
    """Whether a system has steps of its own between its stages."""
    return system in _GLUE


def system_class(system: str) -> type[StagedSystem]:
    """What speaks the three verbs for a system; all are made as `StagedSystem` is.

    MachineError ``package_missing`` where it needs SciPy, which the base install does without.
    """
    module, _, name = _GLUE.get(system, "fssdeploy.pipeline:StagedSystem").partition(":")
    try:
        found: type[StagedSystem] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise MachineError(
            "package_missing", f"{system} needs SciPy", str(error), "Run: pip install 'fssdeploy[training-free]'"
        ) from error
    return found


def _damaged(file: Path, why: str) -> IntegrityError:
    return IntegrityError("manifest_damaged", f"'{file}' cannot be trusted", why, "Export or copy the artifact again.")
