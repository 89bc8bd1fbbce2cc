"""Our image encoder of SAM against the segment-anything package, on the same random weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from fssdeploy.modules.sam_encoder import ImageEncoder, SelfAttention, cut_windows, join_windows, relative_codes
from tests.third_party import import_segment_anything

PATCH, DIM, HEADS, OUT = 4, 24, 3, 16


def fill_tables(module: nn.Module) -> None:
    """Position tables are zero in a new network: give them values that show."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                parameter.normal_(0, 0.5)


def pair(grid: int, window: int, global_blocks: tuple[int, ...]) -> tuple[Any, ImageEncoder]:
    """The original and ours with the same weights: three blocks on a grid of `grid` x `grid` patches."""
    torch.manual_seed(7)
    theirs = import_segment_anything().ImageEncoderViT(
        img_size=grid * PATCH,
        patch_size=PATCH,
        embed_dim=DIM,
        depth=3,
        num_heads=HEADS,
        mlp_ratio=2.5,
        out_chans=OUT,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=window,
        global_attn_indexes=global_blocks,
    )
    fill_tables(theirs)
    ours = ImageEncoder(
        image_size=grid * PATCH,
        patch=PATCH,
        dim=DIM,
        depth=3,
        heads=HEADS,
        mlp_ratio=2.5,
        window=window,
        global_blocks=global_blocks,
        out=OUT,
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize(
    ("grid", "window", "global_blocks"),
    [
        pytest.param(8, 4, (), id="windows that divide the grid"),
        pytest.param(9, 4, (), id="windows that do not"),
        pytest.param(3, 5, (1,), id="window larger than the grid"),
        pytest.param(7, 3, (0, 2), id="windows between global blocks"),
        pytest.param(6, 0, (), id="all global"),
    ],
)
def test_encoder_and_its_gradients_equal_the_original(grid: int, window: int, global_blocks: tuple[int, ...]) -> None:
    theirs, ours = pair(grid, window, global_blocks)
    pictures = torch.randn(2, 3, grid * PATCH, grid * PATCH)
    direction = torch.randn(2, OUT, grid, grid)
    expected, got = theirs(pictures), ours(pictures)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    names = [name for name, _ in ours.named_parameters()]
    wanted = torch.autograd.grad((expected * direction).sum(), [theirs.get_parameter(name) for name in names])
    gradients = torch.autograd.grad((got * direction).sum(), [ours.get_parameter(name) for name in names])
    for name, gradient, truth in zip(names, gradients, wanted, strict=True):
        largest = float(truth.abs().max())
        assert largest > 1e-4, name
        torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize(("side", "rows", "columns"), [(5, 3, 3), (3, 6, 6), (4, 3, 7), (4, 4, 2)])
@torch.no_grad()
def test_tables_made_for_another_grid_are_resampled_as_in_the_original(side: int, rows: int, columns: int) -> None:
    torch.manual_seed(1)
    module = import_segment_anything().image_encoder
    theirs = module.Attention(DIM, HEADS, use_rel_pos=True, input_size=(side, side))
    fill_tables(theirs)
    ours = SelfAttention(DIM, HEADS, side)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, rows, columns, DIM)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_relative_codes_depend_on_the_signed_distance_alone() -> None:
    table = torch.arange(-3.0, 4.0)[:, None]  # the code of distance n is n
    codes = relative_codes(table, 4)[..., 0]
    position = torch.arange(4.0)
    torch.testing.assert_close(codes, position[:, None] - position)


def test_windows_are_cut_row_by_row_filled_with_zeros_and_joined_again() -> None:
    x = torch.arange(1.0, 2 * 5 * 7 + 1).view(2, 5, 7, 1)
    windows = cut_windows(x, 3)
    assert windows.shape == (2 * 2 * 3, 3, 3, 1)
    torch.testing.assert_close(windows[1], x[0, :3, 3:6])
    torch.testing.assert_close(windows[3, :2], x[0, 3:, :3])
    assert windows[3, 2].count_nonzero() == 0
    assert windows.count_nonzero() == x.numel()
    torch.testing.assert_close(join_windows(windows, 5, 7), x)
