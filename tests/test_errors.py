"""Errors: one line for people, and the same error on the other side of a process."""

from __future__ import annotations

import pickle

from fssdeploy.errors import InputError


def test_the_line_has_what_why_and_what_to_do() -> None:
    error = InputError("mask_empty", "the mask is empty", "no pixel is set", "Draw\none.")
    assert str(error) == error.line() == "the mask is empty: no pixel is set. Draw one."


def test_an_error_of_a_worker_process_arrives_whole() -> None:
    """An exception that cannot be rebuilt breaks the whole pool of processes instead."""
    error = InputError("mask_empty", "the mask is empty", "no pixel is set", "Draw one.")
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is InputError and arrived.to_dict() == error.to_dict() and str(arrived) == str(error)
