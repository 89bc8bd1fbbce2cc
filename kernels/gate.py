"""The gate of the kernels: compile one for an architecture, and hold the result against what was promised."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from fssdeploy.errors import CheckFailedError
from fssdeploy.kernels import inspection
from fssdeploy.kernels.shipped_kernel import ARCHITECTURES, ShippedKernel
from fssdeploy.kernels.shipping import Image, grid_names

# Dynamic shared memory that a block can have, in KB.
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Target:
    """An architecture (compute capability x 10), or the PTX text that drivers translate for any from it on."""

    name: str
    architecture: int
    ptx_version: int | None = None

    @property
    def portable(self) -> bool:
        return self.ptx_version is not None


# PTX of the newer architectures holds for exactly one each (wgmma, tcgen05); that of 80 runs on all of them. In version
# 8.0 of the language every driver since CUDA 12.0 reads it.
PORTABLE = Target("ptx", 80, ptx_version=80)
TARGETS = (*(Target(f"sm_{architecture}", architecture) for architecture in ARCHITECTURES), PORTABLE)


@dataclass(frozen=True)
class Row:
    """What became of one kernel on one target; `image` and `resources` are None if it did not compile."""

    kernel: str
    target: str
    failures: tuple[str, ...]
    resources: inspection.Resources | None = None
    image: Image | None = None


def compile_image(kernel: ShippedKernel, target: Target) -> Image:
    """Compile; raises whatever Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    places = {name: place for place, name in enumerate(kernel.signature)}
    source = ASTSource(
        fn=kernel.function,
        signature=dict(kernel.signature),
        constexprs=dict(kernel.constexprs),
        attrs={(places[name],): [["tt.divisibility", 16]] for name in kernel.aligned},
    )
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    if target.ptx_version:
        options["ptx_version"] = target.ptx_version
    made = triton.compile(source, target=GPUTarget("cuda", target.architecture, 32), options=options)
    return Image(
        target=target.name,
        architecture=target.architecture,
        entry=made.metadata.name,
        cubin=made.asm["cubin"],
        ptx=made.asm["ptx"],
        shared=made.metadata.shared,
        tensor_memory=made.metadata.tmem_size,
        scratch=made.metadata.global_scratch_size + made.metadata.profile_scratch_size,
    )


def examine(kernel: ShippedKernel, target: Target) -> Row:
    """Compile a kernel for a target, and check it."""
    described = tuple(description_failures(kernel))
    if described:
        return Row(kernel.name, target.name, described)
    try:
        # Where the assembler fails, Triton prints the whole PTX: ten thousand lines.
        with contextlib.redirect_stdout(io.StringIO()):
            image = compile_image(kernel, target)
    except Exception as error:  # the compiler raises errors of many kinds, and any of them is a kernel that fails
        first = next(iter(str(error).strip().splitlines()), "")
        return Row(kernel.name, target.name, (f"does not compile: {type(error).__name__}: {first[:160]}",))
    resources = inspection.inspect(image.cubin)
    return Row(kernel.name, target.name, tuple(image_failures(kernel, target, image, resources)), resources, image)


def description_failures(kernel: ShippedKernel) -> Iterator[str]:
    """Contradictions within the description itself."""
    arguments = {name for name, kind in kernel.signature.items() if kind != "constexpr"}
    if set(kernel.constexprs) != set(kernel.signature) - arguments:
        yield "constexprs are not the arguments of type constexpr"
    if unknown := set(kernel.aligned) - arguments:
        yield f"promises alignment of {', '.join(sorted(unknown))}, which is no argument"
    if unknown := grid_names(kernel) - set(kernel.signature):
        yield f"the grid formula uses {', '.join(sorted(unknown))}, which is neither argument nor constant"


def image_failures(
    kernel: ShippedKernel, target: Target, image: Image, resources: inspection.Resources
) -> Iterator[str]:
    """Every promise that a compiled kernel breaks."""
    found = resources.instructions
    limit = SHARED_KB[target.architecture]
    if image.shared > limit * 1024:
        yield f"{image.shared / 1024:.0f} KB of shared memory, the architecture has {limit}"
    if resources.stack or resources.local or found["spills"]:
        yield f"spills: {found['spills']} instructions, {resources.stack + resources.local} bytes"
    if kernel.matrix:
        family = inspection.MATRIX_FAMILY[target.architecture]
        families = set(inspection.MATRIX_FAMILY.values()) if target.architecture in kernel.exceptions else {family}
        if not any(found[name] for name in families):
            yield f"no {family}: the matrix units, or the newest form of them, are not used"
    if found["copies"] < kernel.copies:
        yield f"{found['copies']} asynchronous 16-byte copies, {kernel.copies} are needed"
    if kernel.copies and resources.narrow_loads:
        yield f"{resources.narrow_loads} loads of 2 bytes where it should copy"
    if image.scratch:
        yield f"wants {image.scratch} bytes of scratch memory, which no launcher gives"
    if image.tensor_memory > TENSOR_MEMORY_COLUMNS:
        yield f"{image.tensor_memory} columns of tensor memory, there are {TENSOR_MEMORY_COLUMNS}"
    declared = sum(kind != "constexpr" for kind in kernel.signature.values())
    entered = len(inspection.parameters(image.ptx, image.entry))
    if entered != declared + inspection.HIDDEN_PARAMETERS:
        yield f"has {entered} parameters, launchers pass {declared} + {inspection.HIDDEN_PARAMETERS}"
    else:
        stripped = inspection.without_hidden_parameters(image.ptx, image.entry)
        if error := inspection.assembler_error(stripped, target.architecture):
            yield f"without the hidden parameters it does not assemble: {error}"
    if target.portable and (error := inspection.assembler_error(image.ptx, ARCHITECTURES[-1])):
        yield f"the portable text does not assemble for sm_{ARCHITECTURES[-1]}: {error}"


def gate(modules: Iterable[ModuleType], workers: int, cache: Path) -> Iterator[Row]:
    """Examine all that `shipped()` of the modules lists, kernel by kernel on all targets, in `workers` processes.

    `cache` is a folder for what Triton keeps between runs. CheckFailedError (aot_names) if two kernels share a name.
    """
    listed = [(module.__name__, kernel.name) for module in modules for kernel in module.shipped()]
    if repeated := [name for name, times in Counter(name for _, name in listed).items() if times > 1]:
        raise CheckFailedError("aot_names", f"several shipped kernels are called {', '.join(repeated)}")
    tasks = [(module, name, target) for module, name in listed for target in TARGETS]
    # Fresh processes: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(str(cache),)) as pool:
        yield from pool.map(_examine_named, *zip(*tasks, strict=True))


def _prepare(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    # With line information the same kernel has other bytes in every folder, and three times as many.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"


def _examine_named(module: str, name: str, target: Target) -> Row:
    kernel = next(kernel for kernel in import_module(module).shipped() if kernel.name == name)
    return examine(kernel, target)
