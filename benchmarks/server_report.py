"""What the figures of `fssdeploy.benchmarks.server` say: against the project's limits, for a latency, as tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fssdeploy.files import made_folder, write_atomic
from fssdeploy.report import Report, Table

LOCAL, ENROLLED, ENSEMBLE = "in-process", "enrolled", "ensemble"
FIRST = 10  # requests after readiness that are looked at by themselves
# What this project wants of its server: the words of a comparison, and whether its value meets them.
LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "enrolled over in-process, 1 request at a time": (
        "at most 10 % or 3 ms",
        lambda value, base: value <= max(1.1 * base, base + 3),
    ),
    "ensemble over enrolled, 1 shot": ("at least 2x", lambda value, base: value >= 2 * base),
    "ensemble over enrolled, 5 shots": ("at least 5x", lambda value, base: value >= 5 * base),
    "requests per s at saturation, enrolled over in-process": (
        "at least 95 %",
        lambda value, base: value >= 0.95 * base,
    ),
    f"p99 of the first {FIRST} requests over p50": ("at most 2x", lambda value, base: value <= 2 * base),
}


def choose(rows: Sequence[dict[str, Any]], target_ms: float) -> dict[str, Any]:
    """The configuration of the enrolled path with most requests per second among those that keep a latency.

    A configuration is a number of instances and one of requests under way; the 99th percentile of every size and every
    number of shots measured with it has to keep the target. Where none does, `met` is false and the fastest is named.
    """
    found = []
    served = [row for row in rows if row["path"] == ENROLLED]
    for instances, concurrency in sorted({(row["instances"], row["concurrency"]) for row in served}):
        group = [row for row in served if (row["instances"], row["concurrency"]) == (instances, concurrency)]
        found.append(
            {
                "instances": instances,
                "concurrency": concurrency,
                "p99_ms": max(row["p99_ms"] for row in group),
                "per_second": min(row["per_second"] for row in group),
            }
        )
    keeping = [each for each in found if each["p99_ms"] <= target_ms]
    if keeping:
        chosen = max(keeping, key=lambda each: (each["per_second"], -each["instances"], -each["concurrency"]))
    else:
        chosen = min(found, key=lambda each: each["p99_ms"])
    options = f"--instances {chosen['instances']}"
    return {"target_ms": target_ms, "met": bool(keeping), **chosen, "options": options, "among": found}


def compare(rows: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures that this project has limits for, as far as they were measured, and whether those hold."""
    found: list[dict[str, Any]] = []

    def add(name: str, where: str, value: float, base: float) -> None:
        limit, holds = LIMITS[name]
        measured = {"value": value, "base": base, "ratio": value / base, "limit": limit, "holds": holds(value, base)}
        found.append({"comparison": name, "where": where, **measured})

    def one(size: str, path: str, instances: int, shots: int) -> float | None:
        wanted = {"size": size, "path": path, "instances": instances, "shots": shots, "concurrency": 1}
        return next((row["p50_ms"] for row in rows if wanted.items() <= row.items()), None)

    overhead, _, _, saturation, warm = LIMITS
    for size in sorted({row["size"] for row in rows}):
        alone = one(size, LOCAL, 1, min(row["shots"] for row in rows))
        for shots in sorted({row["shots"] for row in rows}):
            enrolled, ensemble = one(size, ENROLLED, 1, shots), one(size, ENSEMBLE, 1, shots)
            where = f"{size}, {shots} shots"
            if alone and enrolled:
                add(overhead, where, enrolled, alone)
            name = f"ensemble over enrolled, {shots} shot{'s' if shots > 1 else ''}"
            if name in LIMITS and ensemble and enrolled:
                add(name, where, ensemble, enrolled)
        best: dict[str, float] = {
            path: max((row["per_second"] for row in rows if (row["path"], row["size"]) == (path, size)), default=0.0)
            for path in (ENROLLED, LOCAL)
        }
        if best[ENROLLED] and best[LOCAL]:
            add(saturation, size, best[ENROLLED], best[LOCAL])
    for start in first:
        add(warm, f"{start['instances']} instances", start["p99_ms"], start["p50_ms"])
    return found


def report(result: dict[str, Any]) -> Report:
    """The result as tables: loads, comparisons, the configurations for a target."""
    loads = Table(
        "requests (an encoded picture in, its mask out)",
        ["path", "size", "shots", "instances", "at once", "per s", "p50 ms", "p95 ms", "p99 ms", "queue ms", "quiet"],
        [],
    )
    for row in result["rows"]:
        where = [row["path"], row["size"], row["shots"], row["instances"], row["concurrency"]]
        times = [f"{row[name]:.1f}" for name in ("p50_ms", "p95_ms", "p99_ms", "queue_ms")]
        loads.rows.append([*where, f"{row['per_second']:.2f}", *times, f"{row['quiet']}/{row['turns']}"])
    limits = Table(
        "against the project's limits", ["comparison", "where", "value", "of", "ratio", "limit", "holds"], []
    )
    for each in result["comparisons"]:
        values = [f"{each['value']:.2f}", f"{each['base']:.2f}", f"{each['ratio']:.2f}", each["limit"], each["holds"]]
        limits.rows.append([each["comparison"], each["where"], *values])
    tables = [loads, limits]
    plan, machine = result["plan"], result["machine"]
    facts = {
        "artifact": f"{result['artifact']}, {result['precision']}",
        "weights": result["weights"],
        "machine": f"{machine['cpu']}, {machine['cores']} cores",
        "server": f"nvidia-pytriton {result['server']['nvidia-pytriton']}, backend {plan['backend']}",
        "measured": f"{plan['rounds']} turns of {plan['requests']} requests for every line",
        "answers": _same(result["differences"]),
    }
    notes = [f"skipped: {why}" for why in result["skipped"].values()]
    if "choice" in result:
        choice = result["choice"]
        columns = ["instances", "concurrency", "p99_ms", "per_second"]
        rows = [[f"{each[name]:.4g}" for name in columns] for each in choice["among"]]
        tables.append(Table(f"enrolled path, worst case of each, target {choice['target_ms']:g} ms", columns, rows))
        words = f"for up to {choice['concurrency']} requests at once: fssdeploy repo ... {choice['options']}"
        notes.append(f"Chosen, {words}" if choice["met"] else f"NOTHING KEEPS THE TARGET; nearest, {words}")
    if result["weights"] != "trained":
        notes.append("UNTRAINED weights: times are real, masks mean nothing.")
    return Report("server", facts, tables, notes, result)


def _same(differences: Sequence[dict[str, Any]]) -> str:
    """How the server's answers compare with the local ones."""
    pixels = max(each["pixels"] for each in differences)
    masks = f"masks DIFFER from in-process in up to {pixels} pixels" if pixels else "masks equal in-process to the bit"
    return f"{masks}, scores within {max(each['score'] for each in differences):.1g}"


def save(result: dict[str, Any], path: Path) -> None:
    """Write the result as JSON. MachineError if it cannot."""
    with made_folder(path.parent):
        write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())
