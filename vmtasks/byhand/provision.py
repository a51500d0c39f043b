"""Run a phase's script on a running machine, over SSH."""

import io
import re
import secrets
import tarfile
from collections.abc import Iterable
from pathlib import Path

from vmtasks.config.load import Config
from vmtasks.errors import CommandTimeoutError, ConfigError, ConnectionLostError, PhaseError, SshError, finally_do
from vmtasks.guest import connect
from vmtasks.guest.link import Link
from vmtasks.host import progress
from vmtasks.host.locks import lock
from vmtasks.images.steps import Builder
from vmtasks.machines import Machine, life
from vmtasks.machines.folder import Place
from vmtasks.media import template
from vmtasks.media.tree import Entry
from vmtasks.qemu.console import ScriptReport

SEND_S = 600.0
LEFT_OUT = {"pfi.conf", "poweroff", "run.sh"}
"""Files that only a boot from the phase's CD uses."""
WRAPPER = "provision.sh"


def provision(config: Config, number: int = 0) -> Path:
    """Run the script of phase `number` (0: the last one) as root on the configured machine. Returns the log's path.

    The machine goes on running; what is to be kept of it must be saved as a snapshot. PhaseError with the step, the
    status and the last lines when the script fails or does not end in time; SshError when the connection is lost.
    """
    phases = config.guest.phases
    if not 0 <= number <= len(phases):
        raise ConfigError(f"there is no phase {number}", hint=f"{config.guest.name} has phases 1 to {len(phases)}")
    number, place = number or len(phases), Place(config)
    # First: whatever the script does, its machine is another one now.
    life.update_record(place, changed=secrets.token_hex(8))
    name = phases[number - 1].name
    log = place.folder / f"provision-{name}.log"
    what = f"provision {place.name}: phase {name}"
    held = lock(
        place.folder.with_name(f".{place.name}.provision.lock"),
        what,
        timeout_s=phases[number - 1].timeout_s,
        waiting=lambda holder: progress.say(f"{what}: {holder} is at work on it; waiting"),
    )
    with held, progress.step(what) as step:
        builder = Builder(config)
        record = place.record()
        private = place.target(record).key if record else builder.key
        made = builder.render_files(number, builder.read(number), builder.public_line(private))
        step.now("send the script")
        said = ScriptReport(secrets.token_hex(8), step.now)
        timeout_s = phases[number - 1].timeout_s * builder.accel.factor
        with Machine(config).link() as link:
            folder = _send(link, _archive(builder.iso_entries(number, made)))
            with finally_do(lambda: _remove(link, folder), f"{folder} in the guest could not be removed"):
                end = _run(link, folder, said, log, timeout_s)
        _judge(what, said, end, log)
        _learn(place, said.host_keys)
    return log


def _archive(entries: Iterable[Entry]) -> bytes:
    """The phase's files, its packages and the wrapper, as a tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        files = {entry.path: (entry.mode, entry.read()) for entry in entries}
        files[WRAPPER] = (0o555, template.shipped(WRAPPER).encode())
        for name, (mode, data) in sorted(files.items()):
            if name in LEFT_OUT:
                continue
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _send(link: Link, archive: bytes) -> str:
    """Unpack the archive in a folder of its own in the guest; returns that folder."""
    text = (
        'umask 077; folder=$(mktemp -d /tmp/vmtasks.XXXXXX) && cd "$folder" && tar -xf - && printf \'%s\\n\' "$folder"'
    )
    done = link.execute(text, stdin=archive, timeout_s=SEND_S)
    said = done.stdout.decode(errors="replace").split()
    if done.status or not said or not re.fullmatch(r"/tmp/vmtasks\.\w+", said[-1]):  # noqa: S108 - in the guest
        why = done.stderr.decode(errors="replace").strip() or " ".join(said) or "nothing"
        raise SshError(f"the script could not be sent to {link.target.name}: it answered {why}", hint="doit status")
    return said[-1]


def _run(link: Link, folder: str, said: ScriptReport, log: Path, timeout_s: float) -> tuple[str, str]:
    """Run the wrapper as root; returns what ended it, should it have given no verdict: a cause and a few words."""
    env = {"VMTASKS_MEDIA": folder, "VMTASKS_TOKEN": said.token}
    text = f"exec /bin/sh {folder}/{WRAPPER} 2>&1"
    with log.open("wb") as record:

        def both(data: bytes, _: object) -> None:
            record.write(data)
            record.flush()
            said.feed(data)

        try:
            done = link.execute(text, cwd="/", env=env, user="root", timeout_s=timeout_s, on_data=both, keep=False)
        except CommandTimeoutError as error:
            then = error.message.rpartition("; ")[2]  # whether it could be ended
            return "timeout", f"the script did not end within {progress.seconds(timeout_s)}; {then}"
        except ConnectionLostError:
            return "lost", "the connection was lost"
    return "no-verdict", f"the script ended with {done.status} and without a verdict"


def _judge(what: str, said: ScriptReport, end: tuple[str, str], log: Path) -> None:
    """Raise the failure, with its cause, unless the script ended with 0. `end` is what _run() returns."""
    if said.status == 0:
        return
    cause, told = end
    where, tail = said.at_step, said.transcript.tail()
    if said.status is not None and cause != "timeout":  # at the deadline the script is ended, and says so
        cause, told = "verdict", said.exit_text
    if cause == "lost":
        told = f"{what}: {told}{where}; how the script ended is not known"
        raise SshError(told, log=log, console=tail, hint="doit status")
    raise PhaseError(f"{what}: {told}{where}", cause=cause, log=log, console=tail, hint="doit ssh")


def _remove(link: Link, folder: str) -> None:
    link.execute(["rm", "-rf", folder], cwd="/", user="root", timeout_s=60)


def _learn(place: Place, host_keys: list[str]) -> None:
    """Record the host keys that the phase reported, and log in from now on as the user that it has made."""
    record, user = place.record(), place.config.guest.ssh.user
    if record is None:
        return
    if host_keys and sorted(host_keys) != sorted(record.host_keys):
        if not connect.is_ready(life.update_record(place, host_keys=host_keys)):
            # The server still shows the old key: it reads the new one when it starts.
            both = [*host_keys, *(key for key in record.host_keys if key not in host_keys)]
            life.update_record(place, host_keys=both)
        progress.say(f"machine {place.name}: its host key has changed, as the phase reported")
    if record.ssh_user != user and connect.is_ready(life.update_record(place, ssh_user=user)):
        progress.say(f"machine {place.name}: logins are as {user} from now on")
    elif record.ssh_user != user:
        life.update_record(place, ssh_user=record.ssh_user)
