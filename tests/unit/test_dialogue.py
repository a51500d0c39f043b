"""The boot dialogue of the DragonFly guest with a loader that is a process of its own, on lines of every badness.

It gets through, or ends with the cause "dialogue" and the name of the prompt. In no case does anything reach the menu
that was meant for the prompt, or is a line carried out that was not meant.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rehearsal.loader_peer import Vices
from vmtasks.config.tables import Exchange, GuestFile
from vmtasks.errors import PhaseError
from vmtasks.images.judge import Limits, Phase
from vmtasks.qemu.console import ScriptReport, Serial
from vmtasks.qemu.vm import Booted

TOP = Path(__file__).resolve().parents[2]
PEER = TOP / "tests/rehearsal/loader_peer.py"
GUEST = msgspec.convert(tomllib.loads((TOP / "phases/dragonfly/guest.toml").read_text()), GuestFile)
TOKEN = "0123456789abcdef"  # noqa: S105
PROMPT_S = 6
SEEDS = range(8)
MEANT = ["set console=comconsole", "boot"]


@dataclass
class Control:
    """The control socket of a machine without one: it tells the end of the process as QEMU would."""

    process: subprocess.Popen[bytes]

    def events(self) -> Iterator[dict[str, Any]]:
        if self.process.poll() is not None:
            yield {"event": "SHUTDOWN", "data": {"reason": "guest-shutdown"}}


@dataclass
class Went:
    """How a dialogue went: what the loader was made to do, and the error that the host ended with."""

    menu: list[str]
    lines: list[str]
    booted: str
    console: str
    error: PhaseError | None


def exchanges(**changes: Any) -> list[Exchange]:
    """The guest's dialogue, with a shorter patience."""
    return [msgspec.structs.replace(e, timeout_s=PROMPT_S, **changes) for e in GUEST.dialogue["loader"]]


