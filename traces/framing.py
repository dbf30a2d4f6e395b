"""Layer-2 capacity and application goodput of a TCP link, one from the other.

A shaper counts Ethernet frames without preamble, checksum and gap. A full TCP segment with timestamps carries
``mtu - 52`` bytes of payload (20 IPv4, 20 TCP, 12 timestamp option) in a frame of ``mtu + 14`` bytes.
"""

from __future__ import annotations

from kvstream.traces.errors import TraceError

IP_TCP_HEADER_BYTES = 52
ETHERNET_HEADER_BYTES = 14


def goodput_per_capacity(mtu_bytes: int = 1500) -> float:
    """Application bytes per layer-2 byte of a backlogged TCP flow: 1448/1514 at an MTU of 1500."""
    if mtu_bytes <= IP_TCP_HEADER_BYTES:
        raise TraceError(f"mtu {mtu_bytes} bytes carries no payload: give more than {IP_TCP_HEADER_BYTES}")
    return (mtu_bytes - IP_TCP_HEADER_BYTES) / (mtu_bytes + ETHERNET_HEADER_BYTES)


def goodput_bps(capacity_bps: float, mtu_bytes: int = 1500) -> float:
    """Goodput in bit/s that a layer-2 capacity in bit/s gives."""
    return capacity_bps * goodput_per_capacity(mtu_bytes)


def capacity_bps(goodput_bps: float, mtu_bytes: int = 1500) -> float:
    """Layer-2 capacity in bit/s that a goodput in bit/s needs."""
    return goodput_bps / goodput_per_capacity(mtu_bytes)
