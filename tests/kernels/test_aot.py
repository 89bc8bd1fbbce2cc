"""The ahead-of-time gate: what holds passes on every architecture, and each promise that is broken is found."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels cannot be compiled: triton is not installed")

from fssdeploy.errors import CheckFailedError, MachineError
from fssdeploy.kernels import aot, gate, inspection, shipping
from fssdeploy.kernels.runtime import INTERPRETED
from fssdeploy.kernels.shipped_kernel import ARCHITECTURES, ShippedKernel

import aot_examples as examples  # isort: skip - beside this file

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")

AMPERE, SMALL_AMPERE, _, HOPPER, BLACKWELL, _, PORTABLE = gate.TARGETS


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        patch.setenv("TRITON_DISABLE_LINE_INFO", "1")
        yield folder


@pytest.fixture(scope="module")
def image(cache: Path) -> shipping.Image:
    return gate.compile_image(examples.HOLDS, AMPERE)


def failures(kernel: ShippedKernel, target: gate.Target = AMPERE) -> str:
    return "; ".join(gate.examine(kernel, target).failures)


@pytest.mark.parametrize("target", gate.TARGETS, ids=lambda target: target.name)
def test_a_kernel_that_keeps_its_promises_passes(target: gate.Target) -> None:
    row = gate.examine(examples.HOLDS, target)
    assert row.failures == ()
    assert row.resources and row.image
    assert row.resources.registers > 16
    assert row.resources.instructions[inspection.MATRIX_FAMILY[target.architecture]] > 0
    assert row.resources.instructions["copies"] > 0
    assert row.image.shared > 0


def test_every_architecture_is_a_target_and_has_its_limits() -> None:
    assert tuple(target.architecture for target in gate.TARGETS if not target.portable) == ARCHITECTURES
    assert set(gate.SHARED_KB) == set(inspection.MATRIX_FAMILY) == set(ARCHITECTURES)


def test_spills_are_found() -> None:
    assert "spills: " in failures(examples.SPILLS)


def test_missing_promises_of_alignment_are_found() -> None:
    found = failures(examples.UNALIGNED)
    assert "0 asynchronous 16-byte copies, 1 are needed" in found
    assert "loads of 2 bytes" in found


def test_more_copies_can_be_asked_for() -> None:
    assert "1000 are needed" in failures(replace(examples.HOLDS, copies=1000))


def test_unused_matrix_units_are_found() -> None:
    assert "no HMMA" in failures(examples.NO_MATRIX)


def test_an_older_matrix_instruction_needs_an_exception() -> None:
    assert "no HGMMA" in failures(examples.FEW_ROWS, HOPPER)
    assert failures(replace(examples.FEW_ROWS, exceptions={90: "few rows"}), HOPPER) == ""
    assert "no HMMA" in failures(replace(examples.NO_MATRIX, exceptions={80: "none at all is no exception"}))


def test_shared_memory_is_held_against_the_architecture() -> None:
    assert failures(examples.MUCH_SHARED, AMPERE) == ""
    assert "KB of shared memory, the architecture has 99" in failures(examples.MUCH_SHARED, SMALL_AMPERE)


def test_what_does_not_compile_is_found() -> None:
    assert "does not compile: CompilationError" in failures(examples.MISMATCHED)


def test_the_compilers_dump_is_kept_off_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        print("ld.param.b32\n" * 10_000)
        raise RuntimeError("ptxas fatal: " + "x" * 10_000)

    monkeypatch.setattr(gate, "compile_image", fail)
    assert 0 < len(failures(examples.HOLDS)) < 300
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"scratch": 128}, "128 bytes of scratch memory"),
        ({"tensor_memory": 1024}, "1024 columns of tensor memory"),
        ({"entry": "other"}, "has 0 parameters, launchers pass 6 + 2"),
    ],
)
def test_contradictions_of_an_image_are_found(image: shipping.Image, change: dict[str, Any], expected: str) -> None:
    resources = inspection.inspect(image.cubin)
    assert list(gate.image_failures(examples.HOLDS, AMPERE, image, resources)) == []
    found = list(gate.image_failures(examples.HOLDS, AMPERE, replace(image, **change), resources))
    assert len(found) == 1
    assert expected in found[0]


def test_a_hidden_parameter_in_use_is_found(image: shipping.Image) -> None:
    """Without its declaration the text does not assemble."""
    used = image.ptx.replace("[_products_param_0]", "[_products_param_6]")
    assert used != image.ptx
    (found,) = gate.image_failures(examples.HOLDS, AMPERE, replace(image, ptx=used), inspection.inspect(image.cubin))
    assert "does not assemble" in found


def test_text_for_one_architecture_alone_is_not_portable() -> None:
    image = gate.compile_image(examples.HOLDS, HOPPER)
    found_in_it = inspection.inspect(image.cubin)
    resources = replace(found_in_it, instructions={**found_in_it.instructions, "HMMA": 1, "copies": 1, "spills": 0})
    target = replace(PORTABLE, architecture=90)
    kernel = replace(examples.HOLDS, exceptions={90: ""})
    (found,) = gate.image_failures(kernel, target, image, resources)
    assert "the portable text does not assemble for sm_120" in found


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (replace(examples.HOLDS, constexprs={}), "constexprs are not"),
        (replace(examples.HOLDS, aligned=("querry",)), "alignment of querry"),
        (replace(examples.HOLDS, aligned=("ROWS",)), "alignment of ROWS"),
        (replace(examples.HOLDS, grid=("cdiv(rows, ROWS)", "1", "shots")), "rows, shots"),
    ],
)
def test_a_description_that_contradicts_itself_is_found(kernel: ShippedKernel, expected: str) -> None:
    assert expected in failures(kernel)


SASS = """
        /*0000*/                   LDG.E.U16 R3, desc[UR4][R4.64] ;