def talk(vices: Vices, dialogue: list[Exchange]) -> Went:
    """One dialogue, from the menu to the kernel's verdict."""
    ours, theirs = socket.socketpair()
    words = [sys.executable, str(PEER), str(theirs.fileno()), json.dumps(asdict(vices))]
    peer = subprocess.Popen(words, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    theirs.close()
    phase = Phase(
        title="phase 1-install",
        booted=Booted(peer, Serial(ours), Control(peer)),  # type: ignore[arg-type]
        limits=Limits(total_s=60.0, silence_s=10.0, poweroff_s=60),
        dialogue=dialogue,
        failures=GUEST.failures,
        firmware_log=Path(os.devnull),
        said=ScriptReport(TOKEN, lambda _: None),
    )
    error = None
    try:
        phase.run()
    except PhaseError as failed:
        error = failed
    finally:
        ours.close()
        peer.kill()
        out, _ = peer.communicate(timeout=10)
    happened = json.loads(out.decode().splitlines()[-1]) if out else {}
    return Went(**{"menu": [], "lines": [], "booted": "", "console": "", **happened}, error=error)


def safe(went: Went) -> None:
    """What must hold however bad the line was."""
    assert went.menu == [], "a key that was meant for the prompt reached the menu"
    assert went.lines in ([], MEANT[:1], MEANT), "a line was carried out that was not meant"
    if went.error is None:
        assert (went.lines, went.booted, went.console) == (MEANT, "boot", "comconsole")
    else:
        assert went.error.cause == "dialogue", went.error
        named = [exchange.expect for exchange in GUEST.dialogue["loader"]]
        assert any(repr(expect) in went.error.message for expect in named), went.error.message


GOOD = {
    "a good line": Vices(),
    "a menu that is late": Vices(late=2.0),
    "a loader that takes its time over each key": Vices(slow=0.08),
    "escape sequences everywhere, one byte at a time": Vices(escapes=True, pieces=True),
    "a first key that is lost": Vices(lose_first=1),
    "three first keys that are lost": Vices(lose_first=3, countdown=8),
    "each thirtieth character lost": Vices(lose=0.033, seed=3, countdown=8),
    "echoes that are lost": Vices(lose_echo=0.04, seed=5),
    "slow, in pieces, with losses": Vices(slow=0.05, pieces=True, escapes=True, lose=0.03, seed=11, countdown=8),
}
BAD = {
    "a prompt that never comes": (Vices(mute=True), r"waited .* for '\(\?m\)\^OK \$', which did not come"),
    "a menu that never comes": (Vices(late=60), r"waited .* for 'Booting in"),
    "a line that loses all": (Vices(lose_first=10_000), r"waited .* for '\(\?m\)\^OK \$'"),
    "a system that started unheard, and went": (
        Vices(countdown=2, lose_first=10_000, power_off=True),
        r"powered off while the boot dialogue waited for '\(\?m\)\^OK \$'",
    ),
    "no echo at all": (
        Vices(lose_echo=1.0),
        r"failed at the prompt '\(\?m\)\^OK \$': 'set console=comconsole' was typed",
    ),
    "every character twice": (Vices(double=1.0), r"waited .* for "),
}
CHANCE = {
    f"by chance, {seed}": Vices(
        countdown=8,
        double=(0.0, 0.02, 0.3)[seed % 3],
        escapes=seed % 2 == 0,
        lose=(0.02, 0.1, 0.3, 0.6)[seed % 4],
        lose_echo=(0.0, 0.05)[seed % 2],
        pieces=seed % 3 == 0,
        seed=seed,
        slow=(0.0, 0.03)[seed % 2],
    )
    for seed in SEEDS
}


@pytest.fixture(scope="module")
def went() -> Iterator[dict[str, Went]]:
    """All dialogues, some at a time: they mostly wait."""
    prompts = ["B+o+t*", r"(?m)^O+K+ +$", r"(?m)^O+K+ +$"]
    mirrored = [msgspec.structs.replace(e, expect=p) for e, p in zip(exchanges(), prompts, strict=True)]
    cases = {name: (vices, exchanges()) for name, vices in {**GOOD, **CHANCE}.items()}
    cases |= {name: (vices, exchanges()) for name, (vices, _) in BAD.items()}
    cases["mirrored"] = (Vices(double=1.0), mirrored)
    cases["blind"] = (Vices(lose_key=16), exchanges(echo=False, again=False))
    cases["checked"] = (Vices(lose_key=16), exchanges())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmtasks.images.judge.ECHO_S", 0.3)
        patch.setattr("vmtasks.qemu.console.QUIET_S", 0.1)
        with ThreadPoolExecutor(8) as pool:
            yield dict(zip(cases, pool.map(talk, *zip(*cases.values(), strict=True)), strict=True))


@pytest.mark.parametrize("name", GOOD)
def test_it_gets_through(went: dict[str, Went], name: str) -> None:
    safe(went[name])
    assert went[name].error is None, went[name].error


@pytest.mark.parametrize("name", BAD)
def test_it_ends_with_the_name_of_the_prompt(went: dict[str, Went], name: str) -> None:
    safe(went[name])
    error = went[name].error
    assert error is not None
    assert re.search(BAD[name][1], error.message), error.message


@pytest.mark.parametrize("name", CHANCE)
def test_bad_lines_by_chance(went: dict[str, Went], name: str) -> None:
    safe(went[name])


def test_an_echo_that_is_doubled_is_understood(went: dict[str, Went]) -> None:
    """All comes twice, as from a firmware that mirrors the screen, and the prompts allow for it."""
    assert went["mirrored"].error is None, went["mirrored"].error
    assert (went["mirrored"].menu, went["mirrored"].lines) == ([], MEANT)


def test_without_the_echo_a_garbled_command_goes_unnoticed(went: dict[str, Went]) -> None:
    """Why the check is there: one key lost, and a kernel is booted that nobody hears."""
    assert went["blind"].lines == ["set console=coconsole", "boot"]
    assert went["blind"].error is not None
    assert went["blind"].error.cause == "silence"
    assert went["checked"].error is None
    assert went["checked"].lines == MEANT
