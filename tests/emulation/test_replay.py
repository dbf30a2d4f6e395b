"""The link does what its trace says, and its record says when it did not."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def test_half_the_trace_takes_twice_as_long(scenario):
    seconds = {
        rate: statistics.median(scenario("transfer", rate_mbps=rate, size_bytes=2_500_000) for _ in range(3))
        for rate in (40, 20)
    }
    assert seconds[40] == pytest.approx(2_500_000 * 8 / (40e6 * 1448 / 1514), rel=0.05)
    assert seconds[20] / seconds[40] == pytest.approx(2.0, rel=0.05)


def test_steps_are_followed_and_recorded(steady):
    rows = [[0.2, 20], [0.2, 50], [0.2, 8], [0.2, 30]]
    done = steady("replay", rows=rows, length_s=0.8)
    verdict, record = done["verdict"], done["record"]
    assert done["faults"] == []
    assert verdict["windows"] >= 4
    assert verdict["median_error"] < 0.03
    assert verdict["total_error"] < 0.02
    assert [change[2] for change in record["changes"]] == [row[1] * 1e6 for row in rows]
    assert [change[0] for change in record["changes"]] == pytest.approx([0.0, 0.2, 0.4, 0.6])
    in_force = {row["capacity_bps"] for row in done["rows"]}
    assert in_force == {row[1] * 1e6 for row in rows}
    assert done["shaper"]["burst_s"] == pytest.approx(0.002)


def test_an_outage_holds_what_is_queued_and_ends_on_time(steady):
    done = steady("replay", rows=[[0.4, 20], [0.3, 0], [0.4, 20]], length_s=1.1)
    samples = done["record"]["samples"]
    leak = done["record"]["packet_bytes"]
    times_s, delivered_bytes = [sample[0] for sample in samples], [sample[2] for sample in samples]

    def delivered(begin_s: float, end_s: float) -> float:
        """Bytes between two moments; a sample may be a little late, so between samples."""
        begin, end = np.interp([begin_s, end_s], times_s, delivered_bytes)
        return float(end - begin)

    assert delivered(0.42, 0.69) <= 2 * leak
    held = [sample[3] for sample in samples if 0.42 < sample[0] < 0.69]
    assert min(held) > 0
    # from the first moments after it the link runs at its rate again
    late_s = [actual - scheduled for scheduled, actual, _ in done["record"]["changes"]]
    assert max(late_s) < 0.004, "opening the valve waits for nothing"
    assert delivered(0.71, 0.8) == pytest.approx(20e6 / 8 * 0.09, rel=0.1)
    assert done["verdict"]["total_error"] < 0.02


def test_the_queue_follows_the_rate_and_counts_its_drops(steady):
    done = steady("replay", rows=[[0.7, 40], [0.7, 10]], length_s=1.4, link="queue=50ms")
    queue = {rate: [row["queue_bytes"] for row in done["rows"] if row["capacity_bps"] == rate] for rate in (40e6, 10e6)}
    assert 0.7 * 250_000 < max(queue[40e6]) <= 250_000
    assert max(queue[10e6][-20:]) <= 62_500
    assert done["verdict"]["drops"] > 0


def test_a_fixed_queue_stays(steady):
    done = steady("replay", rows=[[0.5, 40], [0.5, 10]], length_s=1.0, link="queue_bytes=100000")
    assert 70_000 < max(row["queue_bytes"] for row in done["rows"] if row["capacity_bps"] == 10e6) <= 100_000


def test_a_second_session_starts_from_zero(steady):
    for done in steady("two_sessions"):
        assert done["faults"] == []
        assert done["verdict"]["total_error"] < 0.03


def test_rates_a_chunk_are_set_on_the_spot(steady):
    done = steady("per_chunk", rates_mbps=[10, 40, 20])
    assert [change[2] for change in done["changes"]] == [10e6, 40e6, 20e6]
    assert done["verdict"]["total_error"] < 0.02


def test_up_and_down_are_shaped_apart(steady):
    # Judged while data waited: each way carries the other's acknowledgements too, and losing them may empty a queue.
    for way in steady("uplink"):
        assert way["faults"] == []
        assert way["verdict"]["windows"] >= 5
        assert way["verdict"]["total_error"] < 0.03


def test_receivers_share_one_bottleneck(steady):
    done = steady("contention", receivers=2)
    assert min(done["shares_mbps"]) > 1.0
    assert sum(done["shares_mbps"]) == pytest.approx(40 * 1448 / 1514, rel=0.05)


def test_the_command_measures_what_receivers_get():
    words = "trace replay constant,rate=40Mbps --length 1s --measure --receivers 2 --json"
    command = [sys.executable, "-m", "kvstream.testbed.cli", *words.split()]
    for _ in range(4):
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
        found = json.loads(done.stdout)
        if found["verdict"]["starved"] <= 0.03:
            break
    assert len(found["shares_bps"]) == 2
    assert sum(found["shares_bps"]) == pytest.approx(40e6 * 1448 / 1514, rel=0.05)
    assert done.returncode == (0 if found["verdict"]["ok"] else 3)


def test_flows_of_others_take_their_share(steady):
    done = steady("beside_others", link="cross_flows=2")
    assert 4 < done["mbps"] < 28
    assert done["verdict"]["total_error"] < 0.02


def test_datagrams_of_others_leave_the_rest(steady, tmp_path):
    trace = tmp_path / "others.csv"
    trace.write_text("duration_s,rate_bps\n10,20000000\n")
    done = steady("beside_others", link="queue=50ms", trace_file=str(trace))
    assert done["mbps"] == pytest.approx(20 * 1448 / 1514, rel=0.1)


def test_pinned_ends_have_cores_of_their_own(scenario):
    done = scenario("beside_others", link="pin=on")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core only")
    sender, receiver = (set(cores) for cores in done["cores"])
    assert sender
    assert receiver
    assert not sender & receiver


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("delete", "the class is gone"),
        ("rate", "not the 20000000 that was set"),
        ("queue", "the queue is open with 3028 bytes, not the 125000 that were set"),
    ],
)
def test_tampering_with_the_link_is_caught(scenario, how, words):
    done = scenario("tampered", how=how)
    assert not done["verdict"]["ok"]
    assert any(words in reason for reason in done["verdict"]["reasons"])


def test_the_death_of_the_shaper_is_an_error(scenario):
    assert "shaper of router-right died" in scenario("shaper_dies")


def test_a_starved_machine_is_caught(scenario):
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) for _ in range(6)]
    try:
        done = scenario("starved", seconds=1.0)
    finally:
        for hog in hogs:
            hog.kill()
        for hog in hogs:
            hog.wait()
    assert not done["verdict"]["ok"]
    assert any("CPU contention" in reason for reason in done["verdict"]["reasons"])
