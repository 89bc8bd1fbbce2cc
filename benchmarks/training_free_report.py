"""The training-free benchmark's result as tables, with the targets beside, and as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fssdeploy.benchmarks.training_free import BASELINE, BOOSTED, SECTIONS
from fssdeploy.files import storage_error, write_atomic
from fssdeploy.report import Report, Table

# What is asked for on a CPU with DINOv2 ViT-B and SAM ViT-B.
OUTSIDE_TARGET, ENCODERS_TARGET, ADDED_TARGET, MEMORY_TARGET = 5.0, 0.8, 0.1, 0.05


def report(result: dict[str, Any]) -> Report:
    """Tables of the query and of each scene of blobs, stage by stage, and of the targets."""
    query, machine = result["query"], result["machine"]
    tables = [_sections(f"query, {query['points']} points ({query['points_with_gsm']} with gsm), p50 ms", query)]
    for blobs in result["blobs"].values():
        tables.append(_sections(f"blobs, {blobs['points']} points, without encoders and decoder, p50 ms", blobs))
    busy = [row["others_share"] for row in query["contestants"].values() if row["others_share"] is not None]
    facts = {
        "preset": f"gfsam {result['preset']}, {result['image_sizes']['matching']} px and"
        f" {result['image_sizes']['sam']} px, compat {result['compat']}",
        "weights": result["weights"],
        "machine": f"{machine['cpu']}, {machine['cores']} cores",
        "rounds": result["rounds"],
        "share of the cores that others used": f"{max(busy):.0%} at most" if busy else None,
        "masks": "those of the baseline, in every round",
    }
    notes = ["Targets are for base; +gsm reuses what the encoders found."]
    if result["weights"] != "trained":
        notes.append(
            "UNTRAINED weights: times are real, masks mean nothing, and the number of points is no typical one."
        )
    return Report("training-free", facts, [*tables, _targets(result)], notes, result)


def save(result: dict[str, Any], path: Path) -> None:
    """Write the result as JSON. MachineError if it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, path) from error
    write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())


def _sections(title: str, measured: dict[str, Any]) -> Table:
    """One row a section, one column a contestant, and how many times as fast as the baseline each engine is."""
    contestants = measured["contestants"]
    engines = [name for name in contestants if name != BASELINE and not name.endswith(BOOSTED)]
    table = Table(title, ["stage", *contestants, *(f"{BASELINE} / {name}" for name in engines)], [])

    def row(name: str, times: dict[str, dict[str, float] | None]) -> None:
        cells = ["-" if time is None else f"{time['p50_ms']:.1f}" for time in times.values()]
        slow = times[BASELINE]
        pairs = [(slow, times[engine]) for engine in engines]
        gains = ["-" if a is None or b is None else f"{a['p50_ms'] / b['p50_ms']:.2f}x" for a, b in pairs]
        table.rows.append([name, *cells, *gains])

    for section in SECTIONS:
        times = {name: contestant["sections"].get(section) for name, contestant in contestants.items()}
        if any(times.values()):
            row(section, times)
    totals = {"outside the encoders": "outside", "total": "total"}
    if not contestants[BASELINE]["encoders"]["p50_ms"]:
        totals = {"total": "total"}
    for name, key in totals.items():
        row(name, {contestant: figures[key] for contestant, figures in contestants.items()})
    return table


def _targets(result: dict[str, Any]) -> Table:
    table = Table("targets", ["what", "engine", "wanted", "measured", "holds"], [])
    for engine, got in result["query"]["targets"].items():
        faster = got["outside_encoders"]
        table.rows += [
            _target(
                "outside the encoders", engine, f">= {OUTSIDE_TARGET:.0f}x", f"{faster:.2f}x", faster >= OUTSIDE_TARGET
            ),
            ["outside encoders and decoder", engine, "-", f"{got['outside_encoders_and_decoder']:.2f}x", "-"],
            _target(
                "encoders' share of an enrolled query",
                engine,
                f">= {ENCODERS_TARGET:.0%}",
                f"{got['encoders_share']:.0%}",
                got["encoders_share"] >= ENCODERS_TARGET,
            ),
            _target(
                "time that gsm adds",
                engine,
                f"<= {ADDED_TARGET:.0%}",
                f"{got['gsm_added']:.1%}",
                got["gsm_added"] <= ADDED_TARGET,
            ),
        ]
    for blobs in result["blobs"].values():
        for engine, got in blobs["targets"].items():
            faster = got["outside_encoders"]
            what = f"blobs, {blobs['points']} points"
            table.rows.append(
                _target(what, engine, f">= {OUTSIDE_TARGET:.0f}x", f"{faster:.2f}x", faster >= OUTSIDE_TARGET)
            )
    if peaks := result["peak_mib"]:
        more = peaks["host+gsm"] / peaks["host"] - 1
        measured = f"{more:+.1%} ({peaks['host']:.0f} to {peaks['host+gsm']:.0f} MiB)"
        table.rows.append(
            _target("peak memory that gsm adds", "torch", f"<= {MEMORY_TARGET:.0%}", measured, more <= MEMORY_TARGET)
        )
    return table


def _target(what: str, engine: str, wanted: str, measured: str, holds: bool) -> list[Any]:
    return [what, engine, wanted, measured, holds]
