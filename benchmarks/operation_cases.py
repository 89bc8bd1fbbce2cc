"""The operations at the sizes where systems meet them and at awkward ones: inputs, formulations to compare, FLOPs.

Sizes are extents of the inputs, named as in the documentation of the operations. Inputs are drawn in float32 and then
rounded to the dtype of a case, so that all formulations see the same numbers.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fssdeploy.benchmarks import attention_rivals
from fssdeploy.kernels import affinity, correlation, embedding, scma, spectral

Call = Callable[..., Any]
# The choice of an operation among equals: (float64 inputs, its outputs) -> the same choice, differentiable, and by how
# much the best alternative was better, over the root mean square of the values.
ExactChoice = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], tuple[Call, float]]

DTYPES = ("float16", "bfloat16", "float32")
TINY_CHANNELS = 64
STRENGTH = 10.0
# Minimum and maximum of a row, found among rounded logits, move all biases of that row together.
ATTENTION_SLACK = 2.0
# Eigenvectors move by the error of the matrix over the gap to the next eigenvalue.
EMBEDDING_SLACK = 100.0
# The name of an operation that has one form only, among the formulations that are timed.
OURS = "ours"


@dataclass(frozen=True)
class Draw:
    """Random inputs on a device, the same for the same seed."""

    device: str
    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator(self.device).manual_seed(self.seed))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def units(self, *shape: int) -> torch.Tensor:
        """Rows of length 1."""
        return torch.nn.functional.normalize(self.normal(*shape), dim=-1)

    def opposed(self, *shape: int) -> torch.Tensor:
        """Rows of length 1 in two opposite groups: no inner product is near 0, where rounding would decide its sign."""
        rows = self.units(*shape)
        rows[..., 0] = torch.where(self.uniform(*shape[:-1]) < 0.5, -1.0, 1.0)
        return torch.nn.functional.normalize(rows, dim=-1)

    def mask(self, *shape: int) -> torch.Tensor:
        """Soft weights: 0 for half of the entries, from 1/2 to 1 for the others."""
        weights = self.uniform(*shape)
        return weights.masked_fill(weights < 0.5, 0)

    def regions(self, height: int, width: int, count: int) -> torch.Tensor:
        """Labels (height * width,) of a picture in `count` regions: every cell joins the nearest of random ones."""
        cells = torch.cartesian_prod(
            torch.arange(height, dtype=torch.float32, device=self.device),
            torch.arange(width, dtype=torch.float32, device=self.device),
        ).view(-1, 2)
        chosen = torch.randperm(len(cells), generator=self.generator, device=self.device)[:count]
        return torch.cdist(cells, cells[chosen]).argmin(1)


@dataclass(frozen=True)
class Rival:
    """Another formulation, for comparison.

    `counts` where it gives the same result, so that a kernel must beat it. `prepare` makes its inputs, untimed.
    `dtype` is that of its inputs, or None for that of the case.
    """

    call: Call
    compiled: bool = False
    counts: bool = True
    prepare: Callable[..., Sequence[torch.Tensor]] | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Problem:
    """One operation at one size. `variant` names options; `flops` are of one call, `training_flops` with backward.

    `calls` is the public operation, in all forms that it offers by an option; `plain` the same in plain PyTorch.
    `slack` multiplies the limits of the check, for operations that amplify rounding. `priority` orders the timing,
    smallest first; None is checked and never timed. Without `graph`, an operation waits for the device on its way.
    """

    operation: str
    sizes: Mapping[str, int]
    inputs: Callable[[Draw], tuple[torch.Tensor, ...]]
    calls: Mapping[str, Call]
    plain: Call
    flops: float
    variant: str = ""
    training_flops: float | None = None
    differentiable: tuple[int, ...] = ()
    exact_choice: ExactChoice | None = None
    rivals: Mapping[str, Rival] = field(default_factory=dict)
    has_kernel: bool = True
    graph: bool = True
    slack: float = 1.0
    dtypes: tuple[str, ...] = DTYPES
    priority: int | None = None

    @property
    def key(self) -> str:
        sizes = " ".join(f"{name}={extent}" for name, extent in self.sizes.items())
        return " ".join(filter(None, (self.operation, sizes, self.variant)))


@dataclass(frozen=True)
class Case:
    """A problem in one dtype; `training` is forward and backward, else forward alone."""

    problem: Problem
    dtype: str
    training: bool = False

    @property
    def key(self) -> str:
        return f"{self.problem.key} {self.dtype}{' training' if self.training else ''}"


def as_dtype(tensors: Iterable[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Floating tensors in `dtype`, others as they are."""
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)


