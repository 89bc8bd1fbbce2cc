"""`fssdeploy serve` hears every signal, whatever it is doing at that moment."""

from __future__ import annotations

import random
import select
import signal
import subprocess
import sys
import time

STOPS = 400
# Looks at the event without pause, so that signals arrive while its lock is held, too.
CHILD = f"""
from fssdeploy.cli.serve import _stop_signals
for _ in range({STOPS}):
    with _stop_signals() as stopping:
        print("waiting", flush=True)
        while not stopping.wait(0.00001):
            pass
"""


def test_no_signal_is_lost() -> None:
    rng = random.Random(0)
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True, bufsize=1)
    assert process.stdout
    try:
        for number in range(STOPS):
            readable, _, _ = select.select([process.stdout], [], [], 60)
            assert readable, f"it hung after {number} signals"
            assert process.stdout.readline() == "waiting\n"
            time.sleep(rng.random() * 0.0005)
            process.send_signal((signal.SIGINT, signal.SIGTERM)[number % 2])
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
