"""Boot a guest for one phase and judge how it went: the host's half of the phase contract.

A phase passes only if the guest's verdict is 0 and the guest powered itself off. Every failure has a cause.
"""

import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmtasks.config.tables import Exchange, FailureText, PhaseTable
from vmtasks.errors import MachineError, PhaseError
from vmtasks.host import files
from vmtasks.host.progress import seconds
from vmtasks.qemu.console import ScriptReport
from vmtasks.qemu.vm import Booted

CAUSES = (
    "verdict",  # the script exited with a status other than 0
    "no-verdict",  # powered off without a verdict
    "no-poweroff",  # gave its verdict and stayed on
    "reset",  # rebooted
    "panic",
    "loader",  # no boot loader, or back at its prompt
    "single-user",
    "debugger",
    "mountroot",
    "login",  # booted past the phase: PFI did not run the script
    "dialogue",  # the boot loader's prompt did not appear
    "silence",
    "timeout",
    "qemu-died",
    "host-disk",  # QEMU could not write the guest's disk: the host's is full, or broken
    "image",  # qemu-img check found damage
)

POLL_S = 0.1
ECHO_S = 1.0
"""Limit for an echo on fast hardware."""

PANIC_LINES_S = 1.0
WHILE_BOOTING = {"loader", "login", "mountroot", "single-user"}
"""Causes that are impossible once the script runs; its output may contain such words."""

NO_BOOT_DEVICE = ("No bootable device", "Boot failed: could not read the boot disk")
"""What SeaBIOS writes to its debug port before it gives up; source: src/boot.c."""


@dataclass(frozen=True)
class Limits:
    """Deadlines in seconds, already scaled for this host by `factor`. `poweroff_s`: from the verdict to the end."""

    total_s: float
    silence_s: float
    poweroff_s: float
    factor: float = 1.0

    @classmethod
    def of(cls, phase: PhaseTable, factor: float) -> "Limits":
        """The limits of a phase on a host that is `factor` times slower than fast hardware."""
        total_s, silence_s, poweroff_s = phase.timeout_s, phase.silence_timeout_s, phase.poweroff_timeout_s
        return cls(total_s * factor, silence_s * factor, poweroff_s * factor, factor)

    def __str__(self) -> str:
        """The limits, for messages."""
        slower = f", {self.factor:.1f} times those of fast hardware" if self.factor > 1 else ""
        return (
            f"limits {seconds(self.total_s)}, {seconds(self.silence_s)} without output, "
            f"{seconds(self.poweroff_s)} to power off{slower}"
        )

    def scaled(self, value_s: float) -> float:
        """Seconds on fast hardware, converted to seconds on this host."""
        return value_s * self.factor


