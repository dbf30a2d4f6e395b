"""How the stored traces are made: a spec and a story each. `python -m traces.library.recipes` writes them again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kvstream.traces.formats import save
from kvstream.traces.resolve import open_trace
from kvstream.traces.trace import Trace

RECIPES: dict[str, tuple[str, str]] = {
    "steady": (
        "constant,rate=30Mbps,length=60s",
        "A wired link with nobody else on it. The best fixed level is hard to beat; a policy should not lose to it.",
    ),
    "step-down-up": (
        "step,rates=45Mbps:10Mbps:32Mbps,hold=0.3s:0.4s:0.8s,end=loop",
        "Someone else starts a download and ends it: fast, then a quarter of it for 0.4 s, then most of the way back.",
    ),
    "uniform-hold": (
        "uniform,low=5Mbps,high=55Mbps,hold=0.2s,seed=7,length=60s",
        "The paper's uniform rates at about a hundredth of their size, held 0.2 s: the next rate cannot be foreseen.",
    ),
    "lte-walk": (
        "lognormal,median=25Mbps,sigma=0.6,memory=2s,low=1Mbps,high=150Mbps,hold=0.1s,seed=11,length=60s",
        "A phone on a moving bus: the rate drifts for seconds, so the last chunk says much about the next.",
    ),
    "wifi": (
        "gilbert-elliott,good=45Mbps,bad=5Mbps,good_time=0.6s,bad_time=0.15s,seed=13,length=60s",
        "Wi-Fi beside a microwave oven: mostly fast, with short deep dips that are over before a policy has adapted.",
    ),
    "dropout": (
        "outage,rate=40Mbps,floor=0,first=0.4s,down=0.5s,length=3s",
        "A handover: nothing at all for half a second, then as fast as before. What was sent early saves the answer.",
    ),
    "lab-steady": (
        "constant,rate=12Mbps,length=10s",
        "Lesson 1. Nothing happens. Find the best fixed level by hand, then ask what a policy can add.",
    ),
    "lab-cliff": (
        "step,rates=18Mbps:3.2Mbps,hold=0.35s:4s",
        "Lesson 2. Fast, then a sixth of it for good. Who looks only at the last chunk learns it one chunk too late.",
    ),
    "lab-recovery": (
        "step,rates=3.2Mbps:18Mbps,hold=0.4s:4s",
        "Lesson 3. Slow, then fast for good. The careful pay in quality: when is it safe to climb again?",
    ),
    "lab-sawtooth": (
        "step,rates=4Mbps:8Mbps:12Mbps:16Mbps:20Mbps,hold=0.1s,end=loop",
        "Lesson 4. A ramp up and a fall, twice a second. Only the mean matters, and the last sample is always wrong.",
    ),
    "lab-outage": (
        "outage,rate=16Mbps,floor=0,first=0.3s,down=0.25s,length=2s",
        "Lesson 5. A quarter of a second of nothing. Estimates over time and over bytes disagree: which one to trust?",
    ),
    "lab-burst": (
        "step,rates=36Mbps:7.2Mbps,hold=0.1s:4s",
        "Lesson 6. A tenth of a second at five times the speed, as a full token bucket gives: the first sample lies.",
    ),
}


def make(name: str) -> Trace:
    """The stored trace of this name, from its recipe."""
    spec, story = RECIPES[name]
    return replace(open_trace(spec), name=name, story=story)


if __name__ == "__main__":
    for each in RECIPES:
        save(make(each), Path(__file__).parent / f"{each}.csv")
