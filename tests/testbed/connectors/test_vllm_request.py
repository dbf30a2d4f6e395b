"""What requests may say about their contexts: checked, since anyone may write them."""

from __future__ import annotations

import pytest

from kvstream.policies.errors import PolicyError
from kvstream.testbed.connectors.vllm_request import Wish, default_wish, wish_of
from kvstream.testbed.errors import SpecError


def test_defaults_and_wishes() -> None:
    default = default_wish({"url": "http://127.0.0.1:1", "policy": "fixed,level=1", "deadline_s": 2})
    assert default == Wish(policy="fixed,level=1", deadline_s=2.0)
    assert wish_of(None, default) == wish_of({}, default) == wish_of({"do_remote_prefill": True}, default) == default
    wish = wish_of({"context": "docs", "policy": "mpc,horizon=3", "deadline_s": 0.5, "save_as": "new"}, default)
    assert wish == Wish(True, "docs", "mpc,horizon=3", 0.5, "new")
    assert not wish_of({"context": None}, default).loads


@pytest.mark.parametrize(
    "parameters",
    [
        "docs",
        {"context": 3},
        {"context": "../etc"},
        {"save_as": "a/b"},
        {"policy": 7},
        {"policy": "nothing"},
        {"policy": "fixed,nothing=1"},
        {"policy": "oracle"},
        {"deadline_s": 0},
        {"deadline_s": True},
        {"deadline_s": "1s"},
        {"deadline_s": float("nan")},
        {"deadline_s": float("inf")},
    ],
)
def test_other_wishes_are_refused(parameters: object) -> None:
    with pytest.raises((SpecError, PolicyError)):
        wish_of(parameters, Wish())


def test_a_request_brings_no_code(tmp_path) -> None:
    """The operator may set a policy from a file; a request that names one would run it."""
    (tmp_path / "mine.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
        "class Mine:\n    def choose(self, obs):\n        return None\n"
    )
    with pytest.raises(SpecError, match="not one that a request may have"):
        wish_of({"policy": f"{tmp_path}/mine.py:Mine"}, Wish())
    assert not (tmp_path / "ran").exists()
    assert default_wish({"policy": f"{tmp_path}/mine.py:Mine"}).policy.endswith("Mine")