def cases_to_check(tiny: bool) -> list[Case]:
    """Every problem in every dtype that it is for."""
    return [Case(problem, dtype) for problem in problems(tiny) for dtype in problem.dtypes]


def cases_to_time(tiny: bool) -> list[Case]:
    """What is timed, the most important first: half precision, its training; then other dtypes of what has kernels."""
    ranked: list[tuple[int, Case]] = []
    for problem in problems(tiny):
        if problem.priority is None:
            continue
        for rank, dtype in enumerate(problem.dtypes if problem.has_kernel else problem.dtypes[:1]):
            ranked.append((problem.priority + 20 * rank, Case(problem, dtype)))
            if problem.training_flops is not None:
                ranked.append((problem.priority + 20 * rank + 10, Case(problem, dtype, training=True)))
    return [case for _, case in sorted(ranked, key=lambda entry: entry[0])]


def problems(tiny: bool = False) -> list[Problem]:
    """All problems; `tiny` ones run through Triton's interpreter within seconds."""
    if tiny:
        return [
            *_affinity(query=37, support=41, channels=TINY_CHANNELS, priority=0),
            *_correlation(query=37, support=41, channels=TINY_CHANNELS, outputs=64, layers=2, priority=0),
            *_graph(height=6, width=7, channels=TINY_CHANNELS, regions=3, priority=0),
            *_attention(cells=40, width=64, value_width=64, shots=1, priority=0),
            _attention_over_the_whole_range(cells=24, width=64, value_width=64),
            *_around_attention(cells=24, width=64, value_width=64, shots=2),
            _folded_projection(query=37, channels=TINY_CHANNELS, outputs=64),
            _clusters(points=42, dimensions=3),
        ]
    found: list[Problem] = []
    for cells, channels, priority in ((4096, 1024, 0), (4096, 768, 1), (1369, 1024, 2), (1369, 768, 3), (1024, 768, 3)):
        found += _affinity(query=cells, support=cells, channels=channels, priority=priority)
    found.append(_masked_max(query=1369, support=1369, channels=1024, shots=5, mode="multiply", priority=3))
    for side, priority in ((64, 1), (37, 2), (32, 3)):
        found += _graph(height=side, width=side, channels=1024, regions=8, priority=priority)
    for cells, priority in ((4096, 1), (1369, 2)):
        found += _correlation(query=cells, support=cells, channels=768, outputs=512, layers=4, priority=priority)
    for cells, priority in ((4096, 0), (1024, 1), (1369, 3)):
        for value_width in (256, 64):
            found += _attention(cells=cells, width=256, value_width=value_width, shots=1, priority=priority)
    return found + _awkward()


def typical() -> list[Problem]:
    """Every operation once, at the size of a picture of 37 x 37 cells."""
    cells, channels = 37 * 37, 1024
    return [
        _unit_rows(cells, channels),
        _masked_means(cells, cells, channels),
        _masked_max(cells, cells, channels, shots=1, mode="multiply"),
        _mutual_argmax(cells, cells, channels),
        *_correlation(cells, cells, channels, outputs=512, layers=4, priority=0),
        _folded_projection(cells, channels, outputs=512),
        *_graph(37, 37, channels, regions=8, priority=0),
        _clusters(cells, dimensions=8),
        *_attention(cells, width=256, value_width=64, shots=1),
        *_around_attention(cells, width=256, value_width=64, shots=5),
    ]


