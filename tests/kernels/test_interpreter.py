"""The Triton kernels in Triton's interpreter: every interpreter_*.py of this folder, in one process of its own.

Triton reads TRITON_INTERPRET when a kernel is defined, so it must be set before anything imports the kernels.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SUITES = sorted(FOLDER.glob("interpreter_*.py"))


def run_suites(report: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """The finished pytest process and {test: "passed" | "failure" | "error" | "skipped"}."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FSSDEPLOY_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)  # the outer run's -n, -k or -x is not meant for this one
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={report}", *options)
    command = [sys.executable, "-m", "pytest", *options, *map(str, SUITES)]
    process = subprocess.run(
        command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True, check=False
    )
    if not report.exists():
        return process, {}
    cases = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in {"failure", "error", "skipped"}]
        cases[f"{case.get('classname')}::{case.get('name')}"] = kinds[0] if kinds else "passed"
    return process, cases


def assert_all_passed(process: subprocess.CompletedProcess[str], cases: dict[str, str]) -> None:
    outcome = {name: kind for name, kind in cases.items() if kind != "passed"}
    tail = process.stdout[-6000:] + process.stderr[-2000:]
    assert not outcome, f"{len(outcome)} of {len(cases)} not passed: {outcome}\n{tail}"
    assert process.returncode == 0, tail
    for suite in SUITES:
        assert any(f"{suite.stem}::" in name for name in cases), f"{suite.name} ran no test\n{tail}"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    assert_all_passed(*run_suites(tmp_path / "report.xml"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_at_real_sizes_in_the_interpreter(tmp_path: Path) -> None:
    process, cases = run_suites(tmp_path / "report.xml", "-m", "slow")
    assert cases, process.stdout[-6000:]
    assert {kind for kind in cases.values()} == {"passed"}, process.stdout[-6000:]
