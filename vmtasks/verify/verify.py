"""Verify a guest on real media, from download to removal, and report: for guests that few have run."""

import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from vmtasks import __version__
from vmtasks.config.load import Config, show_size
from vmtasks.config.tables import Download
from vmtasks.errors import CommandTimeoutError, StateError, VmTasksError, finally_do
from vmtasks.guest.link import Link
from vmtasks.host import files, process
from vmtasks.host.progress import Say, seconds
from vmtasks.images.steps import Builder
from vmtasks.installer.download.fetch import sums
from vmtasks.installer.download.want import release
from vmtasks.machines import Machine, life
from vmtasks.qemu import argv, vm
from vmtasks.qemu.console import Transcript
from vmtasks.suites.results import Results, describe
from vmtasks.suites.run import Suites
from vmtasks.verify.findings import Findings, Stage, markdown

COMMAND_S = 60.0
BUTTON_S = 60.0
LOG_BYTES = 8 << 20
MORE_BYTES = 1 << 20
NAME = "verify"


class Verification:
    """One verification: everything is built again, in a state folder and a machine of its own."""

    def __init__(self, config: Config, note: Say) -> None:
        """`config` is the project's; only its guest, sizes, suites and store are used."""
        own: dict[str, Any] = {"vm_dir": config.vm_dir / NAME, "name": NAME, "ssh_port": None}
        # Images are named by what they are made from. Either of these keeps those of the project from being replaced.
        if "observe" in config.vars:
            own["vars"] = {**config.vars, "observe": True}
        else:
            own["disk_size"] = config.disk_size + MORE_BYTES
        self.config = msgspec.structs.replace(config, **own)
        self.report = config.vm_dir / "report.md"
        self.builder = Builder(self.config)
        self.machine = Machine(self.config)
        self.findings = Findings()
        self.note = note
        self._began = time.time()
        self._stopped = False

    def run(self, *, allow_unverified: bool = False) -> Findings:
        """Run all stages and write the report after each, so that a killed run leaves one too.

        A stage that fails ends the ones that build on it; the rest of the questions is still asked.
        """
        self._describe_host()
        numbers = range(1, len(self.config.guest.phases) + 1)
        with finally_do(self._finish, "the report could not be finished"):
            self._stage("fetch", lambda: self._fetch(allow_unverified=allow_unverified))
            for number in numbers:
                self._stage(self.builder.phase(number).name, partial(self._phase, number))
            self._stage("snapshot", self.builder.snapshot)
            self._stage("start", self._start)
            self._stage("questions", self._ask, essential=False)
            self._stage("sync, build and quick suites", self._suites, essential=False)
            self._stage("stop", self._stop)
            self._stage("power button", self._button, essential=False)
            self._stage("restore", self._restore)
        return self.findings

    def _finish(self) -> None:
        self._answer_sums()
        self._destroy()
        self._write()

    # -- stages; what they return is noted

    def _stage(self, name: str, action: Callable[[], str | None], *, essential: bool = True) -> None:
        if self._stopped:
            self.findings.stages.append(Stage(name, "not reached"))
            return
        began = time.monotonic()
        try:
            noted = action() or ""
        except VmTasksError as error:
            self.findings.stages.append(Stage(name, "failed", time.monotonic() - began, str(error)))
            self.note(f"verify_guest: {name} failed: {error.message}")
            self._stopped = essential
        except BaseException:
            self.findings.stages.append(Stage(name, "failed", time.monotonic() - began, "interrupted"))
            raise
        else:
            took = time.monotonic() - began
            self.findings.stages.append(Stage(name, "passed", took, noted))
            self.note(f"verify_guest: {name} passed in {seconds(took)}{f': {noted}' if noted else ''}")
        finally:
            self._read_consoles()
            self._write()

    def _fetch(self, *, allow_unverified: bool) -> str:
        self.builder.fetch(allow_unverified=allow_unverified)
        media = self.builder.media()
        self.findings.guest |= {
            "guest": self.config.label,
            "installer": f"{media.size} bytes, sha256 {media.sha256}",
            "held against": media.verified or "nothing",
        }
        return f"held against {media.verified or 'nothing'}"

    def _phase(self, number: int) -> str:
        self.builder.render(number)
        self.builder.phase_iso(number)
        self.builder.build(number, anew=True)
        named = self.builder.phase_record(number)
        image = self.builder.store.record(named.digest, named.sha256)
        return f"image of {image.size >> 20} MiB, {len(image.host_keys)} host keys" if image else ""

    def _start(self) -> str:
        self.machine.start()
        record = self.machine.place.record()
        self.findings.guest |= {"user": self.config.guest.ssh.user, "memory": show_size(self.config.memory)}
        return f"{record.cpus} CPU, {record.accel}" if record else ""

    def _ask(self) -> str:
        """Put the questions that the installed machine answers."""
        asked = [question for question in self.config.guest.questions if question.command]
        with self.machine.link() as link:
            for question in asked:
                self.findings.answers[question.asks] = self._put(link, question.command)
        return f"{len(asked)} put to the machine"

    def _put(self, link: Link, command: str) -> list[str]:
        """What a command in the machine, run as root, says; and its status, unless that is 0."""
        limit_s = COMMAND_S * self._factor
        try:
            done = link.execute(f"{{ {command}\n}} 2>&1", cwd="/", user="root", timeout_s=limit_s)
        except CommandTimeoutError as error:
            return [*error.stdout.decode(errors="replace").splitlines(), f"({error.message})"]
        status = [f"(status {done.status})"] if done.status else []
        return [*done.stdout.decode(errors="replace").splitlines(), *status]

    def _suites(self) -> str:
        results = Results(self.config)
        suites = Suites(results, self.note)
        suites.sync()
        with (self.config.vm_dir / "build.log").open("wb") as log:

            def keep(data: bytes) -> None:
                log.write(data)

            suites.build(keep)
        told = []
        for name in self.config.quick:
            record = suites.run(name, lambda _: None)
            told.append(f"{name}: {describe(record)}")
            if record.status:
                raise StateError(f"suite {name}: {describe(record)}", log=results.folder / name / "output.log")
        return "; ".join(told)

    def _stop(self) -> str:
        return f"by {self.machine.stop()}"

    def _button(self) -> str:
        """Press the ACPI power button of the running machine; whether that ends it answers a question."""
        self.machine.start()
        record = self.machine.place.record()
        vm.control(self.machine.place.qmp, "system_powerdown")()
        limit_s, began = BUTTON_S * self._factor, time.monotonic()
        ended = vm.wait_until(lambda: record is None or self.machine.place.pid(record) is None, limit_s)
        took = time.monotonic() - began
        said = f"powered itself off {took:.1f} s after" if ended else f"was still running {took:.0f} s after"
        self._answer("power-button", [f"The guest {said} the button was pressed."])
        self.machine.stop()
        if not ended:
            raise StateError(f"the guest {said} the power button was pressed")
        return said

    def _restore(self) -> str:
        image = self.machine.restore()
        self.machine.start()
        self.machine.stop()
        return f"to {image.digest[:12]}, and it started"

    # -- what the host knows

    @property
    def _factor(self) -> float:
        return self.builder.accel.factor

    def _describe_host(self) -> None:
        accel = self.builder.accel
        version = process.run([argv.PROGRAM, "--version"], timeout_s=30, check=False).stdout.partition("\n")[0]
        self.findings.host |= {
            "vmtasks": __version__,
            "QEMU": version,
            "accelerator": f"{accel.name}, deadlines times {accel.factor:.1f} ({accel.reason})",
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "Python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        }

    def _answer_sums(self) -> None:
        """Lines of the published list of sums that are about this guest's installers."""
        made = self.config.guest.installer
        if not isinstance(made, Download) or not any(q.host == "sums" for q in self.config.guest.questions):
            return
        try:
            text, _ = sums(release(made, self.config.version, os.environ))
        except VmTasksError as error:
            self._answer("sums", [error.message])
            return
        stem = made.file.partition("{version}")[0]
        self._answer("sums", [line for line in text.splitlines() if stem in line] or ["none of its lines names one"])

    def _answer(self, host: str, lines: list[str]) -> None:
        for question in self.config.guest.questions:
            if question.host == host:
                self.findings.answers[question.asks] = lines

    def _read_consoles(self) -> None:
        for number in range(1, len(self.config.guest.phases) + 1):
            self._read_console(self.builder.phase(number).name, self.builder.log(number))
        self._read_console("machine", self.machine.place.console_log)

    def _read_console(self, name: str, log: Path) -> None:
        """Only of boots of this verification: the folder may be an older one's."""
        if log.is_file() and log.stat().st_mtime >= self._began:
            transcript = Transcript(keep=None)
            transcript.feed(log.read_bytes()[:LOG_BYTES])
            self.findings.consoles[name] = [line for line in transcript.lines if line.strip()]

    def _destroy(self) -> None:
        try:
            life.destroy(self.machine.place)
        except VmTasksError as error:
            self.note(f"verify_guest: the machine could not be removed: {error.message}")

    def _write(self) -> None:
        title = f"Verification of {self.config.label}"
        self.report.parent.mkdir(parents=True, exist_ok=True)
        files.write(self.report, markdown(title, self.findings, self.config.guest.questions))
