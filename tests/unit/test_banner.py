"""Waiting for a server's first word, on real sockets that behave as a booting guest's port does."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest

from vmtasks.guest import banner

WORD = b"SSH-2.0-OpenSSH_9.2\r\n"
Peer = Callable[[socket.socket, int], None]


@contextmanager
def serving(peer: Peer) -> Iterator[tuple[int, list[float]]]:
    """A port whose connections are each given to `peer`, with their number; and when each came."""
    came: list[float] = []
    threads = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                came.append(time.monotonic())
                threads.append(threading.Thread(target=peer, args=(connection, len(came)), daemon=True))
                threads[-1].start()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1], came
        listener.shutdown(socket.SHUT_RDWR)


def waiting(port: int, timeout_s: float, alive: Callable[[], bool] = lambda: True) -> tuple[str, float]:
    """What came of it, and the seconds that it took."""
    began = time.monotonic()
    return banner.wait(port, timeout_s=timeout_s, alive=alive), time.monotonic() - began


def silent(connection: socket.socket, _: int) -> None:
    """As QEMU for a guest without network: it accepts, and nothing comes."""
    connection.recv(1)
    connection.close()


def test_connections_whose_first_packet_was_lost_are_not_waited_for():
    def first_three_are_lost(connection: socket.socket, number: int) -> None:
        if number > 3:
            connection.sendall(WORD)
        silent(connection, number)

    with serving(first_three_are_lost) as (port, came):
        stage, took_s = waiting(port, 30)
    assert stage == ""
    assert len(came) == 4
    assert took_s < 5


def test_a_guest_that_is_slow_to_speak_is_heard():
    """Slower than a connection is the newest: it must not be given up for the next."""

    def slow(connection: socket.socket, _: int) -> None:
        time.sleep(1.8)
        connection.sendall(WORD)

    with serving(slow) as (port, came):
        stage, _ = waiting(port, 30)
    assert stage == ""
    assert len(came) > 1, "others were tried meanwhile"


def test_a_guest_that_is_very_slow_is_not_buried_under_connections():
    """Each one costs it a process in the end, also those that nobody waits for any more."""
    with serving(silent) as (port, came):
        waiting(port, 12)
    assert 8 < len(came) < 20
    gaps = [later - earlier for earlier, later in pairwise(came)]
    assert gaps[-1] > 2 * gaps[2], "they become fewer"


def test_a_kernel_that_refuses_is_asked_again_soon():
    def no_server_yet(connection: socket.socket, number: int) -> None:
        if number > 3:
            connection.sendall(WORD)
        connection.close()

    with serving(no_server_yet) as (port, came):
        stage, _ = waiting(port, 30)
    assert stage == ""
    gaps = [later - earlier for earlier, later in pairwise(came)]
    assert min(gaps) > banner.PAUSE_S / 2, "but not without a pause"


def test_nobody_calls_a_guest_whose_network_card_is_not_up():
    """What is called before costs the guest a process each, when it has the least time for it."""
    began = time.monotonic()
    with serving(lambda connection, _: connection.sendall(WORD)) as (port, came):
        stage = banner.wait(port, timeout_s=30, alive=lambda: True, network=lambda: time.monotonic() - began > 2)
    assert (stage, len(came)) == ("", 1)
    assert came[0] - began > 2


def test_whoever_has_heard_the_kernel_refuse_waits_for_a_slow_server_without_more_calls():
    def no_server_yet(connection: socket.socket, number: int) -> None:
        if number > 2:
            time.sleep(3)
            connection.sendall(WORD)
        connection.close()

    with serving(no_server_yet) as (port, came):
        stage, _ = waiting(port, 30)
    assert (stage, len(came)) == ("", 3)


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (silent, banner.SILENT),
        (lambda connection, _: connection.close(), banner.REFUSED),
        (lambda connection, _: connection.sendall(b"220 ready\r\n"), "another server answers: '220 ready'"),
    ],
    ids=["silent", "closed", "another server"],
)
def test_the_deadline_tells_the_stage(peer: Peer, expected: str):
    with serving(peer) as (port, _):
        stage, took_s = waiting(port, 0.6)
    assert stage == expected
    assert took_s < 10


def test_nothing_listens_and_nobody_is_alive():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert waiting(port, 0.3)[0] == banner.NO_LISTENER
    asked = []
    stage, took_s = waiting(port, 60, lambda: bool(asked.append(1)))
    assert stage == banner.NO_LISTENER
    assert (len(asked), took_s < 10) == (1, True)
