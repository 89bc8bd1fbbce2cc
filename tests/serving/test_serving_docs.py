"""docs/serving.md tells what is there: options, codes, metrics; and its example for curl works."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
from PIL import Image

from fssdeploy.cli.app import app
from fssdeploy.serving.client import Client
from fssdeploy.serving.environment import Environment
from fssdeploy.serving.models.metrics import FAMILIES
from fssdeploy.serving.names import Names
from fssdeploy.serving.server import Server

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "serving.md").read_text("utf-8")


def shell_examples() -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    return [text for language, text in blocks if language in ("", "sh")]


def test_every_command_and_option_exists() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = [line for text in shell_examples() for line in text.splitlines() if line.startswith("fssdeploy ")]
    assert len(lines) >= 8
    for line in lines:
        words = line.partition("#")[0].split()[1:]
        command = commands[words.pop(0)]
        if hasattr(command, "commands"):
            default = {"repo": "write", "bench": "query"}.get(command.name or "")
            command = command.commands.get(words[0]) or command.commands[default]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known, line


def test_every_code_and_metric_exists() -> None:
    table = TEXT.partition("## What goes wrong")[2]
    codes = {
        code
        for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
        for code in re.findall(r"`([a-z]+(?:_[a-z]+)*)`", row)
    }
    assert len(codes) > 20
    sources = "".join(
        path.read_text("utf-8")
        for folder in ("fssdeploy", "serving", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    )
    assert not {code for code in codes if f'"{code}"' not in sources}
    assert set(re.findall(r"`(fssdeploy_[a-z_]+)`", TEXT)) == set(FAMILIES)


def test_every_model_is_described() -> None:
    rows = re.findall(r"^\| (`fsdino.*?) \|", TEXT, re.MULTILINE)
    named = {
        name if name.startswith("fsdino") else f"fsdino{name}" for row in rows for name in re.findall(r"`(\w+)`", row)
    }
    assert named == set(Names("fsdino").all)


def test_the_example_for_curl(server_environment: Environment, tiny_artifact: Path, tmp_path: Path) -> None:
    missing = [tool for tool in ("curl", "perl", "sed") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"THE EXAMPLE FOR CURL WAS NOT TESTED: there is no {missing[0]}")
    from fssdeploy.serving.configs import Options
    from fssdeploy.serving.repository import sample_shot, write_repository

    write_repository([str(tiny_artifact)], tmp_path / "models", Options())
    for number, name in enumerate(("cup.jpg", "table.jpg")):
        Image.fromarray(sample_shot(number)[0]).save(tmp_path / name)
    (example,) = [text for text in shell_examples() if "curl" in text]
    server = Server(tmp_path / "models", server_environment, log=tmp_path / "log", exit_timeout=3)
    with server, Client(server.http_url, timeout=120) as client:
        script = "set -e\n" + example.replace("127.0.0.1:8000", server.http_url)
        done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert '"name":"version"' in done.stdout.replace(" ", "")
        found = client.segment(tmp_path / "table.jpg", ["cup"])["cup"]
    answer = (tmp_path / "answer").read_bytes()
    assert answer.endswith(found.mask.tobytes())
    assert len(found.mask.tobytes()) == 256 * 256
    assert b'"versions"' in answer
