"""The console however it is cut, interrupted, coloured or echoed; and typing over a real socket."""

import os
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmtasks.errors import MachineError
from vmtasks.printable import Cleaner
from vmtasks.qemu import console, terminal
from vmtasks.qemu.console import Sentinel, Serial, Transcript, parse_sentinel

TOKEN = "0123456789abcdef"  # noqa: S105
PIECES = st.one_of(
    st.binary(max_size=6),
    st.sampled_from(
        [
            b"\x1b", b"\x1b[", b"\x1b[0;1", b"\x1b[0;1m", b"\x1b]0;title", b"\x1b]0;title\x07", b"\x1b]0;t\x1b\\",
            b"\x1b(B", b"\x1b ", b"\x1bc", b"\x9b", b"\r", b"\n", b"\r\n", b"\0", b"\x07", b"\\", "é€😀".encode(),
            b"OK ", b"\x1b]" + b"x" * 255, b"\x1b[" + b"1" * 63, b"y" * 300,
            f"\n::vmtasks:{TOKEN}:exit 0 step\r\n".encode(), f"::vmtasks:{TOKEN}:step a".encode(),
        ]
    ),
)  # fmt: skip
STREAMS = st.lists(PIECES, max_size=10).map(b"".join)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@given(STREAMS, st.lists(st.integers(0, 1 << 16), max_size=12))
@example(b"\x1b]" + b"x" * 300 + b"\x07", [200])
@example(b"\x1b[\n::vmtasks:0123456789abcdef:begin\n", [2, 3])
def test_text_and_sentinels_do_not_depend_on_where_the_bytes_are_cut(data: bytes, places: list[int]):
    whole, parts, cleaner = Transcript(), Transcript(), Cleaner()
    sentinels = whole.feed(data)
    chunks = cut(data, places)
    assert [s for chunk in chunks for s in parts.feed(chunk)] == sentinels
    assert parts.lines == whole.lines
    assert parts.tail() == whole.tail()
    assert parts.unmatched == whole.unmatched
    assert parts.last_command == whole.last_command
    assert "".join(map(cleaner.feed, chunks)) == Cleaner().feed(data)


@given(STREAMS)
def test_clean_text_has_no_control_characters(data: bytes):
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", Cleaner().feed(data))


@given(STREAMS)
def test_nothing_swallows_the_verdict(data: bytes):
    """Whatever went before, a line of its own is heard as soon as it is complete."""
    verdict = Sentinel(TOKEN, "exit", "0 last")
    assert Transcript().feed(data + f"\n::vmtasks:{TOKEN}:exit 0 last\n".encode())[-1] == verdict


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\x1b[1;31mred\x1b[0m", "red"),
        (b"\x1b[?25l\x1b[2J\x1b[10;20Hat", "at"),
        (b"\x1b[0 q\x1b[!pcursor", "cursor"),
        (b"\x1b]0;title\x07prompt", "prompt"),
        (b"\x1b]0;title\x1b\\prompt", "prompt"),
        (b"\x1b(B\x1b)0charset", "charset"),
        (b"\x1b7\x1b8\x1bc\x1b=\x1b>keypad", "keypad"),
        (b"\x1bMup", "up"),
        (b"tab\there\x08\x07\0", "tab\there"),
        (b"line\r\n", "line\n"),
        (b"10%\r20%\r\n", "10%20%\n"),
        ("grüße €".encode(), "grüße €"),
        (b"caf\xe9!", "caf\N{REPLACEMENT CHARACTER}!"),
        (b"\x1b]0;no end\nOK ", "]0;no end\nOK "),
        (b"\x1b[12\nOK ", "[12\nOK "),
        (b"\x1b]" + b"x" * 300 + b"\x07", "]" + "x" * 300),
        ("\x9b1;31mred\x9b0m \x9d0;title\x9cprompt\x85 \x90".encode(), "red prompt "),
        ("pass\u202edelliaf\u2028".encode(), "passdelliaf"),
    ],
)
def test_control_sequences_are_taken_out(raw: bytes, text: str):
    assert Cleaner().feed(raw) == text


# ---- sentinels


