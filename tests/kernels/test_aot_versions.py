"""`make aot` runs the gate under every supported Triton, and never passes without having compiled anything."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "aot.py"


class Commands:
    """Stands in for subprocess.run: pip succeeds or not, the gate returns a code; everything is written down."""

    def __init__(self, pip: bool = True, gate: int = 0) -> None:
        self.pip, self.gate = pip, gate
        self.gates: list[dict[str, str]] = []

    def run(self, command: list[str], env: dict[str, str] | None = None, check: bool = False) -> SimpleNamespace:
        if "pip" in command:
            Path(command[command.index("--target") + 1]).mkdir(parents=True)
            return SimpleNamespace(returncode=0 if self.pip else 1)
        assert env is not None
        self.gates.append(env)
        return SimpleNamespace(returncode=self.gate)


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tool_aot", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "installed", lambda: module.VERSIONS[0])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return module


def test_every_version_is_gated_and_fetched_once(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = Commands()
    monkeypatch.setattr(tool.subprocess, "run", commands.run)
    assert tool.main() == 0
    first, second = commands.gates
    folder = tmp_path / "build" / f"triton-{tool.VERSIONS[1]}"
    assert second["PYTHONPATH"] == str(folder)
    assert first.get("PYTHONPATH") != str(folder)
    assert "TRITON_INTERPRET" not in first
    commands.pip = False  # a second installation would fail
    assert tool.main() == 0
    assert len(commands.gates) == 4


def test_a_version_that_cannot_be_had_is_named(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its half-finished installation is not taken for one the next time."""
    commands = Commands(pip=False)
    monkeypatch.setattr(tool.subprocess, "run", commands.run)
    for _ in range(2):
        assert tool.main() == 0
        assert f"NOT COMPILED WITH TRITON {tool.VERSIONS[1]}" in capsys.readouterr().out
    assert len(commands.gates) == 2


def test_compiling_nothing_is_a_failure(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "installed", lambda: "")
    monkeypatch.setattr(tool.subprocess, "run", Commands(pip=False).run)
    assert tool.main() == 4


def test_a_gate_that_fails_fails_the_command(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool.subprocess, "run", Commands(gate=2).run)
    assert tool.main() == 2
