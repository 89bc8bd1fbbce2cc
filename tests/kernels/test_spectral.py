"""The graph of a query against the NumPy host and loops in float64, its gradients, and PyTorch's tracers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from fssdeploy.errors import InputError
from fssdeploy.glue.gsm import graph
from fssdeploy.kernels import dispatch, runtime, spectral
from fssdeploy.kernels.spectral import BROADCASTS, NEGATIVES, spectral_edges

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
MODES = list(itertools.product(BROADCASTS, NEGATIVES))


def graph_inputs(cells: int, channels: int = 5, regions: int = 3, dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(cells)
    features, means = (torch.randn(n, channels, generator=generator, dtype=torch.float64) for n in (cells, regions))
    means = torch.nn.functional.normalize(means)
    labels = torch.randint(0, regions, (cells,), generator=generator)
    evidence = 0.4 * torch.randn(cells, generator=generator, dtype=torch.float64)
    features = torch.nn.functional.normalize(features)
    return features.to(dtype), labels, (means @ means.T).to(dtype), evidence.to(dtype)


@pytest.mark.parametrize(("broadcast", "negative"), MODES)
def test_every_mode_agrees_with_the_host(broadcast: str, negative: str) -> None:
    features, labels, table, evidence = graph_inputs(35)
    edges, degree = spectral_edges(features, labels, table, evidence, 5, 7, 1.5, broadcast, negative)
    reference = np.exp(evidence.numpy())
    expected = graph.edge_weights(
        (features @ features.T).numpy(),
        (5, 7),
        labels.numpy(),
        table.numpy(),
        reference,
        sigma=1.5,
        negative=negative,
        broadcast=broadcast,
    )
    np.testing.assert_allclose(edges.numpy(), expected, rtol=1e-6, atol=1e-6)  # the host's Gaussian is float32
    np.testing.assert_allclose(degree.numpy(), expected.sum(1), rtol=1e-6, atol=1e-5)


def test_the_formula_edge_by_edge() -> None:
    features, labels, table, evidence = graph_inputs(12)
    edges, degree = spectral_edges(features, labels, table, evidence, 3, 4, 0.8)
    for i, j in itertools.product(range(12), repeat=2):
        distance = (i // 4 - j // 4) ** 2 + (i % 4 - j % 4) ** 2
        near = math.exp(-distance / (2 * 0.8**2)) + (1 + float(table[labels[i], labels[j]])) / 2
        weight = (1 + float(features[i] @ features[j])) / 2 * near * math.exp(float(evidence[i] + evidence[j]))
        assert float(edges[i, j]) == pytest.approx(weight, rel=1e-12)
    torch.testing.assert_close(degree, edges.sum(1))


def test_one_cell_and_cells_without_features() -> None:
    features, labels, table, evidence = graph_inputs(1)
    edges, degree = spectral_edges(features * 0, labels, table, evidence, 1, 1, 2.0, "none", "clip")
    assert edges.item() == degree.item() == 0  # a cosine of zero is clipped to zero
    edges, _ = spectral_edges(features, labels, table, evidence, 1, 1, 2.0, "none", "clip")
    assert edges.item() == pytest.approx(1 + float(table[labels[0], labels[0]].clamp_min(0)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("parameters", [None, torch.float32])
def test_other_dtypes(dtype: torch.dtype, tolerance: float, parameters: torch.dtype | None) -> None:
    features, labels, table, evidence = graph_inputs(15, dtype=dtype)
    table, evidence = (tensor.to(parameters or dtype) for tensor in (table, evidence))
    edges, degree = spectral_edges(features, labels, table, evidence, 5, 3, 2.0)
    assert (edges.dtype, degree.dtype) == (dtype, torch.float32)
    exact, exact_degree = spectral_edges(features.double(), labels, table.double(), evidence.double(), 5, 3, 2.0)
    torch.testing.assert_close(edges.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(degree.double(), exact_degree, rtol=tolerance, atol=tolerance)


def test_strides_do_not_matter() -> None:
    inputs = graph_inputs(15)
    features, labels, table, evidence = (torch.stack([tensor, tensor], -1)[..., 0] for tensor in inputs)
    assert not features.is_contiguous()
    found = spectral_edges(features, labels, table, evidence, 3, 5, 2.0)
    torch.testing.assert_close(found, spectral_edges(*inputs, 3, 5, 2.0))


@pytest.mark.parametrize(("broadcast", "negative"), MODES)
def test_gradients(broadcast: str, negative: str) -> None:
    features, labels, table, evidence = graph_inputs(6)
    if negative == "clip":  # no cosine near the kink
        assert (features @ features.T).abs().min() > 1e-3
        assert table.abs().min() > 1e-3

    def edges(*leaves: torch.Tensor) -> Any:
        return spectral_edges(leaves[0], labels, leaves[1], leaves[2], 2, 3, 1.2, broadcast, negative)

    leaves = tuple(tensor.clone().requires_grad_() for tensor in (features, table, evidence))
    assert torch.autograd.gradcheck(edges, leaves)


@pytest.mark.parametrize("output", [0, 1])
def test_gradients_of_one_output_in_half_precision(output: int) -> None:
    features, labels, table, evidence = graph_inputs(12, dtype=torch.float16)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in (features, table.float(), evidence))
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    found, expected = (
        torch.autograd.grad(spectral_edges(f, labels, t, e, 4, 3, 1.0)[output].sum(), (f, t, e))
        for f, t, e in (leaves, exact)
    )
    for mine, leaf, theirs in zip(found, leaves, expected, strict=True):
        assert mine.dtype == leaf.dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-2, atol=2e-2)


def test_registration() -> None:
    features, labels, table, evidence = graph_inputs(6)
    leaves = (features.requires_grad_(), labels, table.requires_grad_(), evidence.requires_grad_())
    torch.library.opcheck(torch.ops.fssdeploy.spectral_edges.default, (*leaves, 2, 3, 1.2, "product", "shift"))


class Graph(torch.nn.Module):
    """The graph of a map (h, w, C), so that height and width are sizes too."""

    def forward(
        self, features: torch.Tensor, labels: torch.Tensor, table: torch.Tensor, evidence: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        height, width, _ = features.shape
        return spectral_edges(features.flatten(0, 1), labels, table, evidence, height, width, 2.0, "mean", "clip")


def test_export_with_dynamic_sizes() -> None:
    features, *others = graph_inputs(12)
    inputs = (features.unflatten(0, (3, 4)), *others)
    auto = torch.export.Dim.AUTO
    dynamic = ({0: auto, 1: auto, 2: auto}, *({axis: auto for axis in range(other.dim())} for other in others))
    program = torch.export.export(Graph(), inputs, dynamic_shapes=dynamic)
    features, *others = graph_inputs(35, channels=4, regions=6)
    other = (features.unflatten(0, (5, 7)), *others)
    torch.testing.assert_close(program.module()(*other), Graph()(*other))


def test_compilation_with_gradients() -> None:
    features, labels, table, evidence = graph_inputs(12)

    def loss(features: torch.Tensor, table: torch.Tensor, evidence: torch.Tensor) -> torch.Tensor:
        edges, degree = spectral_edges(features, labels, table, evidence, 3, 4, 1.2, "geometric", "exp")
        return edges.square().sum() + degree.sum()

    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)):
        leaves = [tensor.clone().requires_grad_() for tensor in (features, table, evidence)]
        gradients.append(torch.autograd.grad(function(*leaves), leaves))
    torch.testing.assert_close(gradients[1], gradients[0])


VALID: dict[str, Any] = dict(
    zip(("features", "labels", "table", "evidence"), graph_inputs(6), strict=True),
    height=2,
    width=3,
    sigma=2.0,
    broadcast="product",
    negative="shift",
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"features": VALID["features"][0]}, "features has shape"),
        ({"features": VALID["labels"][:, None]}, "floating point"),
        ({"labels": VALID["labels"].int()}, "labels is torch.int32"),
        ({"labels": VALID["labels"] + 3}, "outside of the table"),
        ({"labels": VALID["labels"] - 3}, "outside of the table"),
        ({"table": VALID["table"].half()}, "table is torch.float16"),
        ({"table": VALID["table"][:2]}, "regions"),
        ({"table": VALID["table"][:0, :0]}, "no regions"),
        ({"evidence": VALID["evidence"].to("meta")}, "evidence is .* on meta"),
        ({"evidence": VALID["evidence"][1:]}, "cells"),
        ({"height": 3}, "grid has 9"),
        ({"sigma": 0.0}, "sigma is 0"),
        ({"sigma": math.inf}, "sigma is inf"),
        ({"broadcast": "rows"}, "broadcast cannot be 'rows'"),
        ({"negative": "drop"}, "negative cannot be 'drop'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_belong_together(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        spectral_edges(**(VALID | change))
    assert caught.value.code == "kernel_input"


def test_the_choices_are_those_of_the_host() -> None:
    """The host knows no list of names, only what it does with them; names it does not know do nothing there."""
    ones = np.ones((2, 2), np.float32)
    reference = np.array([2.0, 3.0], np.float32)
    spreads = {
        broadcast: graph.edge_weights(
            ones, (1, 2), np.zeros(2, int), ones[:1, :1], reference, sigma=1e9, negative="keep", broadcast=broadcast
        )
        for broadcast in BROADCASTS
    }
    assert len({tuple(spread.flat) for spread in spreads.values()}) == len(BROADCASTS)
    for name, broadcast in BROADCASTS.items():
        assert broadcast.symmetric == np.allclose(spreads[name], spreads[name].T)


def test_it_says_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    spectral_edges(**VALID)
    assert dispatch.taken()["spectral_edges"] == dispatch.Choice("reference", f"{dispatch.VARIABLE}=reference")


def test_the_kernel_declines_sizes_beyond_its_indices() -> None:
    cells = 46_400  # cells^2 is above 2^31
    features, labels, table, evidence = (
        torch.empty(shape, device="meta") for shape in ((cells, 32), (cells,), (1, 1), (cells,))
    )
    with pytest.raises(runtime.UnsupportedError, match="edges"):
        spectral._launch(features, labels.long(), table, evidence, 232, 2.0, "product", "shift")


def test_every_shipped_configuration_is_complete() -> None:
    kernels = spectral.shipped()
    assert len({kernel.name for kernel in kernels}) == len(kernels) == 6
    for kernel in kernels:
        assert {name for name, kind in kernel.signature.items() if kind == "constexpr"} == set(kernel.constexprs)
        assert set(kernel.aligned) < set(kernel.signature)