@pytest.mark.parametrize(
    ("line", "sentinel"),
    [
        (f"::vmtasks:{TOKEN}:begin", Sentinel(TOKEN, "begin", "")),
        (f"::vmtasks:{TOKEN}:exit 0 ", Sentinel(TOKEN, "exit", "0")),
        (f"::vmtasks:{TOKEN}:exit 7 a step: with 'quotes' %s", Sentinel(TOKEN, "exit", "7 a step: with 'quotes' %s")),
        (f"::vmtasks:{TOKEN}:step ::vmtasks:{TOKEN}:exit 0", Sentinel(TOKEN, "step", f"::vmtasks:{TOKEN}:exit 0")),
        (f"::vmtasks:{TOKEN}:hostkey ssh-ed25519 AAAA", Sentinel(TOKEN, "hostkey", "ssh-ed25519 AAAA")),
        (f" ::vmtasks:{TOKEN}:exit 0", None),
        (f"+ 3: printf '\\n::vmtasks:{TOKEN}:exit 0", None),
        (f"+ echo ::vmtasks:{TOKEN}:exit 0", None),
        (r"say() { printf '\n::vmtasks:%s:%s\n' \"$VMTASKS_TOKEN\" \"$*\"; }", None),
        ("::vmtasks:$VMTASKS_TOKEN:exit 0", None),
        ("::vmtasks:0123:exit 0", None),
        (f"::vmtasks:{TOKEN}0:exit 0", None),
        (f"::vmtasks:{TOKEN.upper()}:exit 0", None),
        (f"::vmtasks:{TOKEN}:exited 0", None),
        (f"::vmtasks:{TOKEN}:exit[    3.1] sd 0:0:0:0", None),
        ("", None),
    ],
)
def test_what_is_a_sentinel(line: str, sentinel: Sentinel | None):
    assert parse_sentinel(line) == sentinel


def test_a_message_of_the_kernel_in_one_verdict_leaves_the_others():
    verdict = f"\r\n::vmtasks:{TOKEN}:exit 7 step\r\n"
    kernel = "[   12.345678] sd 0:0:0:0: [sda] Synchronizing SCSI cache\r\n"
    for at in range(len(verdict) + 1):
        text = verdict[:at] + kernel + verdict[at:] + verdict + verdict
        statuses = [s.text.split()[0] for s in Transcript().feed(text.encode())]
        assert statuses.count("7") >= 2
        assert [s for s in statuses if s.isdecimal()][0] == "7", f"a message after {at} characters"  # noqa: RUF015


def test_the_last_command_of_a_trace():
    transcript = Transcript()
    transcript.feed(b"+ 3: cp a b\r\ncp: a: No such file\r\n+ 4: exit 7\r\n+ 9: fail x\r\nnot + 5: this\r\n")
    assert transcript.last_command == "line 3: cp a b"
    transcript.feed(b"++ 12: id -u\n+ : without numbers\n")
    assert transcript.last_command == "without numbers"
    transcript.feed(b"+ 12: unfinished")
    assert transcript.last_command == "without numbers"


# ---- lines and prompts


def test_tail_shows_the_line_under_way_and_no_empty_ones():
    transcript = Transcript()
    transcript.feed(b"one\r\n\r\n  \r\ntwo\r\nlogin: ")
    assert transcript.tail() == ["one", "two", "login: "]
    assert transcript.tail(1) == ["login: "]
    assert Transcript().tail() == []


def test_tail_is_short_and_the_last_to_come():
    transcript = Transcript()
    transcript.feed(b"".join(f"line {n}\n".encode() for n in range(5000)))
    assert transcript.tail() == [f"line {n}" for n in range(5000 - console.TAIL_LINES, 5000)]


def test_an_endless_line_is_not_kept_for_ever():
    transcript = Transcript()
    for _ in range(40):
        transcript.feed(b"x" * 10_000)
    assert len(transcript.unmatched) == console.KEEP_CHARS
    assert sum(map(len, transcript.tail())) <= console.KEEP_CHARS


def test_a_prompt_is_found_once_and_what_was_before_it_is_used_up():
    transcript = Transcript()
    transcript.feed(b"Booting in 9 seconds\r\nOK ")
    assert transcript.match(r"Booting in \d+ seconds")
    assert not transcript.match(r"Booting in \d+ seconds")
    assert transcript.match(r"(?m)^OK $")
    assert not transcript.match(r"(?m)^OK $")
    transcript.feed(b"set console=comconsole\r\nOK ")
    assert transcript.match(r"(?m)^OK $")


def test_a_prompt_that_comes_in_pieces_and_colours():
    transcript = Transcript()
    for piece in (b"\x1b[1", b"mlog", b"\x1b[0min:", b" "):
        assert not transcript.match("login: $")
        transcript.feed(piece)
    assert transcript.match("login: $")


# ---- typing


@pytest.fixture
def ends() -> tuple[Serial, socket.socket]:
    ours, guests = socket.socketpair()
    return Serial(ours), guests


