"""The phase engine on real QEMU, with guests of one boot sector that fail in each of the ways a guest can."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from phaserun import KEY, LOADER, TALK, TOKEN, Went, failed, needs_qemu, runner

from bootsector import ask, forever, hang, phase, power_off, reboot, say, sector, triple_fault, wait_key, wait_ticks
from vmtasks.config.tables import Exchange, PhaseTable
from vmtasks.images.judge import Limits

pytestmark = needs_qemu


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Went]]:
    with runner(tmp_path, monkeypatch) as boot:
        yield boot


# ---- it passes


def test_a_phase_that_passes(run):
    went = run(sector(phase(TOKEN, steps=("one", "two"), hostkey=KEY)))
    assert went.error is None
    assert went.host_keys == [KEY]
    assert went.steps == ["the script runs", "one", "two"]
    assert went.took_s < 5
    assert f"::vmtasks:{TOKEN}:exit 0" in went.log


def test_many_times_in_a_row_the_end_is_understood(run):
    """QEMU tells why it ends in the moment when it closes the connection."""
    for _ in range(6):
        assert run(sector(phase(TOKEN))).error is None


def test_a_verdict_said_three_times_counts_once(run):
    went = run(sector(phase(TOKEN, verdict="0", power=False), phase(TOKEN, verdict="0", hostkey=KEY)))
    assert went.error is None
    assert went.host_keys == [KEY]


def test_the_first_verdict_counts(run):
    went = run(sector(phase(TOKEN, verdict="3 one", power=False), phase(TOKEN, verdict="0")))
    failed(went, "verdict", "its script exited with 3 at step 'one'")


def test_words_of_failure_in_the_scripts_own_output_are_not_a_failure(run):
    words = say(f"::vmtasks:{TOKEN}:begin\r\nrecovering: single-user mode\r\nroot login: \r\nboot: \r\n")
    assert run(sector(words, wait_ticks(4), phase(TOKEN))).error is None


def test_words_of_failure_after_the_verdict_are_not_a_failure(run):
    went = run(sector(phase(TOKEN, power=False), say("panic: at the disco\r\n"), wait_ticks(4), power_off()))
    assert went.error is None


# ---- verdicts


def test_a_script_that_fails_at_a_step(run):
    went = run(sector(phase(TOKEN, steps=("one", "two words"), verdict="7 two words")))
    failed(went, "verdict", "its script exited with 7 at step 'two words'", last="")


def test_the_last_command_is_named(run):
    image = sector(
        phase(TOKEN, verdict=None, power=False),
        say("+ 12: cp a b\r\ncp: no such file\r\n"),
        phase(TOKEN, steps=(), verdict="1"),
    )
    failed(run(image), "verdict", "its script exited with 1 (line 12: cp a b) at step 'one'")


def test_another_phases_token_is_ignored(run):
    other = "fedcba9876543210"
    went = run(sector(phase(other, hostkey=KEY)))
    failed(went, "no-verdict", "the guest powered off before its script began, without a verdict")
    assert went.steps == went.host_keys == []


@pytest.mark.parametrize("verdict", ["", "x", "-1", "0x0"])
def test_a_verdict_that_is_none_is_ignored(verdict: str, run):
    failed(
        run(sector(phase(TOKEN, verdict=verdict))),
        "no-verdict",
        "the guest powered off after it began, without a verdict at step 'one'",
    )


STAYED_ON = "the guest said that all went well but did not power itself off within 1.0 s"


def test_a_good_verdict_without_power_off(run):
    went = run(sector(phase(TOKEN, power=False)), limits=Limits(10, 5, poweroff_s=1))
    failed(went, "no-poweroff", f"{STAYED_ON} at step 'one'")
    assert went.took_s < 5


def test_a_bad_verdict_without_power_off(run):
    went = run(sector(phase(TOKEN, verdict="7 one", power=False)), limits=Limits(10, 5, poweroff_s=1))
    failed(went, "verdict", "its script exited with 7 at step 'one'")


def test_the_time_for_powering_off_is_scaled(run):
    image = sector(phase(TOKEN, power=False), wait_ticks(18), power_off())
    patient, brief = (PhaseTable(name="x", boot="cd", cds=["phase"], poweroff_timeout_s=s) for s in (2, 1))
    assert run(image, limits=Limits.of(patient, 6)).error is None
    assert run(image, limits=Limits.of(brief, 0.3)).error.cause == "no-poweroff"


def test_the_limits_in_force_are_said():
    table = PhaseTable(name="x", boot="cd", cds=["phase"], timeout_s=1200, silence_timeout_s=30, poweroff_timeout_s=90)
    assert str(Limits.of(table, 1)) == "limits 20 min 0 s, 30 s without output, 1 min 30 s to power off"
    assert str(Limits.of(table, 9.21)).startswith("limits 3 h 4 min, 4 min 36 s without output, 13 min 49 s to power")
    assert str(Limits.of(table, 9.21)).endswith("off, 9.2 times those of fast hardware")


def test_output_after_the_verdict_does_not_put_off_the_end(run):
    image = sector(phase(TOKEN, power=False), forever(say("still here\r\n"), wait_ticks(2)))
    went = run(image, limits=Limits(10, 5, poweroff_s=1))
    failed(went, "no-poweroff", f"{STAYED_ON} at step 'one'")


# ---- no verdict


def test_powers_off_silently(run):
    failed(
        run(sector(power_off())),
        "no-verdict",
        "the guest powered off before its script began, without a verdict",
        last="",
    )


def test_powers_off_in_the_middle(run):
    failed(
        run(sector(phase(TOKEN, verdict=None))),
        "no-verdict",
        "the guest powered off after it began, without a verdict at step 'one'",
        last="",
    )


@pytest.mark.parametrize("end", [reboot(), triple_fault()], ids=["reboot", "triple fault"])
def test_reboots(end: bytes, run):
    failed(
        run(sector(phase(TOKEN, verdict=None, power=False), end)),
        "reset",
        "the guest rebooted without a verdict at step 'one'",
    )


def test_reboots_after_its_verdict(run):
    went = run(sector(phase(TOKEN, power=False), reboot()))
    failed(went, "reset", "the guest rebooted instead of powering off at step 'one'")


@pytest.mark.parametrize("how", ["idle", "dead", "busy"])
def test_hangs(how: str, run):
    went = run(
        sector(phase(TOKEN, verdict=None, power=False), hang(how)), limits=Limits(10, silence_s=1.5, poweroff_s=60)
    )
    failed(went, "silence", "the console was silent for 1.5 s at step 'one'", last="")
    assert went.took_s < 5


def test_talks_for_ever(run):
    went = run(sector(forever(say("working\r\n"), wait_ticks(3))), limits=Limits(total_s=2, silence_s=5, poweroff_s=60))
    failed(went, "timeout", "the guest did not finish within 2.0 s")
    assert went.error.console[:3] == ("working",) * 3


def test_floods_the_console(run):
    went = run(sector(forever(say("x" * 300))), limits=Limits(total_s=2, silence_s=5, poweroff_s=60))
    failed(went, "timeout", "the guest did not finish within 2.0 s")


def test_the_account_shows_the_last_thirty_lines(run):
    image = sector(*(say(f"line {n}\r\n") for n in range(50)), phase(TOKEN, verdict="2"))
    console = run(image).error.console
    assert len(console) == 30
    assert console == tuple(f"line {n}" for n in range(20, 50))


# ---- what the console says


@pytest.mark.parametrize(
    ("text", "cause", "sentence"),
    [
        (
            "Kernel panic - not syncing: no init\r\n",
            "panic",
            "the guest panicked (Kernel panic - not syncing: no init)",
        ),
        ("OpenLoader\r\nboot: ", "loader", "the guest stopped at the boot loader's prompt"),
        ("Welcome\r\n\r\ntiny login: ", "login", "the guest booted to its login prompt"),
        ("Enter full path for single-user shell", "single-user", "the guest went to single-user mode"),
        ("\r\nmountroot> ", "mountroot", "the guest did not find its root"),
        ("Fatal trap\r\ndb> ", "debugger", "the guest stopped in its debugger"),
    ],
)
def test_words_of_failure(text: str, cause: str, sentence: str, run):
    went = run(sector(say(text), hang()))
    failed(went, cause, sentence, last=text.splitlines()[-1])
    assert went.took_s < 4


def test_a_panic_while_the_script_runs(run):
    went = run(
        sector(
            phase(TOKEN, verdict=None, power=False), say("panic: page fault\r\n"), say("trace 1\r\ntrace 2\r\n"), hang()
        )
    )
    failed(went, "panic", "the guest panicked (panic: page fault) at step 'one'", last="trace 2")


def test_a_panic_device_tells_too(run):
    image = sector(say("before\r\n"), b"\xba\x05\x05\xb0\x01\xee", hang())  # mov dx, 0x505; mov al, 1; out dx, al
    failed(run(image), "panic", "the guest's kernel panicked", last="before")


def test_nothing_to_boot_from(run):
    went = run(b"", limits=Limits(12, 11, poweroff_s=60))
    failed(went, "loader", "the firmware found nothing to boot from", last="")


def test_nothing_to_boot_from_although_a_dialogue_is_waited_for(run):
    went = run(b"", limits=Limits(12, 11, poweroff_s=60), talk=[Exchange(expect="OK ", send="x", timeout_s=10)])
    failed(went, "loader", "the firmware found nothing to boot from")


# ---- dialogues


def test_a_dialogue_is_answered_line_by_line(run):
    went = run(sector(LOADER, phase(TOKEN)), talk=TALK)
    assert went.error is None
    assert went.log.count("OK set console=comconsole") == went.log.count("OK boot") == 1
    assert "unknown command" not in went.log


def test_a_prompt_that_comes_late(run):
    assert run(sector(wait_ticks(12), LOADER, phase(TOKEN)), talk=TALK).error is None


def test_a_prompt_that_never_comes(run):
    talk = [Exchange(expect="(?m)^OK $", send="boot\r", timeout_s=3)]
    went = run(sector(say("other prompt> "), hang()), talk=talk)
    assert went.error.cause == "dialogue"
    assert went.error.message.endswith(" s for '(?m)^OK $', which did not come")
    assert went.error.console == ("other prompt> ",)
    assert 3 < went.took_s < 30


def test_the_time_for_a_prompt_is_scaled(run):
    talk = [Exchange(expect="OK ", send="boot\r", timeout_s=1)]
    image = sector(wait_ticks(24), ask("OK ", "boot"), phase(TOKEN))
    assert run(image, talk=talk, limits=Limits(10, 10, factor=6, poweroff_s=60)).error is None


def test_a_prompt_in_an_endless_stream_does_not_come_either(run):
    talk = [Exchange(expect="OK ", send="boot\r", timeout_s=1)]
    went = run(sector(forever(say("working\r\n"), wait_ticks(2))), talk=talk)
    assert went.error.cause == "dialogue"


def test_words_of_failure_in_a_dialogue_are_part_of_it(run):
    talk = [Exchange(expect="boot: $", send="single-user\r", timeout_s=5)]
    assert run(sector(ask("boot: ", "single-user"), phase(TOKEN)), talk=talk).error is None


def test_a_panic_in_the_middle_of_a_dialogue(run):
    went = run(sector(say("Booting in 9 seconds\r\n"), wait_key("9"), say("panic: no memory\r\n"), hang()), talk=TALK)
    failed(went, "panic", "the guest panicked (panic: no memory)", last="panic: no memory")


def test_the_guest_powers_off_in_the_middle_of_a_dialogue(run):
    went = run(sector(say("Booting in 9 seconds\r\n"), wait_key("9"), power_off()), talk=TALK)
    failed(went, "dialogue", "the guest powered off while the boot dialogue waited for '(?m)^OK $'")