.L_x_0:
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R3], desc[UR4][R4.64] ;
.L_x_1:
        /*0020*/               @P1 BRA `(.L_x_1) ;
        /*0030*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0040*/               @P0 BRA `(.L_x_0) ;
        /*0050*/             @!UP0 STL.64 [R1], R4 ;
        /*0060*/                   LDG.E.U16.CONSTANT R3, [R4.64] ;
        /*0070*/                   LDGSTS.E.64 [R3], [R4.64] ;
"""


def test_instructions_are_counted_by_kind() -> None:
    expected = {"HMMA": 1, "HGMMA": 0, "UTCHMMA": 0, "copies": 1, "spills": 1}
    assert inspection.count(SASS) == expected


def test_narrow_loads_count_where_it_copies() -> None:
    """A loop that waits within the copying one does not hide it; without any copying loop the whole kernel counts."""
    assert inspection.narrow_loads(SASS) == 0
    inside = SASS.replace("HMMA.16816.F32 R4, R4, R8, R4", "LDG.E.U16 R4, [R8.64]")
    assert inspection.narrow_loads(inside) == 1
    assert inspection.narrow_loads(SASS.replace("LDGSTS.E.BYPASS.128", "LDS.128")) == 2


@pytest.fixture(scope="module")
def made(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gate, report and shipped files of the examples for two targets."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "TARGETS", (AMPERE, PORTABLE))
        aot.run([examples], 1, out, out / "shipped", None)
    return out


def test_the_report_has_every_kernel_and_target(made: Path) -> None:
    report = json.loads((made / "report.json").read_text("utf-8"))
    assert set(report["kernels"]) == {"products_fp16", "doubled"}
    assert set(report["kernels"]["products_fp16"]) == {"sm_80", "ptx"}
    entry = report["kernels"]["products_fp16"]["sm_80"]
    assert entry["failures"] == []
    assert entry["instructions"]["HMMA"] > 0
    assert entry["registers"] > 16


def test_the_manifest_says_how_to_launch(made: Path, image: shipping.Image) -> None:
    manifest = json.loads((made / "shipped" / "kernels.json").read_text("utf-8"))
    products = next(kernel for kernel in manifest["kernels"] if kernel["name"] == "products_fp16")
    assert products["entry"] == "_products"
    assert products["grid"] == list(examples.HOLDS.grid)
    assert products["num_warps"] == examples.HOLDS.num_warps
    assert products["constexprs"] == {"ROWS": 64, "COLUMNS": 64}
    assert [each["name"] for each in products["parameters"]] == list(examples.HOLDS.signature)[:6]
    assert products["parameters"][0] == {"name": "query", "type": "*fp16", "multiple_of": 16}
    assert products["parameters"][3] == {"name": "query_rows", "type": "i32", "multiple_of": 1}
    cubin, text = products["images"]
    for shipped in (cubin, text):
        assert hashlib.sha256((made / "shipped" / shipped["file"]).read_bytes()).hexdigest() == shipped["sha256"]
    assert (cubin["target"], cubin["cc"], cubin["shared"]) == ("sm_80", 80, image.shared)
    assert ".version 8.0" in (made / "shipped" / text["file"]).read_text("utf-8")
    # Compiled by another process into another cache: the bytes are the same, so they can be pinned.
    assert (made / "shipped" / cubin["file"]).read_bytes() == image.cubin


def test_records_for_the_driver_hold_the_same(made: Path) -> None:
    lines = (made / "shipped" / "kernels.txt").read_text("utf-8").splitlines()
    assert lines[0] == f"fssdeploy-kernels {shipping.SCHEMA}"
    assert "kernel products_fp16 _products 8" in lines
    assert "grid cdiv(query_rows,ROWS)" in lines
    assert "parameter query *fp16 16" in lines
    assert "constant ROWS 64" in lines
    assert len([line for line in lines if line.startswith("image ")]) == 4


@pytest.mark.skipif(not shutil.which("fatbinary"), reason="CUDA's fatbinary is not installed")
def test_a_fatbin_holds_every_image_of_a_kernel(image: shipping.Image, tmp_path: Path) -> None:
    hopper, text = (gate.compile_image(examples.HOLDS, target) for target in (HOPPER, PORTABLE))
    shipping.ship(tmp_path, {"a": examples.HOLDS}, {"a": [image, hopper, text]}, "3", shutil.which("fatbinary"))
    assert {path.name for path in tmp_path.iterdir()} == {"a.fatbin", "kernels.json", "kernels.txt"}
    assert (tmp_path / "a.fatbin").read_bytes()[:4] == b"\x50\xed\x55\xba"
    (kernel,) = json.loads((tmp_path / "kernels.json").read_text("utf-8"))["kernels"]
    assert {each["file"] for each in kernel["images"]} == {"a.fatbin"}


def test_a_fatbinary_that_fails_is_reported(image: shipping.Image, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="could not pack a"):
        shipping.ship(tmp_path, {"a": examples.HOLDS}, {"a": [image]}, "3", str(tmp_path / "missing"))


def test_a_failure_fails_the_command_and_ships_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [gate.Row("good", "sm_80", ()), gate.Row("bad", "sm_80", ("spills: 2 instructions, 8 bytes",))]
    monkeypatch.setattr(aot, "gate", lambda *_: iter(rows))
    assert aot.main(["--out", str(tmp_path), "--ship", str(tmp_path / "shipped")]) == CheckFailedError.exit_code == 2
    printed = capsys.readouterr()
    assert "FAILED bad on sm_80: spills: 2 instructions, 8 bytes" in printed.out
    assert re.search(r"kernels fail with Triton [\d.]+: bad\b", printed.err)
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["kernels"]["bad"]["sm_80"]["failures"]
    assert not (tmp_path / "shipped").exists()


def test_names_are_unique(cache: Path) -> None:
    twice = SimpleNamespace(__name__="twice", shipped=lambda: (examples.HOLDS, examples.HOLDS))
    with pytest.raises(CheckFailedError, match="products_fp16"):
        next(gate.gate([twice], 1, cache))


def test_the_command_gates_every_operation() -> None:
    listed = [kernel for module in aot.OPERATIONS for kernel in module.shipped()]
    assert {module.__name__.rpartition(".")[2] for module in aot.OPERATIONS} == {
        "affinity",
        "correlation",
        "scma",
        "spectral",
    }
    assert all(any(module.shipped()) for module in aot.OPERATIONS)
    assert not [failure for kernel in listed for failure in gate.description_failures(kernel)]


@pytest.mark.slow
def test_interpreted_kernels_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fssdeploy.kernels.aot", "--out", str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == MachineError.exit_code
    assert "TRITON_INTERPRET" in done.stderr
