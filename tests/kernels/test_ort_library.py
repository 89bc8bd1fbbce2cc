"""The custom-op library for ONNX Runtime, built here and loaded into sessions: its kernels against float64.

Needs cmake, a C++ compiler, Eigen 3 and ONNX Runtime's C headers (ONNXRUNTIME_HOME or FSSDEPLOY_ORT_INCLUDE).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import fssdeploy
from fssdeploy.export.operations import with_functions
from fssdeploy.kernels import affinity, correlation
from fssdeploy.kernels.shipping import Image, ship
from tests.operation_cases import CASES, Arrays, Case, compare

ROOT = Path(fssdeploy.__file__).parent.parent
# What stays a function body because linear algebra is all there is to it.
WITHOUT_KERNEL = {"MaskedMeans", "Hypercorrelation"}
KERNEL_CASES = {name: case for name, case in CASES.items() if case.operation not in WITHOUT_KERNEL}


def missing() -> str | None:
    """What hinders even the configuration; CMake tells what else is missing."""
    if not (ROOT / "CMakeLists.txt").exists():
        return "it needs a checkout with CMakeLists.txt"
    if not shutil.which("cmake"):
        return "it needs cmake"
    if not (shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")):
        return "it needs a C++ compiler"
    return None


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the build. Without the means for it all tests are skipped, with a warning that says what lacks."""
    lacking = missing()
    folder = tmp_path_factory.mktemp("native")
    if not lacking:
        options = {"FSSDEPLOY_FATBIN": "OFF", "CMAKE_CXX_FLAGS": "-Werror"}
        if headers := os.environ.get("FSSDEPLOY_ORT_INCLUDE"):
            options["FSSDEPLOY_ORT_INCLUDE"] = headers
        wishes = (f"-D{name}={value}" for name, value in options.items())
        configured = subprocess.run(
            ["cmake", "-S", str(ROOT), "-B", str(folder), *wishes], capture_output=True, text=True, check=False
        )
        assert configured.returncode == 0, configured.stderr
        (line,) = (line for line in configured.stdout.splitlines() if "FSSDEPLOY_ORT_OPS " in line)
        lacking = None if line.endswith(" built") else line.split("skipped: ")[1]
    if lacking:
        warnings.warn(f"THE CUSTOM-OP LIBRARY IS NOT TESTED: {lacking}", stacklevel=1)
        pytest.skip(lacking)
    targets = ("fssdeploy_ort_ops", "cuda_launches_test")
    command = ["cmake", "--build", str(folder), "--parallel", "2", "--target", *targets]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "kernels" / "csrc" / "ort"


