"""Priority over other programs, and what the processors did."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from kvstream.testbed.host.clock import REAL_TIME, CpuMeter, Urgency

ASK = """
import os, threading
from kvstream.testbed.host.clock import Urgency, be_punctual, go_before_others
computing = go_before_others(Urgency.COMPUTE)
inherited = []
thread = threading.Thread(target=lambda: inherited.append(os.sched_getscheduler(0)))
thread.start()
thread.join()
print(computing, inherited[0], be_punctual(Urgency.NETWORK), os.sched_getparam(0).sched_priority, sep="|")
"""


def test_a_run_goes_before_others_where_that_is_granted() -> None:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    computing, inherited, network, priority = done.stdout.strip().split("|")
    if computing == "None":
        assert int(inherited) == os.SCHED_OTHER
        assert not network.startswith(REAL_TIME)
        assert int(priority) == 0
    else:
        assert computing == f"{REAL_TIME} {Urgency.COMPUTE:d}"
        assert int(inherited) == os.SCHED_RR
        assert network == f"{REAL_TIME} {Urgency.NETWORK:d}"
        assert int(priority) == Urgency.NETWORK


def test_the_link_waits_for_none_and_computing_for_the_network() -> None:
    assert Urgency.COMPUTE < Urgency.NETWORK < Urgency.LINK


def test_a_busy_process_is_seen_and_what_other_machines_took_is_part_of_what_was_foreign() -> None:
    meter = CpuMeter()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            time.sleep(1.0)
            idle, own, foreign, waited, stolen = meter.read()
        finally:
            busy.kill()
    assert own > 0.1
    assert min(idle, foreign, waited, stolen) >= 0.0
    assert idle + own + foreign == pytest.approx(meter.cores, rel=0.5)
