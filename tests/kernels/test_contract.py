"""The checks that every operation makes: each refuses what it should, names the operation, and lets the rest pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fssdeploy.errors import InputError
from fssdeploy.kernels import contract

ROWS = torch.zeros(3, 4)

PASSES: list[Callable[[], None]] = [
    lambda: contract.require_rank("op", query=(ROWS, 2), support=(ROWS[None], 3)),
    lambda: contract.require_alike("op", query=ROWS, support=ROWS[None]),
    lambda: contract.require_alike("op", query=ROWS.half()),
    lambda: contract.require_equal("op", "channels", query=4, support=4, weights=4),
    lambda: contract.require_some("op", shots=1, masks=2),
]

REFUSALS: list[tuple[Callable[[], None], str]] = [
    (lambda: contract.require_rank("op", query=(ROWS, 2), support=(ROWS, 3)), r"support has shape \(3, 4\).*3 dim"),
    (lambda: contract.require_alike("op", query=ROWS.long()), "query is torch.int64"),
    (
        lambda: contract.require_alike("op", query=ROWS, support=ROWS.half()),
        "query is torch.float32, support is torch.float16",
    ),
    (lambda: contract.require_alike("op", query=ROWS, support=ROWS.to("meta")), "query is on cpu, support on meta"),
    (
        lambda: contract.require_equal("op", "channels", query=4, support=4, weights=5),
        "channels: query has 4, support has 4, weights has 5",
    ),
    (lambda: contract.require_some("op", masks=2, shots=0), "there are no shots"),
]


@pytest.mark.parametrize("check", PASSES)
def test_what_fits_passes(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(("check", "said"), REFUSALS)
def test_what_does_not_fit_is_refused(check: Callable[[], None], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        check()
    assert caught.value.code == "kernel_input"
    assert caught.value.exit_code == 3
    assert "fssdeploy::op" in str(caught.value)
    assert "\n" not in str(caught.value)