@pytest.fixture(scope="module")
def library(build: Path) -> Path:
    return build / "libfssdeploy_ort_ops.so"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as for GPUs, whose kernels have their true arguments and no content."""
    kernels = {kernel.name: kernel for module in (affinity, correlation) for kernel in module.shipped()}
    image = Image("sm_80", 80, "kernel", b"no code", "", 0, 0, 0)
    folder = tmp_path_factory.mktemp("shipped")
    ship(folder, kernels, dict.fromkeys(kernels, [image]), "none")
    return folder


def session_of(
    model: onnx.ModelProto, library: Path | None, optimised: Path | None = None, threads: int = 1
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(library))
    if optimised:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, arguments: dict[str, np.ndarray]) -> Arrays:
    return tuple(session.run(None, arguments))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", KERNEL_CASES.values(), ids=KERNEL_CASES.keys())
def test_the_kernel_takes_the_node_and_computes_the_formula(
    library: Path, tmp_path: Path, case: Case, dtype: str
) -> None:
    """Although the node has a body; without the library, the same file runs by that (tests/export/test_operations)."""
    optimised = tmp_path / "optimised.onnx"
    session = session_of(with_functions(case.model(dtype)), library, optimised)
    assert [node.op_type for node in onnx.load(optimised).graph.node] == [case.operation]
    compare(run(session, case.arguments(dtype)), case.expected(dtype), dtype)


def test_a_wrong_body_shows_who_computes(library: Path) -> None:
    """The proof of the rule the files rely on: kernel before body, body without a kernel."""
    case = CASES["correlation_projection-k2"]
    model = with_functions(case.model("float32"))
    model.functions[0].node.append(helper.make_node("Neg", model.functions[0].output[:1], ["negated"]))
    model.functions[0].output[0] = "negated"
    (expected,) = case.expected("float32")
    compare(run(session_of(model, library), case.arguments("float32")), (expected,), "float32")
    compare(run(session_of(model, None), case.arguments("float32")), (-expected,), "float32")


def test_what_has_no_kernel_runs_by_its_body(library: Path) -> None:
    for name in ("masked_means-k2", "hypercorrelation"):
        case = CASES[name]
        session = session_of(with_functions(case.model("float32")), library)
        compare(run(session, case.arguments("float32")), case.expected("float32"), "float32")


def test_overloads_are_taken_like_any_node(library: Path, tmp_path: Path) -> None:
    model = CASES["masked_max-exclude0-k2"].model("float32")
    other = CASES["masked_max-exclude1-k2"]
    second = helper.make_node(
        "MaskedMax", model.graph.node[0].input, ["hard", "place"], "hard", domain="fssdeploy", exclude=1
    )
    model.graph.node.append(second)
    model.graph.output.append(helper.make_tensor_value_info("hard", TensorProto.FLOAT, [None] * 3))
    model.graph.output.append(helper.make_tensor_value_info("place", TensorProto.INT64, [None] * 3))
    model = with_functions(model)
    assert model.graph.node[1].overload
    optimised = tmp_path / "optimised.onnx"
    found = run(session_of(model, library, optimised), other.arguments("float32"))
    assert [node.op_type for node in onnx.load(optimised).graph.node] == ["MaskedMax", "MaskedMax"]
    compare(found[2:], other.expected("float32"), "float32")


@pytest.mark.parametrize("name", ["masked_max-exclude1-k2", "unit_rows-half0", "spectral_edges-mean-shift-mixed"])
def test_bfloat16_is_taken(library: Path, name: str) -> None:
    """Between casts, since NumPy has no bfloat16."""
    case = CASES[name]
    model = case.model("float32")
    node = model.graph.node[0]
    floats = [place for place, array in enumerate(case.inputs) if array.dtype != np.int64]
    narrow = [place for place in floats if place not in case.always_float32]
    casts = [
        helper.make_node("Cast", [node.input[place]], [f"narrow{place}"], f"in{place}", to=TensorProto.BFLOAT16)
        for place in narrow
    ]
    for place in narrow:
        node.input[place] = f"narrow{place}"
    for place, kind in enumerate(case.outputs):
        if kind == "same":
            casts.append(helper.make_node("Cast", [f"wide{place}"], [node.output[place]], f"out{place}", to=1))
            node.output[place] = f"wide{place}"
    nodes = [*casts[: len(narrow)], node, *casts[len(narrow) :]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    arguments = case.arguments("float32")
    for place in narrow:  # so that the casts lose nothing: the upper half of the bits
        name = f"input{place}"
        arguments[name] = (arguments[name].view(np.uint32) & 0xFFFF0000).view(np.float32)
    exact = (array if array.dtype == np.int64 else array.astype(np.float64) for array in arguments.values())
    found = run(session_of(model, library), arguments)
    # Half a unit of the last of bfloat16's 8 digits.
    compare(found, case.compute(*exact, **case.attributes), "float32", accuracy=2**-8)


def test_outputs_that_nobody_reads_are_not_missed(library: Path) -> None:
    case = CASES["mutual_argmax-k2"]
    model = case.model("float32")
    for place in (1, 2):
        model.graph.node[0].output[place] = ""
    kept = [model.graph.output[place] for place in (0, 3)]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    expected = case.expected("float32")
    compare(run(session_of(model, library), case.arguments("float32")), (expected[0], expected[3]), "float32")


@pytest.mark.parametrize("name", ["masked_max-exclude0-k1", "mutual_argmax-k1", "calibrated_attention-global"])
def test_threads_do_not_change_a_bit(library: Path, name: str) -> None:
    case = CASES[name]
    alone, together = (
        run(session_of(case.model("float32"), library, threads=threads), case.arguments("float32"))
        for threads in (1, 3)
    )
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "place", "wrong", "message"),
    [
        ("masked_max-exclude0-k2", 1, np.zeros((2, 53, 66), np.float32), "differ in channels"),
        ("masked_max-exclude0-k2", 2, np.zeros((2, 2, 52), np.float32), "differ in shots or rows"),
        ("mutual_argmax-k2", 1, np.zeros((2, 0, 67), np.float32), "no rows"),
        ("correlation_projection-k2", 2, np.zeros((1, 53, 11), np.float32), "differ in shots or rows"),
        ("spectral_edges-row-clip", 1, np.full(143, 4), "labels outside"),
        ("spectral_edges-row-clip", 3, np.zeros(142, np.float32), "differ in cells"),
        ("calibrated_attention-row", 3, np.zeros((2, 109), np.float32), "not all there"),
        ("calibrated_attention-row", 1, np.zeros((2, 161, 23), np.float32), "differ in channels"),
        ("calibrated_attention-row", 2, np.zeros((1, 161, 7), np.float32), "differ in batch"),
    ],
)
def test_what_does_not_fit_is_refused(library: Path, name: str, place: int, wrong: np.ndarray, message: str) -> None:
    case = CASES[name]
    arguments = case.arguments("float32")
    arguments[f"input{place}"] = wrong
    session = session_of(case.model("float32"), library)
    with pytest.raises(Exception, match=message):
        session.run(None, arguments)


def test_unknown_modes_are_refused_when_a_session_starts(library: Path) -> None:
    model = CASES["spectral_edges-row-clip"].model("float32")
    next(item for item in model.graph.node[0].attribute if item.name == "broadcast").s = b"rows"
    with pytest.raises(Exception, match="no such mode"):
        session_of(model, library)


def test_gpu_operations_launch_what_python_ships(build: Path, shipped: Path) -> None:
    """Against a libcuda that only writes down what it is asked for."""
    test = [build / "cuda_launches_test", build / "libfake_cuda_memory.so", shipped]
    subprocess.run(test, check=True)


RUN = """
import sys
import numpy, onnxruntime
library, model, inputs, outputs = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(library)
options.optimized_model_filepath = model + ".optimised"
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
numpy.savez(outputs, *session.run(None, dict(numpy.load(inputs))))
"""


def run_with_gpu_kernels(
    library: Path, kernels: Path, case: Case, folder: Path
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A process with FSSDEPLOY_CUDA_KERNELS, which the library reads once; what it left is in the file."""
    model, inputs, outputs = (folder / name for name in ("model.onnx", "inputs.npz", "outputs.npz"))
    model.write_bytes(with_functions(case.model("float16")).SerializeToString())
    np.savez(inputs, **case.arguments("float16"))  # type: ignore[arg-type]
    command = [sys.executable, "-c", RUN, *map(str, (library, model, inputs, outputs))]
    environment = {**os.environ, "FSSDEPLOY_CUDA_KERNELS": str(kernels)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False), outputs


@pytest.mark.parametrize(("name", "keeps_node"), [("masked_max-exclude1-k2", True), ("spectral_edges-row-clip", False)])
def test_with_gpu_kernels_other_operations_keep_their_bodies(
    library: Path, shipped: Path, tmp_path: Path, name: str, keeps_node: bool
) -> None:
    """On a GPU, a body that runs there is better than a kernel on the CPU. What has GPU kernels still runs on both."""
    done, outputs = run_with_gpu_kernels(library, shipped, CASES[name], tmp_path)
    assert done.returncode == 0, done.stderr
    compare(tuple(np.load(outputs).values()), CASES[name].expected("float16"), "float16")
    nodes = onnx.load(tmp_path / "model.onnx.optimised").graph.node
    assert (CASES[name].operation in {node.op_type for node in nodes}) == keeps_node


def test_a_folder_without_kernels_is_refused(library: Path, tmp_path: Path) -> None:
    done, _ = run_with_gpu_kernels(library, tmp_path, CASES["masked_max-exclude1-k2"], tmp_path)
    assert done.returncode
    assert "kernels.txt cannot be read" in done.stderr
