"""The command as a process of its own: what it imports, where it writes, how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Workplace

COMMAND = Path(sysconfig.get_path("scripts")) / "fssdeploy"

# Any attempt to import these ends the process with a traceback.
WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "onnx", "onnxscript", "skimage", "matplotlib"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
from fssdeploy.cli.main import main
try:
    main()
finally:
    assert "onnxruntime" in sys.modules and "torch" not in sys.modules
"""

# An export that gets stuck with a half-written folder; it says when.
STUCK_EXPORT = """
import signal, sys, time
# A test run started in the background hands down an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
from fssdeploy import shipped
from fssdeploy.export import artifact
from fssdeploy.systems import fsdino
from tests.networks import SMALL
def stuck(module, spec, folder, **options):
    (folder / "encoder.onnx").write_text("half")
    print("stuck", flush=True)
    time.sleep(60)
artifact.export_stage = stuck
fsdino.PRESETS["tiny"] = SMALL
shipped.checkpoint = lambda name: None
from fssdeploy.cli.main import main
main()
"""


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=60, **options
    )  # type: ignore[call-overload, no-any-return]


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return run("bash", "-c", line.replace("fssdeploy", f"'{COMMAND}'", 1), cwd=folder)


def test_enrolment_and_segmentation_import_no_torch(workplace: Workplace, tmp_path: Path) -> None:
    python = [sys.executable, "-c", WITHOUT_TORCH]
    pair = ["--image", workplace.first, "--mask", workplace.mask]
    commands = [
        ["enroll", workplace.artifact, "thing", *pair, "--bank", tmp_path / "bank"],
        ["segment", workplace.artifact, "--bank", tmp_path / "bank", workplace.second, "-o", tmp_path / "out"],
        ["segment", workplace.artifact, "--support", f"{workplace.first}:{workplace.mask}", workplace.second],
    ]
    for command in commands:
        answer = run(*python, *command, cwd=tmp_path)
        assert answer.returncode == 0, answer.stderr
        assert answer.stderr == ""


def test_the_hook_of_the_test_above_does_refuse(tmp_path: Path) -> None:
    answer = run(sys.executable, "-c", WITHOUT_TORCH, "export", "fsdino", cwd=tmp_path)
    assert answer.returncode != 0


def test_without_a_home_and_in_ascii(workplace: Workplace, tmp_path: Path) -> None:
    environment = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PATH": "/nowhere"}
    os.symlink(workplace.second, tmp_path / "ünï.png")
    command = [COMMAND, "segment", os.path.relpath(workplace.artifact, tmp_path), "--bank"]
    command += [os.path.relpath(workplace.bank, tmp_path), "ünï.png", "-o", "out"]
    assert run(*command, cwd=tmp_path, env=environment).returncode == 0
    answer = run(*command, "--json", cwd=tmp_path, env=environment)
    assert answer.returncode == 0 and answer.stderr == ""
    assert json.loads(answer.stdout)["pictures"][0]["file"] == "ünï.png"


@pytest.mark.parametrize(
    ("line", "code", "errors"),
    [
        ("fssdeploy doctor | head -n 1; exit ${PIPESTATUS[0]}", 0, 0),
        ("fssdeploy doctor --json | true; exit ${PIPESTATUS[0]}", 0, 0),
        ("fssdeploy --help | head -n 1; exit ${PIPESTATUS[0]}", 0, 0),
        ("fssdeploy doctor > /dev/full", 4, 1),
        ("fssdeploy doctor --json > /dev/full", 4, 1),
        ("fssdeploy --help > /dev/full", 4, 1),
        ("fssdeploy --version > /dev/full", 4, 1),
        ("fssdeploy segment --json > /dev/full", 3, 1),
        ("fssdeploy doctor >&-", 0, 0),
        ("fssdeploy segment 2>&-", 3, 0),
        ("fssdeploy segment 2> /dev/full", 3, 0),
        ("fssdeploy", 0, 0),
        ("fssdeploy nothing", 3, 1),
    ],
)
def test_outputs_that_are_closed_or_full(tmp_path: Path, line: str, code: int, errors: int) -> None:
    answer = shell(line, tmp_path)
    assert answer.returncode == code, answer.stderr
    assert len(answer.stderr.splitlines()) == errors, answer.stderr
    assert "Traceback" not in answer.stderr


def test_one_line_even_where_a_library_warns(workplace: Workplace, tmp_path: Path) -> None:
    from PIL import Image

    Image.open(workplace.first).save(tmp_path / "cut.tif", compression="tiff_lzw")
    (tmp_path / "cut.tif").write_bytes((tmp_path / "cut.tif").read_bytes()[:2000])
    answer = run(COMMAND, "segment", workplace.artifact, "--bank", workplace.bank, tmp_path / "cut.tif")
    assert answer.returncode == 3 and len(answer.stderr.splitlines()) == 1, answer.stderr


def test_a_stopped_export_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    """Interrupted and terminated it cleans up; killed it leaves a hidden folder, and the old artifact untouched."""
    processes = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        out = tmp_path / number.name / "new" / "artifact"
        command = [sys.executable, "-c", STUCK_EXPORT, "export", "fsdino", "--out", str(out)]
        processes[number] = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
    for number, process in processes.items():
        assert process.stdout and process.stdout.readline() == "stuck\n"
        (partial,) = (tmp_path / number.name / "new").iterdir()
        assert partial.name.startswith(".artifact.partial-")
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        if number == signal.SIGKILL:
            assert not (tmp_path / number.name / "new" / "artifact").exists()
            continue
        assert process.returncode == 128 + number
        assert len(errors.splitlines()) == 1 and "Traceback" not in errors
        assert list(tmp_path.glob(f"{number.name}/*")) == []


def test_an_unforeseen_failure_is_one_line_unless_asked(tmp_path: Path) -> None:
    script = "import fssdeploy.doctor as d; d.diagnose = lambda: 1 / 0; from fssdeploy.cli.main import main; main()"
    command = [sys.executable, "-c", script, "doctor"]
    answer = run(*command, cwd=tmp_path)
    assert answer.returncode == 1 and "error[internal]" in answer.stderr and len(answer.stderr.splitlines()) == 1
    answer = run(*command, cwd=tmp_path, env={**os.environ, "FSSDEPLOY_TRACEBACK": "1"})
    assert answer.returncode == 1 and "ZeroDivisionError" in answer.stderr


def test_a_read_only_place(workplace: Workplace, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    mount = ["mount", "--bind", str(place), str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
        pair = ["--image", workplace.first, "--mask", workplace.mask]
        for command in (
            ["segment", workplace.artifact, "--bank", workplace.bank, workplace.second, "-o", place],
            ["segment", workplace.artifact, "--bank", workplace.bank, workplace.second, "-o", place / "new" / "out"],
            ["enroll", workplace.artifact, "thing", *pair, "--bank", place / "new" / "bank"],
        ):
            answer = run(COMMAND, *command)
            assert answer.returncode == 4 and "error[read_only]" in answer.stderr, answer.stderr
            assert len(answer.stderr.splitlines()) == 1
    finally:
        subprocess.run(["umount", str(place)], check=True)
