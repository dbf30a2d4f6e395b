"""Frames grow with what a real connection acknowledges, and shrink when it falls silent."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvstream.testbed.net.frame_size import FRAME_S, LARGEST_BYTES, FrameSize

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO is Linux's")
USUAL = 65_536


@contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        with receiver:
            yield sender, receiver


def carry(sender: socket.socket, receiver: socket.socket, nbytes: int) -> None:
    """All of it arrives, and its arrival is acknowledged."""
    sending = threading.Thread(target=sender.sendall, args=(bytes(nbytes),))
    sending.start()
    left = nbytes
    while left:
        left -= len(receiver.recv(min(left, 1 << 20)))
    sending.join()


def test_a_fast_connection_has_large_frames_until_it_is_idle() -> None:
    with connection() as (sender, receiver):
        sizes = FrameSize(sender)
        assert sizes.next(USUAL) == USUAL, "nothing is known"
        largest = 0
        for _ in range(40):  # loopback brings some gigabytes a second, a busy machine less
            carry(sender, receiver, 4 << 20)
            largest = max(largest, sizes.next(USUAL))
        assert USUAL < largest <= LARGEST_BYTES
        time.sleep(0.1)
        assert sizes.next(USUAL) == USUAL, "nothing came in the meantime"


def test_what_the_kernel_only_holds_counts_for_nothing() -> None:
    with connection() as (sender, receiver):
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
        sender.setblocking(False)
        sizes = FrameSize(sender)
        held = 0
        try:
            while held < 8 << 20:
                held += sender.send(bytes(1 << 20))
        except BlockingIOError:
            pass
        assert held > 1 << 20
        for _ in range(5):  # nobody reads
            time.sleep(10 * FRAME_S)
            assert sizes.next(USUAL) == USUAL


def test_without_a_socket_frames_have_their_usual_size() -> None:
    assert FrameSize(None).next(USUAL) == USUAL
    assert FrameSize(None).next(4 << 20) == 4 << 20, "of large answers frames are no smaller than usual"
