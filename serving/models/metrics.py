"""What the enrolled path adds to the server's Prometheus metrics."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fssdeploy.deployment import Counters

# name: (kind, help)
FAMILIES = {
    "fssdeploy_stage_seconds_total": ("COUNTER", "Seconds spent in a stage"),
    "fssdeploy_stage_count_total": ("COUNTER", "Runs of a stage"),
    "fssdeploy_bank_cache_hits_total": ("COUNTER", "Class states found in memory"),
    "fssdeploy_bank_cache_misses_total": ("COUNTER", "Class states read from the bank"),
    "fssdeploy_bank_cache_bytes": ("GAUGE", "Bytes of class states in memory"),
}


class Metrics:
    """The metrics of one instance of a model.

    Every instance is a process of its own, and the server gives equal series of several processes one counter that the
    first process to leave takes away from the others. So each has labels that nobody else has: `instance`, `process`.
    Add the series of a system up to see it whole.
    """

    def __init__(self, system: str, instance: str) -> None:
        import triton_python_backend_utils as pb_utils

        self._families = {
            name: pb_utils.MetricFamily(name=name, description=text, kind=getattr(pb_utils.MetricFamily, kind))
            for name, (kind, text) in FAMILIES.items()
        }
        self._labels = {"system": system, "instance": instance, "process": str(os.getpid())}
        self._series: dict[tuple[str, str], Any] = {}
        self._shown: dict[tuple[str, str], float] = {}

    def publish(self, seconds: Mapping[str, float], counts: Mapping[str, int], cache: Counters) -> None:
        """Bring the series to these totals; only those that changed cost a message to the server."""
        for stage, value in seconds.items():
            self._show("fssdeploy_stage_seconds_total", value, stage)
        for stage, count in counts.items():
            self._show("fssdeploy_stage_count_total", count, stage)
        self._show("fssdeploy_bank_cache_hits_total", cache.hits)
        self._show("fssdeploy_bank_cache_misses_total", cache.misses)
        self._show("fssdeploy_bank_cache_bytes", cache.bytes)

    def close(self) -> None:
        """Remove the series from the server, which it does when the last name for them goes."""
        self._series.clear()
        self._families.clear()

    def _show(self, family: str, value: float, stage: str = "") -> None:
        key = family, stage
        if key not in self._series:
            labels = {**self._labels, "stage": stage} if stage else self._labels
            self._series[key] = self._families[family].Metric(labels=labels)
            self._shown[key] = 0.0
        if value != self._shown[key]:
            if FAMILIES[family][0] == "COUNTER":
                self._series[key].increment(value - self._shown[key])
            else:
                self._series[key].set(value)
            self._shown[key] = value