def _awkward() -> list[Problem]:
    """Sizes that fill no tile, one cell, several shots, many masks; checked and never timed."""
    return [
        _masked_max(query=1, support=1, channels=768, shots=1, mode="multiply"),
        _masked_max(query=127, support=131, channels=768, shots=2, mode="exclude"),
        _masked_max(query=129, support=257, channels=768, shots=5, mode="multiply", masks=1),
        _masked_max(query=300, support=77, channels=768, shots=1, mode="exclude", masks=3),
        _mutual_argmax(query=127, support=131, channels=768, shots=2),
        _mutual_argmax(query=1, support=1, channels=768),
        _unit_rows(rows=1, channels=768),
        _unit_rows(rows=1013, channels=100, empty=True),
        _correlation_projection(query=127, support=131, channels=768, outputs=64, shots=2),
        _edges(height=1, width=1, channels=1024, regions=1),
        _edges(height=13, width=17, channels=1024, regions=5, broadcast="row", negative="clip"),
        _edges(height=13, width=17, channels=1024, regions=5, broadcast="mean", negative="exp"),
        _edges(height=11, width=6, channels=1024, regions=5, broadcast="geometric", negative="keep"),
        *_attention(cells=101, width=256, value_width=64, shots=2),
        *_attention(cells=65, width=256, value_width=256, shots=5),
        _attention_over_the_whole_range(cells=1024, width=256, value_width=64),
        _attention_over_the_whole_range(cells=65, width=256, value_width=256),
        *_around_attention(cells=101, width=256, value_width=64, shots=2),
        _folded_projection(query=101, channels=768, outputs=512),
        _clusters(points=1369, dimensions=8),
    ]


# --- Affinity --------------------------------------------------------------------------------------------------------


def _affinity(query: int, support: int, channels: int, priority: int) -> list[Problem]:
    return [
        _masked_max(query, support, channels, shots=1, mode="multiply", priority=priority),
        _masked_max(query, support, channels, shots=1, mode="exclude"),
        _mutual_argmax(query, support, channels, priority=priority),
        _unit_rows(query, channels, priority=priority + 2),
        _masked_means(query, support, channels, priority=priority + 4 if channels == 1024 else None),
    ]


