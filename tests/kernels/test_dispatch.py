"""Which implementation runs, and what is said when it is not the one that was asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fssdeploy.errors import InputError
from fssdeploy.kernels import dispatch, runtime

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NAME = "A Measured GPU"
HALF = torch.float16


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither warnings given, nor tables read, nor GPUs asked before."""

    def clear() -> None:
        for function in (dispatch._warn_once, dispatch._table, runtime._gpu_obstacle):
            function.cache_clear()
        dispatch._broken.clear()

    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    clear()
    yield
    clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that can run kernels, as far as the dispatcher asks."""
    monkeypatch.setattr(runtime, "MISSING", None)
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: NAME)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(runtime.shutil, "which", lambda program: f"/usr/bin/{program}")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table in which the kernel wins at 1000 and loses at 100 rows, in float16 alone."""
    rows = [
        {"dtype": "float16", "sizes": {"query": 1000}, "reference_us": 50.0, "triton_us": 20.0},
        {"dtype": "float16", "sizes": {"query": 100}, "reference_us": 5.0, "triton_us": 9.0},
    ]
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({NAME: {"masked_max": rows}}))
    monkeypatch.setattr(dispatch, "TABLE", path)
    return path


class OnGpu:
    """As much of a tensor as the dispatcher looks at."""

    device, dtype = GPU, HALF


def run(
    operation: str = "masked_max", kernel: Any = lambda: "kernel", query: int = 1000, like: Any = OnGpu
) -> tuple[str, list[str]]:
    """The result, and the warnings given on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = dispatch.run(operation, cast(torch.Tensor, like), {"query": query}, lambda: "reference", kernel)
    assert all(one.category is dispatch.KernelWarning for one in caught)
    return result, [str(one.message) for one in caught]


# --- Modes -----------------------------------------------------------------------------------------------------------


def test_a_mode_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(InputError, match="auto, reference, triton") as caught:
        run()
    assert caught.value.code == "kernels_mode"


def test_reference_is_taken_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, gpu: None, table: Path) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert run() == ("reference", [])
    assert dispatch.taken()["masked_max"] == dispatch.Choice("reference", "FSSDEPLOY_KERNELS=reference")


def test_triton_is_taken_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    assert run() == ("kernel", [])
    assert dispatch.taken()["masked_max"] == dispatch.Choice("triton", "FSSDEPLOY_KERNELS=triton")


def test_an_operation_without_a_kernel_has_nothing_to_warn_of(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    assert run(kernel=None) == ("reference", [])
    assert "linear algebra" in dispatch.taken()["masked_max"].reason


def test_auto_is_silent_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MISSING", None)
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    assert run(like=torch.zeros(1)) == ("reference", [])
    assert dispatch.taken()["masked_max"].reason == "there are no kernels for the device cpu"


def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MISSING", None)
    monkeypatch.setattr(runtime, "INTERPRETED", True)
    choice = dispatch.choose("masked_max", CPU, HALF, {"query": 1000})
    assert choice.implementation == "reference"
    assert "interpreter" in choice.reason
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    assert dispatch.choose("masked_max", CPU, HALF, {"query": 1000}).implementation == "triton"


def test_triton_on_the_cpu_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MISSING", None)
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    result, said = run(like=torch.zeros(1))
    assert result == "reference"
    assert said == ["fssdeploy::masked_max runs as reference: there are no kernels for the device cpu"]
    assert run(like=torch.zeros(1)) == ("reference", [])


# --- The table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "implementation", "reason"),
    [
        (1000, "triton", "the kernel took 20.0 us against 50.0 us at {'query': 1000} on A Measured GPU"),
        (600, "triton", "at {'query': 1000}"),
        (2000, "triton", "at {'query': 1000}"),
        (120, "reference", "the kernel took 9.0 us against 5.0 us at {'query': 100}"),
        (2001, "reference", "no size within a factor of 2 of {'query': 2001}"),
        (400, "reference", "no size within a factor of 2"),
    ],
)
def test_auto_takes_what_was_faster_at_the_nearest_size(
    query: int, implementation: str, reason: str, gpu: None, table: Path
) -> None:
    assert run(query=query) == ("kernel" if implementation == "triton" else "reference", [])
    assert dispatch.taken()["masked_max"].implementation == implementation
    assert reason in dispatch.taken()["masked_max"].reason


def test_auto_knows_only_what_was_measured(gpu: None, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"query": 1000}
    assert dispatch.choose("masked_max", GPU, HALF, sizes).implementation == "triton"
    other_dtype = dispatch.choose("masked_max", GPU, torch.bfloat16, sizes)
    assert (other_dtype.implementation, "bfloat16" in other_dtype.reason) == ("reference", True)
    assert dispatch.choose("mutual_argmax", GPU, HALF, sizes).implementation == "reference"
    assert dispatch.choose("masked_max", GPU, HALF, {"rows": 1000}).implementation == "reference"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another GPU")
    other_gpu = dispatch.choose("masked_max", GPU, HALF, sizes)
    assert other_gpu == dispatch.Choice("reference", "nothing was measured on Another GPU for torch.float16")


def test_without_a_table_auto_takes_the_reference(gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dispatch, "TABLE", tmp_path / "absent.json")
    assert run() == ("reference", [])
    assert "nothing was measured" in dispatch.taken()["masked_max"].reason


def test_every_dimension_counts_for_the_distance() -> None:
    measured = dispatch.Measurement("float16", {"query": 100, "support": 400}, 1.0, 1.0)
    assert measured.distance({"query": 100, "support": 400}) == 1
    assert measured.distance({"query": 200, "support": 100}) == pytest.approx(4)
    assert measured.distance({"query": 100}) == float("inf")


# --- What stands in the way ------------------------------------------------------------------------------------------

NO_TRITON = """
import sys, warnings
sys.modules["triton"] = None  # importing it raises ImportError
import torch
from fssdeploy.kernels import affinity, dispatch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    query, support = torch.eye(4), torch.eye(4)[None]
    for _ in range(2):
        values, indices = affinity.masked_max(query, support, torch.ones(1, 1, 4))
    affinity.mutual_argmax(query, support)
