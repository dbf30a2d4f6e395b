"""Hosts that reach each other, settings that hold, nothing left."""

from __future__ import annotations

import pytest

from kvstream.testbed.emulator.link import LinkSettings
from kvstream.testbed.emulator.topology import Network
from kvstream.testbed.errors import MachineError


@pytest.mark.parametrize(("receivers", "senders"), [(1, 1), (3, 2)])
def test_every_receiver_reaches_every_sender(scenario, receivers, senders):
    done = scenario("build", receivers=receivers, senders=senders)
    assert done["reached"] == [5000] * (receivers * senders)
    assert done["interfaces_after"] == ["lo"]


def test_settings_are_pinned_and_read_back(scenario):
    settings = scenario("build", link="mtu=1400,offloads=off")["settings"]
    for host in settings["hosts"].values():
        assert host["sysctls"]["net/ipv4/tcp_slow_start_after_idle"] == "0"
        assert all(interface["mtu"] == 1400 for interface in host["interfaces"].values())
    assert settings["packet_bytes"] == 1414
    assert settings["link"]["cc"] == "cubic"


@pytest.mark.parametrize("cc", ["cubic", "reno"])
def test_connections_use_the_congestion_control_of_the_link(scenario, cc):
    assert scenario("congestion_control", cc=cc) == [cc, cc]


def test_a_network_outside_a_sandbox_is_refused():
    with pytest.raises(MachineError, match=r"sandbox\.run"), Network(LinkSettings()):
        pass
