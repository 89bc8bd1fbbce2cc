"""Our prompt encoder of SAM against the segment-anything package, on the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fssdeploy.modules.sam_prompt import PromptEncoder
from tests.third_party import import_segment_anything

DIM, SIZE, GRID, SETS = 32, 80, 5, 3


@pytest.fixture
def reference() -> Any:
    torch.manual_seed(5)
    return import_segment_anything().PromptEncoder(
        embed_dim=DIM, image_embedding_size=(GRID, GRID), input_image_size=(SIZE, SIZE), mask_in_chans=16
    )


@pytest.fixture
def prompts() -> dict[str, torch.Tensor]:
    """Three sets of four points (every label in use), a box and a mask each."""
    generator = torch.Generator().manual_seed(2)
    corners = torch.rand(SETS, 2, 2, generator=generator) * SIZE
    return {
        "points": torch.rand(SETS, 4, 2, generator=generator) * SIZE,
        "labels": torch.tensor([[1, 0, -1, 1], [0, 0, 1, -1], [1, -1, -1, -1]]),
        "boxes": torch.cat([corners.amin(1), corners.amax(1)], 1),
        "masks": torch.randn(SETS, 1, 4 * GRID, 4 * GRID, generator=generator) * 5,
    }


def ours_from(reference: Any) -> PromptEncoder:
    ours = PromptEncoder(DIM, SIZE, GRID)
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        pytest.param(("points", "labels"), 5, id="points get a padding point"),
        pytest.param(("points", "labels", "boxes"), 6, id="points with boxes do not"),
        pytest.param(("boxes",), 2, id="boxes"),
        pytest.param(("masks",), 0, id="masks"),
        pytest.param(("points", "labels", "masks"), 5, id="points and masks"),
        pytest.param(("boxes", "masks"), 2, id="boxes and masks"),
        pytest.param(("points", "labels", "boxes", "masks"), 6, id="everything"),
        pytest.param((), 0, id="nothing"),
    ],
)
@torch.no_grad()
def test_prompts_equal_the_original(
    reference: Any, prompts: dict[str, torch.Tensor], given: tuple[str, ...], tokens: int
) -> None:
    chosen = {name: prompts[name] for name in given}
    points = (chosen["points"], chosen["labels"]) if "points" in given else None
    expected_sparse, expected_dense = reference(points, chosen.get("boxes"), chosen.get("masks"))
    sparse, dense = ours_from(reference)(**chosen)
    assert sparse.shape == (SETS if given else 1, tokens, DIM)
    torch.testing.assert_close(sparse, expected_sparse, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dense.expand_as(expected_dense), expected_dense, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_position_of_the_cells_equals_the_original(reference: Any) -> None:
    expected = reference.get_dense_pe().flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours_from(reference).position(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_point_in_the_centre_of_a_cell_has_the_code_of_the_cell() -> None:
    encoder = PromptEncoder(DIM, SIZE, GRID)
    for weight in encoder.point_embeddings.parameters():
        nn.init.zeros_(weight)
    x, y = 3, 1
    centre = torch.tensor([[[(x + 0.5) * SIZE / GRID - 0.5, (y + 0.5) * SIZE / GRID - 0.5]]])
    sparse, _ = encoder(centre, torch.tensor([[1]]))
    torch.testing.assert_close(sparse[0, 0], encoder.position()[0, y * GRID + x], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_coordinates_of_padding_do_not_matter(prompts: dict[str, torch.Tensor]) -> None:
    encoder = PromptEncoder(DIM, SIZE, GRID)
    points, labels = prompts["points"], prompts["labels"]
    moved = torch.where((labels == -1)[..., None], torch.nan, points)
    assert torch.equal(encoder(points, labels)[0], encoder(moved, labels)[0])


@torch.no_grad()
def test_double_coordinates_and_short_labels_are_taken(prompts: dict[str, torch.Tensor]) -> None:
    encoder = PromptEncoder(DIM, SIZE, GRID)
    points, labels, boxes = prompts["points"], prompts["labels"], prompts["boxes"].round()
    expected, _ = encoder(points, labels, boxes)
    got, _ = encoder(points.double(), labels.int(), boxes.int())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_points_without_labels_and_unknown_labels_are_refused(prompts: dict[str, torch.Tensor]) -> None:
    encoder = PromptEncoder(DIM, SIZE, GRID)
    with pytest.raises(ValueError, match="points and labels"):
        encoder(prompts["points"])
    for label in (-2, 4):
        with pytest.raises(IndexError):
            encoder(prompts["points"], torch.full_like(prompts["labels"], label))


def test_every_parameter_but_the_random_matrix_is_trained(prompts: dict[str, torch.Tensor]) -> None:
    encoder = PromptEncoder(DIM, SIZE, GRID).train()
    for given in (("points", "labels", "masks"), ("boxes",)):
        sparse, dense = encoder(**{name: prompts[name] for name in given})
        (sparse.square().sum() + dense.square().sum()).backward()
    unreached = [name for name, p in encoder.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0]
    assert unreached == ["pe_layer.positional_encoding_gaussian_matrix"]