assert indices.tolist() == [[[0, 1, 2, 3]]], indices
for one in caught:
    print(one.message)
print(dispatch.taken()["masked_max"].implementation)
"""


def test_without_triton_everything_runs_as_reference() -> None:
    environment = {**os.environ, dispatch.VARIABLE: "triton", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", NO_TRITON], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    one, other, implementation = process.stdout.strip().splitlines()
    assert one.startswith("fssdeploy::masked_max runs as reference: Triton cannot be imported")
    assert other.startswith("fssdeploy::mutual_argmax runs as reference: Triton cannot be imported")
    assert implementation == "reference"


@pytest.mark.parametrize("mode", ["auto", "triton"])
@pytest.mark.parametrize("cc", [None, "no-such-compiler"])
def test_without_a_c_compiler(
    mode: str, cc: str | None, gpu: None, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, mode)
    if cc is None:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(runtime.shutil, "which", lambda program: None)
    else:  # Triton takes what CC names, also where gcc is there
        monkeypatch.setenv("CC", cc)
        monkeypatch.setattr(runtime.shutil, "which", lambda program: None if program == cc else f"/usr/bin/{program}")
    result, said = run()
    assert result == "reference"
    assert len(said) == 1
    assert "C compiler" in said[0]
    assert run() == ("reference", [])


def test_a_gpu_that_is_too_old(gpu: None, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    result, said = run()
    assert result == "reference"
    assert said == [
        "fssdeploy::masked_max runs as reference: A Measured GPU has compute capability 7.5, kernels need 8.0"
    ]
    assert run("mutual_argmax")[1] == [said[0].replace("masked_max", "mutual_argmax")]


def test_one_warning_for_every_operation_and_cause(gpu: None, table: Path) -> None:
    def refuse(cause: str) -> Any:
        def kernel() -> str:
            raise runtime.UnsupportedError(cause)

        return kernel

    assert run(kernel=refuse("too wide")) == (
        "reference",
        ["fssdeploy::masked_max runs as reference: too wide"],
    )
    assert run(kernel=refuse("too wide")) == ("reference", [])
    assert len(run(kernel=refuse("too long"))[1]) == 1
    assert dispatch.taken()["masked_max"] == dispatch.Choice("reference", "too long")
    assert run() == ("kernel", [])  # arguments that fit are not affected


def compilation_failures() -> list[Exception]:
    pytest.importorskip("triton")
    import ast

    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return [
        CompilationError("a = b", ast.parse("a = b").body[0], "b is not defined"),
        OutOfResources(300, 200, "shared memory"),
        PTXASError("unknown architecture\nthe whole program follows"),
        subprocess.CalledProcessError(1, ["gcc"]),
    ]


@pytest.mark.parametrize(
    ("failure", "said"),
    [(0, "b is not defined"), (1, "shared memory"), (2, "unknown architecture"), (3, "gcc")],
)
def test_a_kernel_that_cannot_be_compiled_is_tried_once(failure: int, said: str, gpu: None, table: Path) -> None:
    error, attempts = compilation_failures()[failure], []

    def kernel() -> str:
        attempts.append(1)
        raise error

    result, warned = run(kernel=kernel)
    assert result == "reference"
    assert len(warned) == 1
    assert "cannot be compiled" in warned[0]
    assert said in warned[0]
    assert "\n" not in warned[0]
    assert run(kernel=kernel) == ("reference", [])
    assert len(attempts) == 1
    assert run("mutual_argmax", kernel=lambda: "kernel")[0] == "reference"  # which nobody measured
    assert "cannot be compiled" in dispatch.taken()["masked_max"].reason


def test_other_errors_of_a_kernel_are_not_hidden(gpu: None, table: Path) -> None:
    def kernel() -> str:
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        run(kernel=kernel)


def test_kernels_launch_on_the_device_of_their_tensors(gpu: None, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded: list[Any] = []

    def device_of(tensor: Any) -> nullcontext[None]:
        guarded.append(tensor)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    run()
    assert guarded == [OnGpu]


# --- What launchers ask ----------------------------------------------------------------------------------------------


def test_indices_beyond_32_bits() -> None:
    runtime.require_int32(query=2**31 - 1)
    with pytest.raises(runtime.UnsupportedError, match="support has 2147483648 elements"):
        runtime.require_int32(query=5, support=2**31)


def test_packed_copies_only_what_kernels_cannot_read() -> None:
    rows = torch.arange(128.0).view(2, 64)
    assert runtime.packed(rows, 64).data_ptr() == rows.data_ptr()
    for unfit in (rows.T, rows.flatten()[1:65].view(1, 64), rows[:, :50]):
        packed = runtime.packed(unfit, 64)
        assert packed.is_contiguous()
        assert packed.data_ptr() % 16 == 0
        assert packed.shape == (unfit.shape[0], 64)
        assert torch.equal(packed[:, : unfit.shape[1]], unfit)
        assert (packed[:, unfit.shape[1] :] == 0).all()


@pytest.mark.parametrize(
    ("tensor", "aligned"),
    [
        (torch.zeros(4, 64), True),
        (torch.zeros(4, 60), False),
        (torch.zeros(64, 4).T, False),
        (torch.zeros(4 * 64 + 1)[1:].view(4, 64), False),
    ],
)
def test_aligned(tensor: torch.Tensor, aligned: bool) -> None:
    assert runtime.aligned(tensor) is aligned


def test_only_the_interpreter_needs_bfloat16_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    for interpreted in (True, False):
        monkeypatch.setattr(runtime, "INTERPRETED", interpreted)
        assert runtime.upcast(torch.bfloat16) is interpreted
        assert not runtime.upcast(torch.float16)
