"""Packaging: pins, a base install without torch, every package folder shipped, and the set-up script's decisions."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PINNED = ("torch", "torchvision", "segment-anything", "sam2", "onnx", "onnxscript")
MAX_BASE_MB = 400


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def is_torch(name: str) -> bool:
    return name in ("torch", "torchvision", "triton") or name.startswith("nvidia-")


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup() -> ModuleType:
    return load_tool("setup")


@pytest.mark.parametrize("package", PINNED)
def test_what_must_not_drift_is_pinned_exactly_and_alike_everywhere(package: str) -> None:
    extras = pyproject()["project"]["optional-dependencies"]
    lines = [Requirement(line) for lines in extras.values() for line in lines]
    specifiers = {str(line.specifier) for line in lines if canonicalize_name(line.name) == package}
    assert len(specifiers) == 1
    assert re.fullmatch(r"==\d+(\.\d+)*", specifiers.pop())


def base_closure() -> Iterator[str]:
    """Names of all that the base dependencies need in this environment, themselves included."""
    waiting = [Requirement(line) for line in pyproject()["project"]["dependencies"]]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        for extra in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), extra)
            if key in seen or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
                continue
            seen.add(key)
            needs = map(Requirement, distribution(requirement.name).requires or [])
            waiting += [need for need in needs if not need.marker or need.marker.evaluate({"extra": extra})]
    yield from sorted({name for name, _ in seen})


def test_the_base_install_has_no_torch() -> None:
    names = set(base_closure())
    assert {
        "numpy",
        "onnxruntime",
        "typer",
        "rich",
        "markdown-it-py",
    } <= names  # direct and indirect ones are both there
    assert not [name for name in names if is_torch(name)]


def test_commands_import_only_what_the_base_install_names() -> None:
    """At module level; what an extra brings is imported inside functions. A package that merely happens to be there
    because a development tool needs it would break every installation but ours."""
    modules = {"pillow": "PIL"}
    named = {canonicalize_name(Requirement(line).name) for line in pyproject()["project"]["dependencies"]}
    allowed = {modules.get(name, name) for name in named} | {"fssdeploy"} | sys.stdlib_module_names
    folders = [ROOT / "fssdeploy" / name for name in ("cli", "bank", "images")]
    files = [*(ROOT / "fssdeploy").glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    assert len(files) > 10
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in module_level_imports(path)
        if name.partition(".")[0] not in allowed
    }
    assert not found


def module_level_imports(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_every_package_folder_is_shipped() -> None:
    settings = pyproject()["tool"]["setuptools"]
    folders = settings["package-dir"]
    on_disk = set()
    for package, folder in folders.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            below = init.parent.relative_to(ROOT / folder).parts
            on_disk.add(".".join((package, *below)))
    assert on_disk == set(settings["packages"])


def test_the_linked_tree_has_every_package_and_follows_changes(tmp_path: Path) -> None:
    for folder in ("fssdeploy/bank", "kernels"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text(
        '[tool.setuptools.package-dir]\nfssdeploy = "fssdeploy"\n"fssdeploy.kernels" = "kernels"\n'
    )
    link_tree = load_tool("link_tree").link_tree
    tree = link_tree(tmp_path)
    (tmp_path / "kernels" / "new.py").touch()
    (tmp_path / "fssdeploy" / "new.py").touch()
    assert link_tree(tmp_path) == tree
    found = {path for path in ("bank/__init__.py", "kernels/new.py", "new.py") if (tree / "fssdeploy" / path).exists()}
    assert found == {"bank/__init__.py", "kernels/new.py", "new.py"}
    assert (tmp_path / "kernels" / "__init__.py").exists()  # removing the old tree removed links, not what they lead to


@pytest.mark.parametrize("package", PINNED)
def test_setup_reads_the_pins_from_pyproject(setup: ModuleType, package: str) -> None:
    lines = [line for lines in pyproject()["project"]["optional-dependencies"].values() for line in lines]
    assert f"{package}=={setup.pin(package)}" in lines


@pytest.mark.parametrize(
    ("choice", "system", "gpu", "build"),
    [
        ("", "Linux", False, "cpu"),
        ("", "Linux", True, "cuda"),
        ("cpu", "Linux", True, "cpu"),
        ("cuda", "Linux", False, "cuda"),
        ("", "Darwin", False, "ordinary"),
    ],
)
def test_setup_takes_the_torch_that_fits(setup: ModuleType, choice: str, system: str, gpu: bool, build: str) -> None:
    assert setup.wanted_build(choice, system, gpu) == build


def test_setup_refuses_an_unknown_build(setup: ModuleType) -> None:
    with pytest.raises(SystemExit, match="rocm"):
        setup.wanted_build("rocm", "Linux", False)


def installs(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, offers: bool, uv: bool, **how: str) -> list[list[str]]:
    """The commands that install torch, where pip offers a CPU wheel or not and uv succeeds or not."""
    commands: list[list[str]] = []

    def run(*command: object, env: object = None) -> bool:
        commands.append([str(word) for word in command])
        return uv or "--torch-backend" not in commands[-1]

    monkeypatch.setattr(setup, "run", run)
    monkeypatch.setattr(setup, "pip_offers", lambda _: offers)
    setup.install_torch("torch==9.0", "torchvision==8.0", how.get("build", "cpu"), how.get("index", ""))
    return commands


def test_setup_prefers_the_cpu_wheel_that_pip_finds(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    torch, vision = installs(setup, monkeypatch, offers=True, uv=False)
    assert torch[-1] == "torch==9.0+cpu"
    assert vision[-2:] == ["--no-deps", "torchvision==8.0"]


def test_setup_asks_uv_then_takes_the_default_build(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    first = installs(setup, monkeypatch, offers=False, uv=True)
    assert first[-1][-3:] == ["cpu", "torch==9.0", "torchvision==8.0"]
    second = installs(setup, monkeypatch, offers=False, uv=False)
    assert second[:-1] == first
    assert second[-1][-2:] == ["torch===9.0", "torchvision==8.0"]


def test_setup_for_a_gpu_never_takes_the_cpu_wheel(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = installs(setup, monkeypatch, offers=True, uv=True, build="cuda")
    assert command[-2:] == ["torch===9.0", "torchvision==8.0"]


def test_setup_uses_the_index_it_is_given(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = installs(setup, monkeypatch, offers=True, uv=True, index="URL")
    assert command[-4:] == ["--index-url", "URL", "torch==9.0", "torchvision==8.0"]


@pytest.mark.slow
def test_the_base_wheel_alone_is_small_and_works(tmp_path: Path) -> None:
    """Builds the wheel and installs it into an environment of its own: needs a package index."""
    python = tmp_path / "env" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*command: str | Path) -> str:
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    # From a copy: an earlier build's leftovers would get into the wheel, and this build would leave some.
    source = tmp_path / "source"
    for folder in pyproject()["tool"]["setuptools"]["package-dir"].values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path / "wheel", source)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    call(sys.executable, "-m", "venv", python.parent.parent)
    empty = installed_mb(tmp_path / "env")
    call(python, "-m", "pip", "install", wheel)
    size = installed_mb(tmp_path / "env") - empty
    print(f"the base install takes {size:.0f} MB")
    assert size <= MAX_BASE_MB

    names = {canonicalize_name(item["name"]) for item in json.loads(call(python, "-m", "pip", "list", "--format=json"))}
    assert not [name for name in names if is_torch(name)]
    call(python, "-c", "import fssdeploy, fssdeploy.pipeline, fssdeploy.bank, fssdeploy.export, fssdeploy.kernels")
    paths = json.loads(call(python.parent / "fssdeploy", "doctor", "--json"))["paths"]
    assert paths["deploy_onnxruntime_cpu"]["ok"]
    assert "torch" in paths["export"]["missing"]


def installed_mb(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