@dataclass
class Phase:
    """One running phase: watches the guest, and raises PhaseError as soon as the phase has failed."""

    title: str
    booted: Booted
    limits: Limits
    dialogue: Sequence[Exchange]
    failures: Sequence[FailureText]
    firmware_log: Path
    said: ScriptReport
    shutdown_reason: str = ""
    _done: int = 0
    _typed: bool = False

    def run(self) -> list[str]:
        """Follow the guest until QEMU ends. Returns the host keys that it reported; PhaseError with the cause."""
        now = time.monotonic()
        self._started = self._last_output = self._last_exchange = now
        self._verdict_at = 0.0
        while self.booted.process.poll() is None:
            self._take(self.booted.serial.read(POLL_S))
            self._events()
            self._talk()
            self._watch_texts()
            self._watch_clock()
        self._drain()
        self._judge()
        return self.said.host_keys

    # -- input

    def _take(self, data: bytes) -> None:
        if not data:
            return
        self._last_output = time.monotonic()
        self.said.feed(data)
        if self.said.status is not None and not self._verdict_at:
            self._verdict_at = self._last_output

    def _events(self) -> None:
        for event in self.booted.control.events():
            if event["event"] == "SHUTDOWN":
                self.shutdown_reason = event.get("data", {}).get("reason", "")
            elif event["event"] == "GUEST_PANICKED":
                self._fail("panic", "the guest's kernel panicked", linger_s=PANIC_LINES_S)
            elif event["event"] == "BLOCK_IO_ERROR" and event["data"].get("action") == "stop":
                self._fail("host-disk", f"QEMU could not {_told(event['data'])}")

    def _talk(self) -> None:
        """Continue the boot dialogue: type an answer only after its prompt."""
        if self._done >= len(self.dialogue):
            return
        exchange = self.dialogue[self._done]
        before = self.dialogue[self._done - 1] if self._done else None
        if self.said.transcript.match(exchange.expect):
            self._done += 1
            self._type(exchange)
            self._last_exchange = time.monotonic()
        elif before is not None and before.again and self.said.transcript.match(before.expect):
            self._type(before)
        elif time.monotonic() - self._last_exchange > self.limits.scaled(exchange.timeout_s):
            waited = seconds(time.monotonic() - self._last_exchange)
            self._fail("dialogue", f"the boot dialogue waited {waited} for {exchange.expect!r}, which did not come")

    def _type(self, exchange: Exchange) -> None:
        """Type one answer; with `echo`, verify each character."""
        self._typed = True
        serial, line = self.booted.serial, exchange.send.removesuffix("\r")
        patience_s, timeout_s = self.limits.scaled(ECHO_S), self.limits.scaled(exchange.timeout_s)
        clean = not self.said.transcript.unmatched
        typing = (
            serial.type_line(line, clean=clean, patience_s=patience_s, timeout_s=timeout_s)
            if exchange.echo
            else serial.type(exchange.send)
        )
        try:
            for data in typing:
                self._take(data)
                if not data and self.booted.process.poll() is not None:
                    return
        except MachineError as error:
            self._fail("dialogue", f"the boot dialogue failed at the prompt {exchange.expect!r}: {error.message}")

    def _watch_texts(self) -> None:
        if self.said.status is not None:
            return
        if not self.said.transcript.lines and _holds(self.firmware_log, NO_BOOT_DEVICE):
            self._fail("loader", "the firmware found nothing to boot from")
        talking = self._done < len(self.dialogue) or self._echoing()
        for failure in self.failures:
            if (self.said.begun and failure.cause in WHILE_BOOTING) or (talking and failure.cause != "panic"):
                continue
            if self.said.transcript.match(failure.expect):
                self._fail(failure.cause, f"the guest {failure.says}", linger_s=PANIC_LINES_S)

    def _echoing(self) -> bool:
        """Whether the line of the last answer is unfinished: it may contain any word."""
        self._typed = self._typed and not self.said.transcript.match(r"\n")
        return self._typed

    def _watch_clock(self) -> None:
        now = time.monotonic()
        if self.said.status is not None:
            if now - self._verdict_at > self.limits.poweroff_s:
                if self.said.status != 0:
                    self._judge_verdict()
                waited = seconds(self.limits.poweroff_s)
                told = f"the guest said that all went well but did not power itself off within {waited}"
                self._fail("no-poweroff", told)
        elif now - self._started > self.limits.total_s:
            self._fail("timeout", f"the guest did not finish within {seconds(self.limits.total_s)}")
        elif now - self._last_output > self.limits.silence_s:
            self._fail("silence", f"the console was silent for {seconds(self.limits.silence_s)}")

    def _drain(self) -> None:
        """Read the rest of the console and of the events after QEMU has ended."""
        while data := self.booted.serial.read(0):
            self._take(data)
        self._events()

    # -- verdict

    def _judge(self) -> None:
        if self.shutdown_reason not in {"guest-shutdown", "guest-reset", "guest-panic"}:
            code = self.booted.process.returncode
            how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"status {code}"
            reason = f" ({self.shutdown_reason})" if self.shutdown_reason else ""
            self._fail("qemu-died", f"QEMU ended with {how}{reason} while the guest was running")
        if self.shutdown_reason == "guest-panic":
            self._fail("panic", "the guest's kernel panicked")
        if self.said.status is None:
            if self.shutdown_reason == "guest-reset":
                self._fail("reset", "the guest rebooted without a verdict")
            if self._done < len(self.dialogue) and not self.said.begun:
                expect = self.dialogue[self._done].expect
                self._fail("dialogue", f"the guest powered off while the boot dialogue waited for {expect!r}")
            told = "after it began" if self.said.begun else "before its script began"
            self._fail("no-verdict", f"the guest powered off {told}, without a verdict")
        self._judge_verdict()
        if self.shutdown_reason == "guest-reset":
            self._fail("reset", "the guest rebooted instead of powering off")

    def _judge_verdict(self) -> None:
        if self.said.status:
            self._fail("verdict", self.said.exit_text)

    def _reason(self) -> str:
        """The kernel's reason for its panic; the trace after it may have scrolled it out of the tail."""
        texts = [failure.expect for failure in self.failures if failure.cause == "panic"]
        said = next((line for line in self.said.transcript.lines if any(re.search(text, line) for text in texts)), "")
        plain = re.sub(r"^\[ *[0-9.]+\] ", "", said).strip()
        return f" ({plain})" if plain else ""

    def _fail(self, cause: str, sentence: str, *, linger_s: float = 0.0) -> None:
        """Raise PhaseError; first read the console for `linger_s` more."""
        until = time.monotonic() + linger_s
        while linger_s and (left := until - time.monotonic()) > 0 and self.booted.process.poll() is None:
            self._take(self.booted.serial.read(left))
        if cause == "panic":
            sentence += self._reason()
        raise PhaseError(
            f"{self.title}: {sentence}{self.said.at_step}", cause=cause, console=self.said.transcript.tail()
        )


def _told(error: dict[str, Any]) -> str:
    """QEMU's BLOCK_IO_ERROR in words."""
    why = "no space left on this host" if error.get("nospace") else error.get("reason", "I/O error")
    return f"{error.get('operation', 'use')} the guest's disk: {why}"


def _holds(path: Path, texts: Sequence[str]) -> bool:
    try:
        with files.opened(path) as file:
            content = file.read().decode(errors="replace")
    except OSError:
        return False
    return any(text in content for text in texts)