def _unit_rows(rows: int, channels: int, priority: int | None = None, empty: bool = False) -> Problem:
    """`empty`: one row is zero and stays so; without gradients, whose 1/eps there would hide all others."""

    def inputs(draw: Draw) -> tuple[torch.Tensor, ...]:
        features = draw.normal(rows, channels)
        if empty:
            features[rows // 2] = 0
        return (features,)

    return Problem(
        "unit_rows",
        {"rows": rows, "channels": channels},
        inputs,
        {OURS: partial(affinity.unit_rows, half=False)},
        lambda features: affinity.unit_rows_reference(features, 1e-12, False),
        flops=4.0 * rows * channels,
        variant="empty row" if empty else "",
        differentiable=() if empty else (0,),
        priority=priority,
    )


def _masked_means(query: int, support: int, channels: int, priority: int | None = None) -> Problem:
    sizes = {"query": query, "support": support, "channels": channels, "shots": 1, "masks": 2}

    def through_the_matrix(rows: torch.Tensor, others: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return weights @ (others @ rows.T) / weights.sum(2, keepdim=True)

    return Problem(
        "masked_means",
        sizes,
        partial(_pairs, sizes),
        {OURS: affinity.masked_means},
        affinity.masked_means_reference,
        flops=4.0 * support * channels + 4.0 * query * channels,
        differentiable=(0, 1, 2),
        has_kernel=False,
        rivals={"N x N": Rival(through_the_matrix)},
        priority=priority,
    )


def _masked_max(
    query: int, support: int, channels: int, shots: int, mode: str, masks: int = 2, priority: int | None = None
) -> Problem:
    sizes = {"query": query, "support": support, "channels": channels, "shots": shots, "masks": masks}
    in_dtype = partial(_max_in_dtype, mode)
    return Problem(
        "masked_max",
        sizes,
        partial(_pairs, sizes),
        {OURS: partial(affinity.masked_max, mode=mode)},
        lambda rows, others, weights: affinity.masked_max_reference(rows, others, weights, mode),
        flops=2.0 * query * support * channels * shots,
        variant=mode,
        differentiable=(0, 1, 2),
        exact_choice=partial(_chosen_maxima, mode),
        rivals={"matrix": Rival(in_dtype), "matrix, compiled": Rival(in_dtype, compiled=True)},
        priority=priority,
    )


def _mutual_argmax(query: int, support: int, channels: int, shots: int = 1, priority: int | None = None) -> Problem:
    sizes = {"query": query, "support": support, "channels": channels, "shots": shots, "masks": 0}

    def in_dtype(rows: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, ...]:
        products = rows @ others.transpose(1, 2)
        return *products.max(2), *products.max(1)

    return Problem(
        "mutual_argmax",
        {name: extent for name, extent in sizes.items() if name != "masks"},
        lambda draw: _pairs(sizes, draw)[:2],
        {OURS: affinity.mutual_argmax},
        affinity.mutual_argmax_reference,
        flops=2.0 * query * support * channels * shots,
        differentiable=(0, 1),
        exact_choice=_chosen_pairs,
        rivals={"matrix": Rival(in_dtype), "matrix, compiled": Rival(in_dtype, compiled=True)},
        priority=priority,
    )


def _pairs(sizes: Mapping[str, int], draw: Draw) -> tuple[torch.Tensor, ...]:
    """Unit rows of a query and of shots, and weights of every mask."""
    shots, support, channels = sizes["shots"], sizes["support"], sizes["channels"]
    rows, others = draw.units(sizes["query"], channels), draw.units(shots, support, channels)
    return rows, others, draw.mask(shots, sizes["masks"], support)


def _max_in_dtype(
    mode: str, rows: torch.Tensor, others: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`masked_max` with the matrix in the dtype of the inputs, all masks at once."""
    weighted = (rows @ others.transpose(1, 2))[:, None] * weights[:, :, None]
    if mode == "exclude":
        weighted = weighted.masked_fill(weights[:, :, None] == 0, -torch.inf)
    values, indices = weighted.max(3)
    return values, indices


def _chosen_maxima(mode: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> tuple[Call, float]:
    rows, others, weights = inputs
    indices = outputs[1]
    weighted = (rows @ others.transpose(1, 2))[:, None] * weights[:, :, None]
    if mode == "exclude":
        weighted = weighted.masked_fill(weights[:, :, None] == 0, -torch.inf)
    best, empty = weighted.amax(3), indices < 0
    if not torch.equal(empty, best == -torch.inf):
        return lambda *_: (best,), math.inf
    index = indices.clamp(min=0)
    shot = torch.arange(len(others), device=rows.device)[:, None, None]

    def chosen(rows: torch.Tensor, others: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor]:
        values = (rows * others[shot, index]).sum(3) * weights.gather(2, index)
        return (values.masked_fill(empty, -torch.inf),)

    return chosen, _regret(best, weighted.gather(3, index[..., None]).squeeze(3))


def _chosen_pairs(inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> tuple[Call, float]:
    rows, others = inputs
    row_indices, column_indices = outputs[1], outputs[3]
    products = rows @ others.transpose(1, 2)
    shot = torch.arange(len(others), device=rows.device)[:, None]

    def chosen(rows: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (rows * others[shot, row_indices]).sum(2), (rows[column_indices] * others).sum(2)

    regret = max(
        _regret(products.amax(2), products.gather(2, row_indices[..., None]).squeeze(2)),
        _regret(products.amax(1), products.gather(1, column_indices[:, None]).squeeze(1)),
    )
    return chosen, regret


def _regret(best: torch.Tensor, chosen: torch.Tensor) -> float:
    finite = ~best.isinf()
    best, chosen = best[finite], chosen[finite]
    if best.numel() == 0:
        return 0.0
    return float((best - chosen).max() / best.square().mean().sqrt().clamp(min=1e-30))


# --- Correlation -----------------------------------------------------------------------------------------------------


def _correlation(query: int, support: int, channels: int, outputs: int, layers: int, priority: int) -> list[Problem]:
    return [
        _correlation_projection(query, support, channels, outputs, shots=1, priority=priority),
        _fold_projection(support, channels, outputs, priority + 4),
        _hypercorrelation(query, support, channels, layers, priority + 4),
    ]


def _correlation_projection(
    query: int, support: int, channels: int, outputs: int, shots: int, priority: int | None = None
) -> Problem:
    def inputs(draw: Draw) -> tuple[torch.Tensor, ...]:
        rows, others = draw.opposed(query, channels), draw.opposed(shots, support, channels)
        return rows, others, draw.normal(shots, support, outputs)

    products = 2.0 * query * support * shots
    return Problem(
        "correlation_projection",
        {"query": query, "support": support, "channels": channels, "outputs": outputs, "shots": shots},
        inputs,
        {OURS: correlation.correlation_projection},
        lambda rows, others, projection: torch.relu(rows @ others.transpose(1, 2)) @ projection,
        flops=products * (channels + outputs),
        # The products again, their gradient, and one product for every input.
        training_flops=products * (channels + outputs) + products * (3 * channels + 2 * outputs),
        differentiable=(0, 1, 2),
        priority=priority,
    )


def _fold_projection(support: int, channels: int, outputs: int, priority: int) -> Problem:
    return Problem(
        "fold_projection",
        {"support": support, "channels": channels, "outputs": outputs, "shots": 1},
        lambda draw: (
            draw.normal(1, support, channels),
            draw.mask(1, support),
            draw.normal(outputs, support) * support**-0.5,
        ),
        {OURS: correlation.fold_projection},
        lambda features, weights, projection: ((projection * weights[:, None]) @ features).mean(0),
        flops=2.0 * support * channels * outputs,
        differentiable=(0, 1, 2),
        has_kernel=False,
        priority=priority,
    )


def _folded_projection(query: int, channels: int, outputs: int) -> Problem:
    return Problem(
        "folded_projection",
        {"query": query, "channels": channels, "outputs": outputs},
        lambda draw: (draw.normal(query, channels), draw.normal(outputs, channels), draw.normal(outputs)),
        {OURS: correlation.folded_projection},
        lambda rows, folded, bias: rows @ folded.T + bias,
        flops=2.0 * query * channels * outputs,
        has_kernel=False,
    )


def _hypercorrelation(query: int, support: int, channels: int, layers: int, priority: int) -> Problem:
    """Without the gradient of the mask: lengths hardly depend on it, so it is nearly 0."""

    def unit(features: torch.Tensor) -> torch.Tensor:
        return features / (features.norm(dim=-1, keepdim=True) + correlation.EPSILON)

    def plain(rows: torch.Tensor, others: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (unit(rows) @ unit(others * weights[:, None]).mT).relu()

    return Problem(
        "hypercorrelation",
        {"layers": layers, "query": query, "support": support, "channels": channels},
        lambda draw: (
            draw.opposed(layers, query, channels),
            draw.opposed(layers, support, channels),
            draw.mask(support),
        ),
        {OURS: correlation.hypercorrelation},
        plain,
        flops=2.0 * layers * query * support * channels,
        differentiable=(0, 1),
        has_kernel=False,
        priority=priority,
    )


# --- Spectral clustering ---------------------------------------------------------------------------------------------


def _graph(height: int, width: int, channels: int, regions: int, priority: int) -> list[Problem]:
    return [
        _edges(height, width, channels, regions, priority=priority),
        _embedding(height, width, channels, regions, priority + 4),
    ]


def _edges(
    height: int,
    width: int,
    channels: int,
    regions: int,
    broadcast: str = "product",
    negative: str = "shift",
    priority: int | None = None,
) -> Problem:
    options = _graph_options(height, width, broadcast, negative)
    cells = height * width

    def inputs(draw: Draw) -> tuple[torch.Tensor, ...]:
        return _picture(draw, height, width, channels, regions)

    return Problem(
        "spectral_edges",
        {"cells": cells, "channels": channels, "regions": regions},
        inputs,
        {OURS: partial(spectral.spectral_edges, **options)},
        partial(spectral.reference, **options),
        # Half of a symmetric matrix need not be computed.
        flops=(2.0 if broadcast in ("row", "column") else 1.0) * cells * cells * channels,
        variant=f"{broadcast} {negative}",
        differentiable=(0, 2, 3),
        priority=priority,
    )


def _embedding(height: int, width: int, channels: int, regions: int, priority: int) -> Problem:
    """Eigenvectors of the graph; which of them, and with what sign, is not determined, what they span is."""
    cells = height * width
    graph = partial(spectral.reference, **_graph_options(height, width, "product", "shift"))

    def inputs(draw: Draw) -> tuple[torch.Tensor, ...]:
        edges, degree = graph(*_picture(draw, height, width, channels, regions))
        return edges, degree

    def spanned(solve: Call, edges: torch.Tensor, degree: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = solve(edges, degree)
        probe = torch.linspace(-1, 1, cells, dtype=vectors.dtype, device=vectors.device)
        return values, vectors @ (vectors.T @ probe)

    def solver(name: str) -> Call:
        return partial(spanned, lambda edges, degree: embedding.spectral_embedding(edges, degree, regions, solver=name))

    return Problem(
        "spectral_embedding",
        {"cells": cells, "vectors": regions},
        inputs,
        {OURS: solver("auto")},
        solver("dense"),
        flops=0.0,
        rivals={
            "lobpcg": Rival(solver("lobpcg")),
            "eigsh (CuPy)": Rival(partial(spanned, partial(_cupy_embedding, regions))),
        },
        has_kernel=False,
        graph=False,
        slack=EMBEDDING_SLACK,
        dtypes=("float32",),
        priority=priority,
    )


def _clusters(points: int, dimensions: int) -> Problem:
    """Clusters that lie apart; compared are the positions of all points relative to the mean of their cluster."""

    def inputs(draw: Draw) -> tuple[torch.Tensor, ...]:
        nearest = torch.arange(points, device=draw.device) % dimensions
        return (torch.eye(dimensions, device=draw.device)[nearest] + 0.05 * draw.normal(points, dimensions),)

    def relative(rows: torch.Tensor) -> torch.Tensor:
        labels, _ = embedding.kmeans(rows, dimensions, seed=0)
        member = torch.nn.functional.one_hot(labels, dimensions).to(rows.dtype)
        return rows - member @ (member.T @ rows / member.sum(0)[:, None])

    return Problem(
        "kmeans",
        {"points": points, "dimensions": dimensions, "clusters": dimensions},
        inputs,
        {OURS: relative},
        relative,
        flops=0.0,
        has_kernel=False,
        dtypes=("float32",),
        graph=False,
    )


def _cupy_embedding(count: int, edges: torch.Tensor, degree: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lanczos of CuPy on the symmetric Laplacian; ImportError where there is no CuPy."""
    import cupy

    eigsh = importlib.import_module("cupyx.scipy.sparse.linalg").eigsh

    scale = degree.rsqrt()
    matrix = edges.float() * scale[:, None] * scale
    values, vectors = eigsh(cupy.from_dlpack(matrix), k=count, which="LA")
    # CuPy works on a stream of its own.
    cupy.cuda.get_current_stream().synchronize()
    descending = cupy.argsort(-values)
    return torch.from_dlpack(values[descending]), torch.from_dlpack(vectors[:, descending])


def _picture(draw: Draw, height: int, width: int, channels: int, regions: int) -> tuple[torch.Tensor, ...]:
    """Unit features of a picture in regions, its labels, the likeness of the regions, evidence for half of them."""
    labels = draw.regions(height, width, regions)
    features = draw.normal(regions, channels)[labels] + 0.7 * draw.normal(height * width, channels)
    features = torch.nn.functional.normalize(features, dim=-1)
    member = torch.nn.functional.one_hot(labels, regions).to(features.dtype)
    means = member.T @ features / member.sum(0).clamp(min=1)[:, None]
    evidence = torch.where(labels < (regions + 1) // 2, 0.5, -0.5) + 0.1 * draw.normal(height * width)
    return features, labels, means @ means.T, evidence


def _graph_options(height: int, width: int, broadcast: str, negative: str) -> dict[str, Any]:
    """The Gaussian is as wide as GSM takes it (GsmOptions.sigma): two cells, in proportion beyond 37 cells a side."""
    sigma = 2.0 * max(1.0, height / 37)
    return {"height": height, "width": width, "sigma": sigma, "broadcast": broadcast, "negative": negative}


# --- Calibrated attention --------------------------------------------------------------------------------------------


def _attention(cells: int, width: int, value_width: int, shots: int, priority: int | None = None) -> list[Problem]:
    """The memory of a query: a support block, the calibrated cells of the query, four pointers a picture."""
    keys = 2 * cells + 4 * (shots + 1)
    options: dict[str, Any] = {"start": cells, "strength": STRENGTH}
    products = 2.0 * cells * keys
    rivals = {
        "flex_attention": Rival(partial(attention_rivals.with_flex_attention, **options), compiled=True),
        "SDPA, bias": Rival(partial(attention_rivals.with_materialised_bias, **options)),
        "SDPA, uncalibrated, efficient": Rival(attention_rivals.efficient_attention, counts=False),
        "SDPA, uncalibrated, flash": Rival(
            attention_rivals.flash_attention, counts=False, prepare=attention_rivals.wide_values
        ),
    }
    return [
        Problem(
            "calibrated_attention",
            {"queries": cells, "keys": keys, "channels": width, "value_channels": value_width},
            partial(_memory, cells, keys, width, value_width),
            {form: partial(scma.calibrated_attention, form=form, **options) for form in ("rows", "flash")},
            partial(_plain_attention, cells, "row"),
            flops=products * (width + value_width),
            variant="row",
            training_flops=products * (width + value_width) + products * (3 * width + 2 * value_width),
            differentiable=(0, 1, 2),
            rivals=rivals,
            slack=ATTENTION_SLACK,
            priority=priority,
        )
    ]


def _attention_over_the_whole_range(cells: int, width: int, value_width: int) -> Problem:
    keys = 2 * cells + 8
    options: dict[str, Any] = {"start": cells, "strength": STRENGTH, "span": "global"}
    return Problem(
        "calibrated_attention",
        {"queries": cells, "keys": keys, "channels": width, "value_channels": value_width},
        partial(_memory, cells, keys, width, value_width),
        {form: partial(scma.calibrated_attention, form=form, **options) for form in ("rows", "flash")},
        partial(_plain_attention, cells, "global"),
        flops=2.0 * cells * keys * (width + value_width),
        variant="global",
        differentiable=(0, 1, 2),
        slack=ATTENTION_SLACK,
    )


def _around_attention(cells: int, width: int, value_width: int, shots: int) -> list[Problem]:
    """How much the cells resemble the target, and the projection of the attended values."""

    def resemblance(supports: torch.Tensor, masks: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        prototypes = (masks[..., None] * supports).sum(1) / (masks.sum(1, keepdim=True) + scma.AREA_EPS)
        lengths = prototypes.norm(dim=1, keepdim=True) * keys.norm(dim=1)
        cosines = prototypes @ keys.T / (lengths + scma.RANGE_EPS)
        low, high = cosines.amin(1, keepdim=True), cosines.amax(1, keepdim=True)
        return ((cosines - low) / (high - low + scma.RANGE_EPS)).mean(0)

    def calibrated(*tensors: torch.Tensor) -> torch.Tensor:
        return scma.shot_calibration(*tensors).to(tensors[0].dtype)

    return [
        Problem(
            "shot_calibration",
            {"shots": shots, "positions": cells, "keys": cells, "channels": width},
            lambda draw: (draw.normal(shots, cells, width), draw.mask(shots, cells), draw.normal(cells, width)),
            {OURS: calibrated},
            resemblance,
            flops=4.0 * shots * cells * width,
            has_kernel=False,
        ),
        Problem(
            "project_values",
            {"queries": cells, "value_channels": value_width, "outputs": width},
            lambda draw: (draw.normal(cells, value_width), draw.normal(width, value_width), draw.normal(width)),
            {OURS: scma.project_values},
            lambda attended, weight, bias: attended @ weight.T + bias,
            flops=2.0 * cells * width * value_width,
            has_kernel=False,
        ),
    ]


def _memory(cells: int, keys: int, width: int, value_width: int, draw: Draw) -> tuple[torch.Tensor, ...]:
    return (
        draw.normal(1, cells, width),
        draw.normal(1, keys, width),
        draw.normal(1, keys, value_width),
        draw.uniform(1, cells),
    )


def _plain_attention(
    start: int, span: str, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, calibration: torch.Tensor
) -> torch.Tensor:
    scale = query.shape[-1] ** -0.5
    return scma.reference_attention(query, keys, values, calibration, start, STRENGTH, span, scale)[0]
