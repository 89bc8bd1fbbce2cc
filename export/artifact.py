"""Writing an artifact: export every stage, lint, prove parity, seal with a manifest, rename into place.

Everything is written to a temporary sibling directory, which is renamed only when all checks hold: at every moment the
target is the old artifact, the new one, or absent.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import fssdeploy
from fssdeploy.artifact import FORMAT, MANIFEST, digest, file_sha256, system_class
from fssdeploy.engines import RUNTIMES, available_cores, open_engine
from fssdeploy.engines.torch import TorchEngine
from fssdeploy.errors import CheckFailedError, InputError, MachineError
from fssdeploy.export.lint import Finding, lint
from fssdeploy.export.onnx import OPSET, OPSET_BF16, StageFiles, export_stage
from fssdeploy.export.parity import check_parity, parity_report
from fssdeploy.files import staged_folder, storage_error, sync_folder
from fssdeploy.protocol import StageSpec
from fssdeploy.report import Report, Table
from fssdeploy.systems import SystemFile
from fssdeploy.weights.provenance import Provenance, fingerprint

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PARITY = "parity.json"
_OWN_FILE = re.compile(r"(manifest|parity)\.json|[a-z_]+(\.ort)?\.onnx(\.data)?")


@dataclass(frozen=True)
class ExportRequest:
    """What to export and how. `components` is "all" or some of the system's stages, comma-separated.

    InputError for an unknown component or precision.
    """

    system: SystemFile
    preset: str
    config: Any
    components: str = "all"
    precision: str = "fp32"
    dynamic_batch: bool = False

    def __post_init__(self) -> None:
        known = [*self.system.specs(self.config), "all"]
        unknown = [name for name in self._wanted() if name not in known]
        if unknown:
            raise InputError(
                "component_unknown", f"there is no component '{unknown[0]}'", "", f"Choose from: {', '.join(known)}."
            )
        if self.precision not in PRECISIONS:
            raise InputError(
                "precision_unknown",
                f"there is no precision '{self.precision}'",
                "",
                f"Choose from: {', '.join(PRECISIONS)}.",
            )

    @property
    def specs(self) -> dict[str, StageSpec]:
        """Contracts of the chosen stages, in their order; without a dynamic batch it is fixed at 1.

        The rows of a stage with inputs that they share are prompts, whose number always varies.
        """
        specs = self.system.specs(self.config)
        wanted = list(specs) if "all" in self._wanted() else self._wanted()
        chosen = {name: spec for name, spec in specs.items() if name in wanted}
        if self.dynamic_batch:
            return chosen
        return {name: spec if spec.shared else one_row(spec) for name, spec in chosen.items()}

    def _wanted(self) -> list[str]:
        return [part.strip() for part in self.components.split(",")]


def plan(request: ExportRequest) -> Report:
    """What an export would write, without weights: files, shapes, parameters, estimated size."""
    with torch.device("meta"):
        model = request.system.build(request.config)
    width = torch.empty(0, dtype=PRECISIONS[request.precision]).element_size()
    table = Table("files", ["file", "inputs", "outputs", "parameters", "MB"], [])
    total, stages = 0.0, {}
    for name, spec in request.specs.items():
        count = request.system.stage_parameters(model, name)
        size = count * width / 1e6
        total += size
        inputs, outputs = (
            "\n".join(f"{tensor.name} {tensor.dtype} {tensor.shape_text()}" for tensor in side)
            for side in (spec.inputs, spec.outputs)
        )
        table.rows.append([f"{name}.onnx + .onnx.data", inputs, outputs, f"{count:,}", f"{size:.1f}"])
        stages[name] = {"parameters": count, "megabytes": size, "spec": spec.to_dict()}
    facts = {"preset": request.preset, "precision": request.precision, "estimated size": f"{total:.1f} MB"}
    data = {"dry_run": True, "preset": request.preset, "stages": stages, "megabytes": total}
    return Report("export plan (nothing written)", facts, [table], [f"Also: {MANIFEST}, {PARITY}."], data)


def export_artifact(
    model: torch.nn.Module,
    provenance: Provenance,
    request: ExportRequest,
    out: str | os.PathLike[str],
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Export, lint and check `model`, then put the artifact at `out`, replacing an artifact that is there.

    CheckFailedError if lint or parity fails, InputError if `out` is something else than an artifact, MachineError if
    it cannot be written; in all cases nothing stays behind and what was at `out` is untouched.
    """
    target = Path(os.path.realpath(out))  # a link to an artifact stays a link
    with _staging(target) as folder:
        files, findings = _write_graphs(model, request, folder, progress)
        parity = _check(model, request, folder, files, progress)
        (folder / PARITY).write_text(json.dumps(parity, indent=1), "utf-8")
        progress("sealing")
        manifest = _manifest(model, provenance, request, folder, files)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        _sync(folder)
        _promote(folder, target)
    return _report(Path(out), manifest, parity, findings)


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target`, gone afterwards whatever happens; refuses to replace what is not an artifact."""
    if foreign := _foreign(target):
        raise InputError(
            "out_occupied",
            f"'{target}' exists and is not an artifact",
            f"'{foreign}' would be lost",
            "Choose another --out.",
        )
    with staged_folder(target) as folder:
        try:
            yield folder
        except OSError as error:
            # NumPy, which writes the weights, gives no number for a write that stops short: the disk is full.
            raise storage_error(error if error.errno else OSError(errno.ENOSPC, str(error)), target) from error


def _foreign(target: Path) -> str:
    """The name of something at `target` that no export writes; empty if there is none."""
    if not target.is_dir():
        return target.name if target.exists() else ""
    return next((path.name for path in target.iterdir() if path.is_dir() or not _OWN_FILE.fullmatch(path.name)), "")


def _write_graphs(
    model: torch.nn.Module, request: ExportRequest, folder: Path, progress: Callable[[str], None]
) -> tuple[dict[str, StageFiles], list[Finding]]:
    """All graphs of the chosen stages, linted. CheckFailedError names the first broken rule."""
    parity_runtimes(request.precision)  # before the long work, not after it
    modules = request.system.stages(model, PRECISIONS[request.precision])
    bf16 = request.precision == "bf16"
    files: dict[str, StageFiles] = {}
    findings: list[Finding] = []
    for name, spec in request.specs.items():
        progress(f"exporting {name} (tracing)")
        # ONNX Runtime's fused kernel on the CPU knows float32 only.
        fuse = name in request.system.FUSED_STAGES and request.precision == "fp32"
        files[name] = export_stage(
            modules[name],
            spec,
            folder,
            precision=request.precision,
            fuse=fuse,
        )
        progress(f"linting {name}")
        target_opset = OPSET_BF16 if bf16 else OPSET
        found = lint(folder / files[name].portable, spec, target_opset=target_opset, precision=request.precision)
        if variant := files[name].onnxruntime:
            allowed = frozenset({"com.microsoft"})
            found += lint(
                folder / variant, spec, target_opset=target_opset, precision=request.precision, allowed_domains=allowed
            )
        findings.extend(found)
    broken = [finding for finding in findings if finding.severity == "error"]
    if broken:
        raise CheckFailedError(
            "lint_failed",
            f"graph lint: {broken[0].rule} at {broken[0].node}",
            broken[0].message,
            "Nothing was written.",
        )
    return files, findings


def _check(
    model: torch.nn.Module,
    request: ExportRequest,
    folder: Path,
    files: Mapping[str, StageFiles],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Parity of every graph that was written. CheckFailedError names the first component that drifts."""
    # The reference is the network itself, not the folded copy the graphs were traced from.
    reference = TorchEngine(request.system.reference_stages(model), request.system.specs(request.config))
    graphs = {name: folder / stage.portable for name, stage in files.items()}
    fused = {name: folder / (stage.onnxruntime or stage.portable) for name, stage in files.items()}
    wanted = {f"{runtime} (portable)": (runtime, graphs) for runtime in parity_runtimes(request.precision)}
    if fused != graphs:
        wanted["onnxruntime (fused)"] = ("onnxruntime", fused)
    candidates = {
        name: open_engine(runtime, paths, request.specs, threads=available_cores())
        for name, (runtime, paths) in wanted.items()
    }
    result = check_parity(
        reference,
        candidates,
        request.specs,
        request.system.preprocessing(request.config),
        request.precision,
        progress,
        system=system_class(request.system.NAME),
    )
    if not result["holds"]:
        raise CheckFailedError(
            "parity_failed",
            f"the exported graphs do not compute what PyTorch computes: {result['first_drift']}",
            _drift_text(result),
            "Nothing was written. Try --precision fp32, or report this with the versions that fssdeploy doctor prints.",
        )
    return result


def parity_runtimes(precision: str) -> list[str]:
    """Every runtime that is installed and can run this precision. MachineError if there is none.

    ONNX Runtime's CPU kernels do not take bfloat16; OpenVINO does.
    """
    installed = [runtime for runtime in RUNTIMES if find_spec(runtime)]
    able = [runtime for runtime in installed if precision != "bf16" or runtime != "onnxruntime"]
    if not able:
        raise MachineError(
            "runtime_missing",
            f"no runtime here can prove a {precision} export",
            "ONNX Runtime on a CPU does not run bfloat16",
            "Run: pip install 'fssdeploy[openvino]'",
        )
    return able


def _manifest(
    model: torch.nn.Module,
    provenance: Provenance,
    request: ExportRequest,
    folder: Path,
    files: Mapping[str, StageFiles],
) -> dict[str, Any]:
    packages = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    stages = {
        name: {
            "spec": spec.to_dict(),
            "files": {
                "portable": files[name].portable,
                "weights": files[name].weights,
                **({"onnxruntime": files[name].onnxruntime} if files[name].onnxruntime else {}),
            },
            "parameters": request.system.stage_parameters(model, name),
        }
        for name, spec in request.specs.items()
    }
    sealed = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.iterdir())
    }
    manifest = {
        "format": FORMAT,
        "system": request.system.NAME,
        "preset": request.preset,
        "config": request.config.to_dict(),
        "precision": request.precision,
        "dynamic_batch": request.dynamic_batch,
        "kshot": "mean",
        "weights": provenance.to_dict(),
        "fingerprint": fingerprint(model, request.config.to_dict(), request.system.STATE_PARAMETERS),
        "preprocessing": request.system.preprocessing(request.config),
        "stages": stages,
        "files": sealed,
        "versions": {
            "fssdeploy": fssdeploy.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
    }
    # Tuples become lists now, so that the digest is the one a reader computes.
    manifest = json.loads(json.dumps(manifest))
    manifest["digest"] = digest(manifest)
    return manifest


def _sync(folder: Path) -> None:
    """Force files and folder to disk, so that the rename cannot overtake their contents."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _promote(folder: Path, target: Path) -> None:
    """Rename into place; an old artifact is moved aside first, and back if that fails or is interrupted."""
    aside = folder.with_name(folder.name + ".old")
    try:
        if target.exists():
            os.rename(target, aside)
        os.rename(folder, target)
        sync_folder(target.parent)
    finally:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        shutil.rmtree(aside, ignore_errors=True)


def _drift_text(result: Mapping[str, Any]) -> str:
    for row in result["tensors"]:
        if not row["holds"]:
            return (
                f"max/std {row['max_abs_over_std']:.1e} (limit {result['tolerance']['max_abs_over_std']:g}), "
                f"1-cos {row['one_minus_cosine']:.1e} (limit {result['tolerance']['one_minus_cosine']:g})"
            )
    row = next(row for row in result["masks"] if not row["holds"])
    return f"mask IoU {row['iou']:.4f} (limit {result['tolerance']['mask_iou']:g}), {row['flipped']:.1e} pixels flipped"


def _report(
    target: Path, manifest: Mapping[str, Any], parity: Mapping[str, Any], findings: Sequence[Finding]
) -> Report:
    weights = manifest["weights"]
    facts: dict[str, object] = {
        "artifact": str(target),
        "system": f"{manifest['system']} {manifest['preset']}, {manifest['precision']}",
        "weights": weights["status"],
        "fingerprint": manifest["fingerprint"][:16],
    }
    files = Table("files", ["file", "MB"], [[n, f"{f['bytes'] / 1e6:.2f}"] for n, f in manifest["files"].items()])
    proof = parity_report(parity)
    notes = [f"lint: {finding.message}" for finding in findings]
    if weights["status"] != "trained":
        notes.insert(0, f"UNTRAINED weights ({', '.join(weights['untrained_groups'])}): the masks mean nothing.")
    facts.update({f"parity: {key}": value for key, value in proof.facts.items()})
    data = {"artifact": str(target), "manifest": dict(manifest), "parity": dict(parity), "notes": notes}
    return Report("export", facts, [files, *proof.tables], notes, data)


def one_row(spec: StageSpec) -> StageSpec:
    """The contract of a stage that takes one row at a time."""

    def fix(tensors: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(replace(tensor, shape=(1, *tensor.shape[1:])) for tensor in tensors)

    return StageSpec(spec.name, fix(spec.inputs), fix(spec.outputs))
