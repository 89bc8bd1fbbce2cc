"""NVIDIA's load generator, `perf_analyzer`: what it is given to send, one run of it, and its figures."""

from __future__ import annotations

import base64
import csv
import io
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fssdeploy.errors import MachineError
from fssdeploy.serving.repository import pack_strings

RUN_SECONDS = 1800.0
LONGEST_REASON = 300

# The file's columns by our names; its times are microseconds.
COLUMNS = {
    "p50_ms": "p50 latency",
    "p90_ms": "p90 latency",
    "p95_ms": "p95 latency",
    "p99_ms": "p99 latency",
    "queue_ms": "Server Queue",
    "compute_ms": "Server Compute Infer",
}
# What the time of a request is made of, as its sender sees it: averages, in microseconds.
PARTS = (
    "Client Send",
    "Network+Server Send/Recv",
    "Server Queue",
    "Server Compute Input",
    "Server Compute Infer",
    "Server Compute Output",
    "Client Recv",
)


@dataclass(frozen=True)
class Load:
    """What one run found.

    `concurrency` requests were always under way, so `per_second` is their number over the mean time of one (the tool's
    own figure divides by a time rounded up to whole seconds). The percentiles are of the time that a request took as
    its sender saw it; `queue_ms` and `compute_ms` are the server's averages, summed over the members of an ensemble.
    """

    concurrency: int
    per_second: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    queue_ms: float
    compute_ms: float


def request_file(inputs: Mapping[str, Sequence[bytes]]) -> str:
    """The content of a file for `--input-data` that holds one request, of text inputs: elements by the input's name."""
    entry = {
        name: {"b64": base64.b64encode(pack_strings(elements)).decode(), "shape": [len(elements)]}
        for name, elements in inputs.items()
    }
    return json.dumps({"data": [entry]})


def parse_report(text: str) -> list[Load]:
    """The runs in a report that the tool wrote with `-f`, by concurrency. MachineError when it is none."""
    try:
        rows = [
            Load(
                int(row["Concurrency"]),
                int(row["Concurrency"]) * 1e6 / sum(float(row[part]) for part in PARTS),
                **{name: float(row[column]) / 1e3 for name, column in COLUMNS.items()},
            )
            for row in csv.DictReader(io.StringIO(text))
        ]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _failed(f"its report cannot be read: {type(error).__name__}: {error}") from error
    if not rows:
        raise _failed("its report holds no run")
    return sorted(rows, key=lambda row: row.concurrency)


def generate(
    binary: Path, url: str, model: str, inputs: Mapping[str, Sequence[bytes]], concurrency: int, requests: int
) -> Load:
    """Send `requests` requests to a model over gRPC at `url`, host:port, with `concurrency` of them under way.

    Raises MachineError ``load_generator``, also when the server refused one of the requests.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, report = Path(folder, "request.json"), Path(folder, "report.csv")
        data.write_text(request_file(inputs), "utf-8")
        command = [str(binary), "-m", model, "-u", url, "-i", "grpc", "--input-data", str(data)]
        # A number of requests, not a time until figures settle: on a busy machine they never do.
        command += ["--concurrency-range", str(concurrency), "--request-count", str(requests), "-f", str(report)]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=RUN_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _failed(f"{type(error).__name__}: {error}") from error
        if done.returncode or not report.exists():
            raise _failed(_reason(done.stdout + done.stderr) or f"it ended with code {done.returncode}")
        return parse_report(report.read_text("utf-8"))[0]


def _reason(output: str) -> str:
    """Its words for what went wrong: the lines with a failure in them, else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    failures = [line for line in lines if "rror" in line or "ailed" in line]
    return " ".join(failures or lines[-1:])[:LONGEST_REASON]


def _failed(why: str) -> MachineError:
    return MachineError("load_generator", "perf_analyzer measured nothing", why, "Look into the server's log.")
