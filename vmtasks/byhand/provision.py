"""Run a phase's script on a machine that runs, over SSH: what a phase does at its boot, without a boot."""

import io
import re
import secrets
import shlex
import tarfile
from pathlib import Path

from vmtasks.config.load import Config
from vmtasks.errors import CommandError, ConfigError, PhaseError, SshError, finally_do
from vmtasks.guest import ssh
from vmtasks.host import process, progress
from vmtasks.host.locks import lock
from vmtasks.images.steps import Builder
from vmtasks.machines import life
from vmtasks.machines.folder import Place
from vmtasks.media import template
from vmtasks.qemu.console import Account

SEND_S = 600.0
LEFT_OUT = {"pfi.conf", "poweroff", "run.sh"}
"""What only a boot from the phase's CD has a use for."""
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
        builder.render(number)
        step.now("send the script")
        target = life.require_running(place)
        folder = _send(target, _archive(builder, number))
        with finally_do(lambda: _remove(target, folder), f"{folder} in the guest could not be removed"):
            said = Account(secrets.token_hex(8), step.now)
            timeout_s = phases[number - 1].timeout_s * builder.accel.factor
            ended = _run(target, folder, said, log, timeout_s)
        _judge(what, said, ended, log, timeout_s)
        _learn(place, said.host_keys)
    return log


def _archive(state: Builder, number: int) -> bytes:
    """The phase's files, its packages and the wrapper, as a tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        files = {name: (mode, path.read_bytes()) for name, (mode, path) in state.sources(number).items()}
        files[WRAPPER] = (0o555, template.shipped(WRAPPER).encode())
        for name, (mode, data) in sorted(files.items()):
            if name in LEFT_OUT:
                continue
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _send(target: ssh.Target, archive: bytes) -> str:
    """Unpack the archive in a folder of its own in the guest; returns that folder."""
    text = (
        'umask 077; folder=$(mktemp -d /tmp/vmtasks.XXXXXX) && cd "$folder" && tar -xf - && printf \'%s\\n\' "$folder"'
    )
    try:
        said = process.run(target.argv(ssh.remote_line(text)), timeout_s=SEND_S, stdin=archive).stdout.split()
    except CommandError as error:
        raise SshError(f"the script could not be sent to {target.name}: {error.message}", hint="doit status") from None
    if not said or not re.fullmatch(r"/tmp/vmtasks\.\w+", said[-1]):  # noqa: S108 - in the guest
        raise SshError(f"the script could not be sent to {target.name}: it answered {' '.join(said) or 'nothing'}")
    return said[-1]


def _run(target: ssh.Target, folder: str, said: Account, log: Path, timeout_s: float) -> process.Ended:
    """Run the wrapper as root to its end or the deadline; returns how ssh ended."""
    env = {"VMTASKS_MEDIA": folder, "VMTASKS_TOKEN": said.token}
    pidfile = f"{folder}/pid"
    text = ssh.script(f"exec /bin/sh {folder}/{WRAPPER}", cwd="/", env=env, user="root", pidfile=pidfile)
    with log.open("wb") as record:

        def both(data: bytes) -> None:
            record.write(data)
            record.flush()
            said.feed(data)

        return ssh.execute(target, text, both, timeout_s=timeout_s, at_deadline=ssh.end_script(pidfile, "root"))


def _remove(target: ssh.Target, folder: str) -> None:
    text = ssh.script(f"rm -rf {shlex.quote(folder)}", cwd="/", env={}, user="root")
    process.run(target.argv(ssh.remote_line(text)), timeout_s=60, check=False)


def _judge(what: str, said: Account, ended: process.Ended, log: Path, timeout_s: float) -> None:
    """Nothing when the script said 0; otherwise the failure, with its cause."""
    if said.status == 0:
        return
    where, tail, hint = said.where, said.transcript.tail(), "doit ssh"
    if said.status is not None:
        told = f"{what}: {said.verdict}{where}"
        raise PhaseError(told, cause="verdict", log=log, console=tail, hint=hint)
    if ended.timed_out:
        told = f"{what}: the script did not end within {progress.seconds(timeout_s)} and was ended{where}"
        raise PhaseError(told, cause="timeout", log=log, console=tail, hint=hint)
    if ended.status == ssh.FAILED:
        told = f"{what}: the connection was lost{where}; how the script ended is not known"
        raise SshError(told, log=log, console=tail, hint="doit status")
    told = f"{what}: the script ended with {ended.status} and without a verdict{where}"
    raise PhaseError(told, cause="no-verdict", log=log, console=tail, hint=hint)


def _learn(place: Place, host_keys: list[str]) -> None:
    """Heed the host keys that the phase reported, and log in from now on as the user that it has made."""
    record, user = place.record(), place.config.guest.ssh.user
    if record is None:
        return
    if host_keys and sorted(host_keys) != sorted(record.host_keys):
        if not ssh.is_ready(life.update_record(place, host_keys=host_keys)):
            # The server still shows the old key: it reads the new one when it starts.
            both = [*host_keys, *(key for key in record.host_keys if key not in host_keys)]
            life.update_record(place, host_keys=both)
        progress.say(f"machine {place.name}: its host key has changed, as the phase reported")
    if record.ssh_user != user and ssh.is_ready(life.update_record(place, ssh_user=user)):
        progress.say(f"machine {place.name}: logins are as {user} from now on")
    elif record.ssh_user != user:
        life.update_record(place, ssh_user=record.ssh_user)
