"""The latency benchmark measures what it says, and its report shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fssdeploy.benchmarks.baselines.fsdino_research import extra_flops
from fssdeploy.benchmarks.latency import Sample, _figures, measure, report, save
from fssdeploy.errors import InputError
from fssdeploy.systems.fsdino import PRESETS


def test_research_against_enrolled_on_a_real_artifact(tiny_artifact: Path, tmp_path: Path) -> None:
    result = measure(tiny_artifact, variants=("torch-recompute", "torch", "onnxruntime"), shots=(1, 4), rounds=2)
    assert result["skipped"] == {}
    rows = {(row["variant"], row["case"], row["shots"]): row for row in result["rows"]}
    assert {key[1] for key in rows if key[0] == "onnxruntime"} == {
        "query",
        "stage:encoder",
        "stage:enroll",
        "stage:segment",
    }
    assert all(row["samples"] == 2 and 0 < row["best_ms"] <= row["p50_ms"] <= row["p95_ms"] for row in rows.values())
    # FLOPs: the enrolled query is flat in k, the research form grows by an encoder for every shot.
    flat = {row["gflop"] for key, row in rows.items() if key[1] == "query" and key[0] != "torch-recompute"}
    assert len(flat) == 1
    encoder = result["gflop"]["stages"]["encoder"]
    recomputed = [rows["torch-recompute", "query", count]["gflop"] for count in (1, 4)]
    assert recomputed[1] - recomputed[0] >= 3 * encoder
    assert result["fp32_peak_gflops"] > 1
    assert result["startup"]["onnxruntime"]["torch"] is False  # the deployed path never imports torch
    assert 10 < result["peak_mib"]["onnxruntime"] < result["peak_mib"]["torch"]

    written = save(result, tmp_path / "results" / "latency.json")
    assert json.loads(written[0].read_text())["rows"] == result["rows"]
    assert written[1].stat().st_size > 5_000
    text = report(result).text(width=200)
    assert "UNTRAINED" in text
    assert "vs research" in text


def test_quiet_samples_are_preferred() -> None:
    samples = [Sample(2.0, 1.0, 0.5), Sample(1.0, 1.0, 0.0), Sample(1.1, 1.0, 0.01)]
    figures = _figures(samples, gflop=10.0, peak=20.0)
    assert figures["quiet"] == 2
    assert figures["p50_ms"] == pytest.approx(1050)
    assert figures["share_of_peak"] == pytest.approx(10 / 1.05 / 20)
    assert _figures(samples[:1], 10.0, 20.0)["p50_ms"] == 2000  # nothing quiet: all count, and the row says so


def test_unfolded_flops_of_the_base_preset() -> None:
    # Unfolded minus folded, by hand: k (2 N^2 C + 2 N^2 512) - 2 N 512 C with N = 1369, C = 768.
    assert extra_flops(PRESETS["base"], 1) / 1e9 == pytest.approx(3.72, abs=0.01)


def test_bad_arguments(tiny_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no variant 'tensorflow'"):
        measure(tiny_artifact, variants=("tensorflow",))
    with pytest.raises(InputError, match="0 rounds"):
        measure(tiny_artifact, rounds=0)
    with pytest.raises(InputError, match="not an artifact"):
        measure(tmp_path)
