"""Phases and schedules, by hand."""

from __future__ import annotations

import math

import pytest

from fssdeploy.errors import InputError
from fssdeploy.training.schedule import Phase, Place, check_sizes, cosine, locate, parse_phases, poly, warmup_cosine

PHASES = (Phase(2, 8, 126), Phase(3, 4, 252))


def test_where_a_step_lies() -> None:
    places = [locate(PHASES, step) for step in range(5)]
    assert places == [
        Place(0, 0, range(8), 126),
        Place(0, 1, range(8, 16), 126),
        Place(1, 0, range(16, 20), 252),
        Place(1, 1, range(20, 24), 252),
        Place(1, 2, range(24, 28), 252),
    ]
    with pytest.raises(IndexError):
        locate(PHASES, 5)


def test_schedules_by_hand() -> None:
    assert [cosine(done) for done in (0, 1 / 3, 0.5, 1)] == pytest.approx([1, 0.75, 0.5, 0])
    assert [poly(done) for done in (0, 0.5, 0.9, 1)] == pytest.approx([1, 0.5**0.9, 0.1**0.9, 0])
    assert [warmup_cosine(done) for done in (0, 0.025, 0.05)] == pytest.approx([1e-3, 0.5, 1])
    third = 0.05 + 0.95 / 3
    assert [warmup_cosine(done) for done in (third, 0.525, 1)] == pytest.approx([0.75, 0.5, 0])
    assert warmup_cosine(0.04999) == pytest.approx(warmup_cosine(0.05), rel=1e-3)
    assert math.isclose(warmup_cosine(0.5, warmup=0.0), cosine(0.5))


def test_phases_as_text() -> None:
    assert parse_phases("2x8x126,3x4x252") == PHASES
    for text in ("", "2x8", "2x8x126x1", "axbxc", "0x8x126", "2x-8x126", "2x8x126,", "2x8x1.5"):
        with pytest.raises(InputError) as caught:
            parse_phases(text)
        assert caught.value.code == "phases"


def test_sizes_that_a_network_takes() -> None:
    check_sizes(PHASES, 14)
    check_sizes(PHASES[:1], 14, 126)
    for phases, patch, only in ((PHASES, 16, None), (PHASES, 14, 126), ((Phase(1, 1, 14),), 14, None)):
        with pytest.raises(InputError) as caught:
            check_sizes(phases, patch, only)
        assert caught.value.code == "phases"
