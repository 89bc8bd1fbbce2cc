"""Reports: the same findings as text for people and as JSON for programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fssdeploy.report import Report, Table, cell_text


def sample() -> Report:
    table = Table("runs", ["engine", "ms", "ok"], [["onnxruntime", 12.3456789, True], ["openvino", 7, False]])
    return Report(
        "timing", {"machine": "test", "cores": 2}, [table], ["Run: pip install 'fssdeploy[openvino]'"], {"n": 1}
    )


def test_text_holds_every_part_in_order() -> None:
    text = sample().text(width=80)
    parts = ["timing", "machine", "runs", "onnxruntime", "12.35", "yes", "openvino", "no", "Run: pip"]
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)


def test_brackets_are_text_not_markup() -> None:
    report = Report("[bold]", {"extra": "fssdeploy[export]"}, [Table("[t]", ["[c]"], [["[red]x"]])], [":smile: [n]"])
    text = report.text(width=80)
    for part in ("[bold]", "fssdeploy[export]", "[t]", "[c]", "[red]x", ":smile: [n]"):
        assert part in text


@pytest.mark.parametrize("width", [30, 60])
def test_tables_and_facts_keep_to_the_width_and_lose_nothing(width: int) -> None:
    words = " ".join(f"word{i}" for i in range(20))
    text = Report("t", {"fact": words}, [Table("table", ["a", "b"], [[words, "x" * 50]])]).text(width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert all(text.count(f"word{i}") >= 2 for i in range(20))
    assert text.count("x") == 50


def test_a_note_stays_on_one_line() -> None:
    command = "pip install " + " ".join(f"package{i}" for i in range(20))
    assert command in Report("t", notes=[command]).text(width=40).splitlines()


def test_codes_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert "\x1b" not in sample().text(width=80)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b" in sample().text(width=80)


def test_text_is_ascii_so_that_any_locale_can_print_it() -> None:
    assert sample().text(width=80).isascii()


def test_json_has_only_plain_values() -> None:
    report = Report(
        "t",
        {"fact": "for people"},
        [Table("x", ["n"], [[np.int64(3)], [float("nan")]])],
        ["a note"],
        data={
            "path": Path("a") / "b",
            "share": np.float32(0.5),
            "array": np.arange(3),
            "inf": [float("inf"), np.float64("-inf")],
            "tuple": (1, np.bool_(True)),
            5: None,
        },
    )
    assert json.loads(report.json()) == {
        "title": "t",
        "notes": ["a note"],
        "path": str(Path("a") / "b"),
        "share": 0.5,
        "array": [0, 1, 2],
        "inf": [None, None],
        "tuple": [1, True],
        "5": None,
    }


def test_what_json_cannot_say_is_an_error_not_a_guess() -> None:
    with pytest.raises(TypeError):
        Report("t", data={"thing": object()}).json()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (True, "yes"), (np.bool_(False), "no"), (1.23456, "1.235"), (np.float32(1e-9), "1e-09"), (7, "7")],
)
def test_cells(value: object, text: str) -> None:
    assert cell_text(value) == text
