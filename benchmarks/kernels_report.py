"""What the figures of the kernel benchmark mean: shares of the ceilings, targets, dispatcher's table, report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from fssdeploy.kernels.dispatch import Measurement
from fssdeploy.report import Report, Table

LARGE = 4096
AFFINITY_SHARE = 0.60
FLASH_RATIO = 1.6
EAGER_GAIN = 3.0
HALVES = ("float16", "bfloat16")
FLASH = "SDPA, uncalibrated, flash"

Row = dict[str, Any]


def enrich(result: dict[str, Any]) -> dict[str, Any]:
    """The result with rates and shares of the ceilings for every timing, and the targets."""
    ceilings = result["ceilings"]
    for row in result["rows"]:
        for timing in row.get("timings", {}).values():
            seconds = timing["median_us"] * 1e-6
            timing["tflops"] = row["flops"] / seconds / 1e12
            timing["gbs"] = row["bytes"] / seconds / 1e9
            if "matrix_tflops" in ceilings:
                timing["of_matrix"] = timing["tflops"] / ceilings["matrix_tflops"][row["dtype"]]
                timing["of_copy"] = timing["gbs"] / ceilings["copy_gbs"]
        if row.get("timings"):
            row["best_form"] = best_form(row)
            row["best_rival"] = best_rival(row)
    return result | {"targets": targets(result["rows"])}


def best_form(row: Row) -> str | None:
    """The fastest form of our operation, or None if none was timed."""
    return _fastest(row, row["dispatched"])


def best_rival(row: Row) -> str | None:
    """The fastest formulation with the same result in the same dtype without our kernels, or None."""
    return _fastest(row, row["counted"])


def _fastest(row: Row, names: Iterable[str]) -> str | None:
    timed = [name for name in names if name in row["timings"]]
    return min(timed, key=lambda name: float(row["timings"][name]["median_us"])) if timed else None


def targets(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Each target at each case that it speaks of: what was reached, and `met`; None where it was not measured."""
    found = []
    for row in rows:
        large = LARGE in (row["sizes"].get("query"), row["sizes"].get("queries"))
        if not large or row["dtype"] not in HALVES or row["training"]:
            continue
        timings = row.get("timings", {})
        ours = best_form(row) if timings else None
        if row["operation"] in ("masked_max", "mutual_argmax"):
            share = timings[ours].get("of_matrix") if ours else None
            found.append(_target("share of the matrix ceiling", row, share, AFFINITY_SHARE, at_least=True))
        if row["operation"] == "calibrated_attention":
            flash, eager = timings.get(FLASH), timings.get(f"eager {row['dtype']}")
            mine = timings[ours]["median_us"] if ours else None
            ratio = mine / flash["median_us"] if mine and flash else None
            gain = eager["median_us"] / mine if mine and eager else None
            found.append(_target("time over plain flash SDPA", row, ratio, FLASH_RATIO, at_least=False))
            found.append(_target("times faster than eager", row, gain, EAGER_GAIN, at_least=True))
    return found


def _target(name: str, row: Row, reached: float | None, bound: float, *, at_least: bool) -> dict[str, Any]:
    met = None if reached is None else reached >= bound if at_least else reached <= bound
    wanted = f"{'at least' if at_least else 'at most'} {bound:g}"
    return {"target": name, "case": row["case"], "wanted": wanted, "reached": reached, "met": met}


