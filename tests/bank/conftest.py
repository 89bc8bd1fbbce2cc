"""A small class state to store, and a bank to store it in."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from fssdeploy.bank import Bank
from fssdeploy.protocol import ClassState

FINGERPRINT = "f" * 64

MakeState = Callable[..., ClassState]


@pytest.fixture
def make_state() -> MakeState:
    def make(seed: int = 0, shots: int = 1, fingerprint: str = FINGERPRINT) -> ClassState:
        random = np.random.default_rng(seed)
        tensors = {
            "prototype": random.standard_normal((4, 8)).astype(np.float32),
            "threshold": np.asarray(random.standard_normal(), np.float32),
            "tokens": random.standard_normal((6, 3)).astype(np.float16).T,  # not laid out in C order
        }
        return ClassState(tensors, shots, fingerprint, {"seed": seed})

    return make


@pytest.fixture
def bank(tmp_path) -> Iterator[Bank]:
    with Bank.open(tmp_path / "bank", FINGERPRINT, create=True) as opened:
        yield opened
