"""What a guest says, and what of it reaches a terminal: by each way that there is, nothing that a terminal obeys."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmtasks import printable
from vmtasks.cli import common
from vmtasks.errors import CommandError, MachineError, VmTasksError
from vmtasks.host import progress
from vmtasks.host.process import Ended
from vmtasks.qemu.console import read_log
from vmtasks.suites.junit import report

HOSTILE = "a\x1b]0;owned\x07b\x1b[2Jc\x9b31md\x9d0;t\x9ce\x07f\x1b[8mg\u202eh\x85i\u2028j"
HOSTILE += "\x1bPk\x90l\rm\x00n\udc9bo\x7fp\nq\tr"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]")
COLOR = re.compile(r"\x1b\[[0-9;:]*m")
TEXTS = st.text(st.one_of(st.sampled_from("\x1b\x9b\x9d\x9c[]0;m\x07\r\n \\"), st.characters(exclude_categories=())))


@given(TEXTS)
@example(HOSTILE)
def test_no_terminal_obeys_what_is_left(said: str):
    assert not OBEYED.search(printable.text(said))
    assert not OBEYED.search(printable.line(said))
    assert "\n" not in printable.line(said)
    assert printable.text(printable.text(said)) == printable.text(said)


def test_words_stay():
    assert printable.text("grüße €\t😀\nnext  line") == "grüße €\t😀\nnext  line"
    assert printable.line("  two\n words ") == "two words"
    assert printable.text(HOSTILE) == "abcdefghijklmn\ufffdop\nq\tr"


def live(*parts: bytes) -> str:
    shown = printable.Live()
    return "".join(map(shown.feed, parts)) + shown.end()


@given(st.lists(st.binary(max_size=12) | TEXTS.map(lambda said: said.encode(errors="surrogatepass"))))
def test_live_output_is_the_same_wherever_it_is_cut(parts: list[bytes]):
    whole = b"".join(parts)
    assert live(*parts) == live(whole) == live(*(whole[at : at + 1] for at in range(len(whole))))
    assert not OBEYED.search(COLOR.sub("", live(whole)))


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"plain\r\nnext\n", "plain\nnext\n"),
        (b"10%\r20%\r", "10%\n20%\n"),
        (b"\x1b[31mred\x1b[0m\x1b[2J", "\x1b[31mred\x1b[0m" + printable.RESET),
        ("\x9b1;32mgreen".encode(), "\x1b[1;32mgreen" + printable.RESET),
        (b"\x1b]0;title\x07text", "text"),
        (b"no end \x1b[12", "no end [12"),
        (b"half \xe2\x82", "half \N{REPLACEMENT CHARACTER}"),
    ],
)
def test_live_output_keeps_colours_and_lines(raw: bytes, shown: str):
    assert live(raw) == shown


# ---- the ways to a terminal


def _error(error: VmTasksError) -> str:
    error.add_note(HOSTILE)
    return str(error)


def test_errors_quote_what_cannot_be_obeyed(tmp_path: Path):
    assert not OBEYED.search(_error(MachineError(HOSTILE, hint=HOSTILE, console=[HOSTILE], log=tmp_path / "\x9b")))
    assert not OBEYED.search(_error(CommandError(HOSTILE, status=1, stderr=HOSTILE, hint=HOSTILE)))


@pytest.mark.parametrize("stderr", [False, True])
def test_progress_and_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stderr: bool):  # noqa: FBT001
    monkeypatch.setitem(progress._talk, "stderr", stderr)
    progress.say(HOSTILE)
    progress.to_stderr(HOSTILE)
    with progress.step(HOSTILE) as step:
        step.now(HOSTILE)
    assert "\n" not in step.line()
    assert not OBEYED.search(step.line())
    common.table(("NAME", "TITLE"), [("a", HOSTILE), (HOSTILE, "b")])
    out, err = capsys.readouterr()
    assert "abcdefgh" in out + err
    assert not OBEYED.search(out + err)
    assert len(out.splitlines()[-3:]) == 3
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["NAME", "a", "abcdefghijkl"]


def test_reports_and_consoles(tmp_path: Path):
    tap = f"TAP version 13\n1..1\nnot ok 1 - {HOSTILE}\n# {HOSTILE}\n"
    xml = report(HOSTILE, tap, ended=Ended(1), duration_s=1.0, fmt="tap", own_xml=None).xml
    assert not OBEYED.search(xml.decode().replace("&#13;", ""))
    case = f'<testcase name="{printable.line(HOSTILE)}\x9b"><failure>&#155;2J\x9b2J</failure></testcase>'
    own = f"<testsuite>{case}</testsuite>"
    xml = report("s", "", ended=Ended(1), duration_s=1.0, fmt="auto", own_xml=own.encode()).xml
    assert not OBEYED.search(xml.decode())
    (tmp_path / "log").write_bytes(HOSTILE.encode(errors="surrogateescape") + b"\n")
    assert not OBEYED.search("".join(read_log(tmp_path / "log").tail()))