def test_typing_reaches_the_guest_a_key_at_a_time_and_hears_the_echo(ends: tuple[Serial, socket.socket]):
    serial, guest = ends
    keys: list[bytes] = []
    times: list[float] = []

    def echo() -> None:
        while data := guest.recv(100):
            keys.append(data)
            times.append(time.monotonic())
            guest.sendall(data.upper())

    threading.Thread(target=echo, daemon=True).start()
    heard = b"".join(serial.type("boot é\r"))
    assert keys == [b"b", b"o", b"o", b"t", b" ", "é".encode(), b"\r"]
    assert heard == "BOOT é\r".encode()
    assert min(b - a for a, b in pairwise(times)) > console.KEY_DELAY_S / 2


def test_reading_waits_for_what_comes_and_no_longer(ends: tuple[Serial, socket.socket]):
    serial, guest = ends
    began = time.monotonic()
    assert serial.read(0.1) == b""
    assert 0.09 < time.monotonic() - began < 1
    threading.Timer(0.1, guest.sendall, [b"x"]).start()
    assert serial.read(5) == b"x"
    assert time.monotonic() - began < 2


@pytest.fixture
def high() -> Iterator[int]:
    """The number of a descriptor that select(2) does not know, as in a program that has many files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    yield 1500
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_reading_from_a_high_descriptor(ends: tuple[Serial, socket.socket], high: int):
    serial, guest = ends
    with socket.socket(fileno=os.dup2(serial.fileno(), high)) as connection:
        assert Serial(connection).read(0) == b""
        guest.sendall(b"login: ")
        assert Serial(connection).read(5) == b"login: "


def test_a_terminal_on_high_descriptors(tmp_path: Path, high: int, monkeypatch: pytest.MonkeyPatch, capfdbinary):
    """`vmtasks console` passes on what comes until both sides are silent."""
    path = tmp_path / "serial"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        with (tmp_path / "typed").open("w+b", buffering=0) as typed:
            typed.write(b"root\n")
            typed.seek(0)
            monkeypatch.setattr("sys.stdin", os.fdopen(os.dup2(typed.fileno(), high), "rb"))
            asked = threading.Thread(target=terminal.attach_console, args=(path, "a"))
            asked.start()
            with server.accept()[0] as guest:
                guest.sendall(b"login: ")
                assert guest.recv(5) == b"root\n"
                asked.join(10)
    assert not asked.is_alive()
    assert capfdbinary.readouterr().out == b"login: "


def test_a_guest_that_is_gone(ends: tuple[Serial, socket.socket]):
    serial, guest = ends
    guest.sendall(b"last words")
    guest.close()
    assert b"".join(serial.type("boot\r")) == b"last words"
    began = time.monotonic()
    assert [serial.read(0.05) for _ in range(3)] == [b""] * 3
    assert time.monotonic() - began > 0.1, "reading what is closed must not spin"


def test_connect_waits_for_a_socket_that_comes_late(tmp_path: Path):
    path = tmp_path / "console"
    listener = socket.socket(socket.AF_UNIX)

    def listen() -> None:
        listener.bind(str(path))
        time.sleep(0.1)
        listener.listen()
        listener.accept()[0].sendall(b"hello")

    threading.Timer(0.1, listen).start()
    with console.connect(path, timeout_s=10) as serial:
        assert serial.read(5) == b"hello"
    listener.close()


def test_connect_gives_up(tmp_path: Path):
    with (
        pytest.raises(MachineError, match=r"within 0.2 s \(.*No such file"),
        console.connect(tmp_path / "c", timeout_s=0.2),
    ):
        pass


@given(st.lists(st.integers(0, 160), max_size=12))
def test_a_prompt_is_found_wherever_its_text_is_cut(cuts: list[int]):
    text = "noise\n" * 20 + "Welcome to the loader\nOK "
    transcript, at, found = Transcript(), 0, 0
    for end in sorted({*(min(cut, len(text)) for cut in cuts), len(text)}):
        transcript.feed(text[at:end].encode())
        at = end
        found += transcript.match(r"(?m)^Welcome to .*\nOK $")
        assert found == (end == len(text))
        assert not transcript.match("noisy")
    assert transcript.unmatched == ""


def test_looking_for_words_costs_what_the_new_text_does_and_not_all_of_it():
    words = [
        "panic: ",
        r"(?m)^Fatal (double fault|trap \d+)",
        r"(?m)^db> $",
        "login: $",
        r"Booting in \d+",
        r"(?m)^OK $",
    ]

    def cost(before: str) -> float:
        transcript = Transcript()
        transcript.feed(before.encode())
        began = time.process_time()
        for _ in range(200):
            transcript.feed(b"[ 12.345678] a line of the kernel's\n")
            assert not any(transcript.match(word) for word in words)
        return time.process_time() - began

    full, empty = (min(cost(text) for _ in range(3)) for text in ("some line of the console\n" * 4000, ""))
    assert full < 5 * empty