def table(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What the dispatcher's table holds for this device, by operation.

    Only of operations whose checks in that dtype all passed. A backward pass is what training takes beyond the forward
    pass of the same form.
    """
    wrong = {(row["operation"], row["dtype"]) for row in result["checks"] if not row["passed"]}
    proved = {(row["operation"], row["dtype"]) for row in result["checks"]} - wrong
    timed = [row for row in result["rows"] if row.get("timings") and row["has_kernel"]]
    timed = [row for row in timed if best_rival(row) and (row["operation"], row["dtype"]) in proved]
    forward = {row["case"]: row for row in timed if not row["training"]}
    measured: dict[str, dict[tuple[Any, ...], Measurement]] = {}
    for row in timed:
        base = forward.get(row["case"].removesuffix(" training")) if row["training"] else None
        if row["training"] and base is None:
            continue
        for form, asked in row["dispatched"].items():
            if form not in row["timings"]:
                continue
            before = {entry["operation"] for entry in base["dispatched"].get(form, ())} if base else set()
            new = [entry for entry in asked if entry["operation"] not in before]
            ours, rival = _beyond(row, base, form), _beyond(row, base, None)
            if len(new) != 1 or new[0]["took"] != "triton" or ours is None or rival is None:
                continue  # no kernel of its own in this pass
            entry = new[0]
            measurement = Measurement(entry["dtype"], entry["sizes"], round(rival, 2), round(ours, 2))
            known = measured.setdefault(entry["operation"], {})
            place = (entry["dtype"], *sorted(entry["sizes"].items()))
            if place not in known or measurement.triton_us < known[place].triton_us:
                known[place] = measurement
    return {operation: [asdict(each) for each in known.values()] for operation, known in sorted(measured.items())}


def _beyond(row: Row, base: Row | None, form: str | None) -> float | None:
    """Microseconds of `form`, or of the best rival, in `row` beyond what it takes in `base`; None if unknown."""

    def micros(of: Row) -> float:
        name = form or best_rival(of)
        return float(of["timings"][name]["median_us"]) if name in of["timings"] else math.nan

    spent = micros(row) - (micros(base) if base else 0.0)
    return spent if spent > 0 else None


def report(result: dict[str, Any]) -> Report:
    """The result as tables: checks, times, targets."""
    ceilings = result["ceilings"]
    facts: dict[str, Any] = {
        "GPU": result["gpu"]["name"],
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        "time": f"{result['seconds']:.0f} s",
    }
    if "matrix_tflops" in ceilings:
        rates = (f"{dtype} {rate:.0f} TFLOP/s" for dtype, rate in ceilings["matrix_tflops"].items())
        facts["matrix ceiling"] = ", ".join(rates)
        facts["copy ceiling"] = f"{ceilings['copy_gbs']:.0f} GB/s, read and written"
    tables = [_checks(result["checks"]), _times(result["rows"]), _targets(result["targets"])]
    notes = [f"FAILED CHECK {row['case']}: {_why(row)}" for row in result["checks"] if not row["passed"]]
    for row in result["rows"]:
        if "error" in row:
            notes.append(f"not timed: {row['case']}: {row['error']}")
        notes += [f"not timed: {row['case']}: {name}: {why}" for name, why in row.get("failed", {}).items()]
    if "error" in ceilings:
        notes.append(f"no ceilings: {ceilings['error']}")
    if result["unfinished"]:
        jobs = ", ".join(f"{job['do']} {job['case']}" for job in result["unfinished"][:3])
        notes.append(f"no time was left for {len(result['unfinished'])} jobs, the first: {jobs}")
    return Report("kernels", facts, tables, notes, result)


def _checks(checks: Iterable[Row]) -> Table:
    """By operation and dtype: how many passed, and the largest errors of outputs and gradients."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in checks:
        groups.setdefault((row["operation"], row["dtype"]), []).append(row)
    shown = Table(
        "checks against float64 (||error|| / ||exact||, the worst case)",
        ["operation", "dtype", "passed", "output", "gradient"],
        [],
    )
    for (operation, dtype), rows in groups.items():
        errors = [item for row in rows for form in row.get("forms", {}).values() for item in form["errors"].items()]
        worst = [
            max((row["relative"] for name, row in errors if name.startswith(kind)), default=None)
            for kind in ("output", "gradient")
        ]
        passed = f"{sum(row['passed'] for row in rows)} of {len(rows)}"
        shown.rows.append([operation, dtype, passed, *worst])
    return shown


def _why(row: Row) -> str:
    if "error" in row:
        return str(row["error"])
    reasons = []
    for form, found in row["forms"].items():
        reasons += [
            f"{form}: {name} {each['relative']:.1e}, largest {each['largest']:.1e}"
            for name, each in found["errors"].items()
            if not each["passed"]
        ]
        reasons += [
            f"{form}: {what}"
            for what, wrong in (
                ("two runs differ", not found["repeatable"]),
                (f"a better choice by {found['regret']:.1e}", not found["chosen_well"]),
                (f"the reference ran: {found['hindered']}", found["hindered"]),
            )
            if wrong
        ]
    return "; ".join(reasons)


def _times(rows: Iterable[Row]) -> Table:
    columns = ["case", "formulation", "us", "quartiles", "TFLOP/s", "GB/s", "matrix", "copy", "MiB", "best rival / it"]
    shown = Table("times of one call, and shares of the ceilings", columns, [])
    for row in rows:
        timings = row.get("timings", {})
        rival = timings.get(row.get("best_rival"))
        label = _short(row)
        for name, timing in timings.items():
            share = [f"{timing[key]:.0%}" if key in timing else None for key in ("of_matrix", "of_copy")]
            gain = f"{rival['median_us'] / timing['median_us']:.2f}" if rival else None
            micros = [f"{timing[key]:.1f}" for key in ("median_us", "low_us", "high_us")]
            rates = [f"{timing['tflops']:.1f}", f"{timing['gbs']:.0f}"]
            peak = f"{timing['peak_mib']:.0f}" if timing["peak_mib"] is not None else None
            formulation = name if timing["graph"] else f"{name} (no graph)"
            shown.rows.append([label, formulation, micros[0], f"{micros[1]}-{micros[2]}", *rates, *share, peak, gain])
            label = ""
    return shown


def _short(row: Row) -> str:
    """The case in one cell: sizes in their order, without their names."""
    sizes = "x".join(map(str, row["sizes"].values()))
    words = (row["operation"], sizes, row["variant"], row["dtype"], "training" if row["training"] else "")
    return " ".join(filter(None, words))


def _targets(found: Iterable[Row]) -> Table:
    columns = ["target", "case", "wanted", "reached", "met"]
    words = {True: "met", False: "MISSED", None: "not measured"}
    rows = [[row["target"], row["case"], row["wanted"], row["reached"], words[row["met"]]] for row in found]
    return Table("targets", columns, rows)
