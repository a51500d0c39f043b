"""OpenSSH to a machine, for people, rsync and scp: its configuration, shared connection, and session commands.

Host keys are pinned from the image's record and checked strictly. Our own commands go through connect.py.
"""

import functools
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmtasks.errors import SshError
from vmtasks.guest import banner
from vmtasks.host import files, process, progress
from vmtasks.host.locks import lock

FAILED = 255
"""The exit status of ssh when it could not connect or lost the connection; see ssh(1)."""

Console = Callable[[], Sequence[str]]
"""Returns the console's last lines, for errors."""

CONNECT_S = 10
KEEPALIVE_S = 15.0
SHARE_S = 60
KEX = "curve25519-sha256,curve25519-sha256@libssh.org"
LINE_BYTES = 8000
"""The maximum command line; longer ones are sent as files. dropbear accepts 9000 bytes: MAX_CMD_LEN, sysoptions.h."""
SCRIPTS = ".vmtasks/scripts"
"""Below the login user's home: scripts about to be run."""

END_MARKED = r"""
if [ -r /proc/self/stat ]; then
    found=
    for file in $(grep -ls "$mark" /proc/[0-9]*/cmdline); do
        pid=${file#/proc/} pid=${pid%/cmdline}
        [ "$pid" -gt 1 ] || continue
        read -r line <"/proc/$pid/stat" || continue
        line=${line##*")"}
        set -- $line
        if [ "$3" = "$pid" ]; then found="$found -$pid"; else found="$found $pid"; fi
    done
else
    found=$(ps -axww -o pid= -o pgid= -o command= | grep "$mark" | while read -r pid group rest; do
        if [ "$pid" -le 1 ]; then continue; elif [ "$pid" = "$group" ]; then echo "-$pid"; else echo "$pid"; fi
    done)
fi 2>/dev/null
[ -n "$found" ] || exit 0
some() { for one in $found; do kill -$1 $one 2>/dev/null && some=0; done; return ${some:-1}; }
some TERM
n=0
while some= && some 0 && [ $n -lt 10 ]; do sleep 0.2 2>/dev/null || sleep 1; n=$((n + 1)); done
some KILL
exit 0
"""


@dataclass(frozen=True)
class Target:
    """A machine as ssh sees it. `folder`, short and private, holds config, known hosts and the shared connection."""

    name: str
    port: int
    user: str
    key: Path
    host_keys: tuple[str, ...]
    folder: Path
    extra_keys: tuple[Path, ...] = ()
    """Further private keys to try while the machine's key is being changed."""

    @property
    def config(self) -> Path:
        """The file for `ssh -F`."""
        return self.folder / "ssh_config"

    @property
    def control(self) -> Path:
        """The control socket that all sessions of this user share."""
        return self.folder / f"ssh-{self.user}"

    def argv(self, *words: str, options: Sequence[str] = ()) -> list[str]:
        """`ssh -F config [options] name [words]`."""
        return ["ssh", "-F", str(self.config), *options, self.name, *words]

    def scp(self, source: str, dest: str) -> list[str]:
        """The argv of scp that copies a file or folder with modes and times; one side begins with `name:`."""
        return ["scp", "-F", str(self.config), "-q", "-r", "-p", "--", source, dest]


def write_config(target: Target) -> None:
    """Write the OpenSSH configuration and known_hosts of a machine; rsync, scp, git and editors use it too."""
    known = target.folder / "known_hosts"
    files.write_if_changed(known, "".join(f"{target.name} {key}\n" for key in target.host_keys), 0o600)
    lines = [
        f"Host {target.name}",
        f"    HostName {banner.HOST}",
        f"    Port {target.port}",
        f"    User {target.user}",
        *(f"    IdentityFile {_quoted(key)}" for key in (target.key, *target.extra_keys)),
        "    IdentitiesOnly yes",
        f"    HostKeyAlias {target.name}",
        "    StrictHostKeyChecking yes",
        f"    UserKnownHostsFile {_quoted(known)}",
        "    GlobalKnownHostsFile /dev/null",
        *kex_lines(),
        "    BatchMode yes",
        "    PasswordAuthentication no",
        "    KbdInteractiveAuthentication no",
        f"    ConnectTimeout {CONNECT_S}",
        "    ServerAliveInterval 15",
        "    ServerAliveCountMax 4",
        "    ControlMaster auto",
        f'    ControlPath {_quoted(target.folder / "ssh")[:-1]}-%r"',  # one connection per user
        "    ControlPersist 60",
        "    LogLevel ERROR",
    ]
    files.write_if_changed(target.config, "\n".join(lines) + "\n", 0o600)


@functools.cache
def kex_lines() -> tuple[str, ...]:
    """The line that prefers curve25519, if this host's ssh has it: an emulated guest is slower with all others."""
    words = ["ssh", "-G", "-F", "/dev/null", "-o", f"KexAlgorithms=^{KEX}", banner.HOST]
    return (f"    KexAlgorithms ^{KEX}",) if process.run(words, timeout_s=CONNECT_S, check=False).status == 0 else ()


def scan_host_keys(
    port: int,
    *,
    timeout_s: float,
    alive: Callable[[], bool],
    network: Callable[[], bool | None] = banner.network_unknown,
) -> list[str]:
    """The host keys of the server behind a loopback port, as `type key`. SshError when none comes in time."""
    began = time.monotonic()
    while True:
        left_s = timeout_s - (time.monotonic() - began)
        stage = banner.wait(port, timeout_s=left_s, alive=alive, network=network)
        if not stage:
            scan = process.run(["ssh-keyscan", "-T", "5", "-p", str(port), banner.HOST], timeout_s=30, check=False)
            lines = [line.split() for line in scan.stdout.splitlines() if line and not line.startswith("#")]
            if lines:
                return sorted(" ".join(words[1:3]) for words in lines)
        if not alive():
            raise SshError("the machine ended while it was booting")
        if time.monotonic() - began > timeout_s:
            said = stage or "its SSH server answers"
            raise SshError(f"no SSH server showed a host key within {timeout_s:.0f} s: {said}")
        time.sleep(0.2)


def last_line(stderr: str) -> str:
    """The last line that ssh printed, unchanged."""
    return stderr.strip().splitlines()[-1] if stderr.strip() else "ssh gave no reason"


def run_attached(target: Target, argv: Sequence[str], *, stdin: bool = True, timeout_s: float | None = None) -> int:
    """Run ssh or scp on our streams over the shared connection; returns its status. See process.run_attached()."""
    shared = _ensure_shared(target)
    if shared.status == 0:
        return process.run_attached(argv, stdin=stdin, timeout_s=timeout_s)
    late = f"ssh: {target.name} did not accept the login within {SHARE_S} s\n" if shared.timed_out else ""
    progress.to_stderr(shared.stderr + late)
    return FAILED


def _ensure_shared(target: Target) -> process.Result:
    """Open the shared connection of this user unless it is open; returns ssh's result, status 0 if it is open now.

    One process at a time opens it. Of several that start at once, ssh makes each log in alone, with a message on
    stderr, and a server limits pending logins (dropbear to five from one address: MAX_UNAUTH_PER_IP).
    """
    check = target.argv(options=["-O", "check"])
    done = process.run(check, timeout_s=CONNECT_S, check=False)
    if done.status == 0:
        return done
    with lock(target.folder / "share.lock", f"the connection to {target.name}", timeout_s=SHARE_S):
        done = process.run(check, timeout_s=CONNECT_S, check=False)
        return done if done.status == 0 else process.run(target.argv(options=["-fN"]), timeout_s=SHARE_S, check=False)


def close(target: Target) -> None:
    """Close the shared connections of all users, dead ones too, so that waiting sessions fail now."""
    for shared in sorted(target.folder.glob("ssh-*")):
        path = f"ControlPath={_quoted(shared)}"
        process.run(target.argv(options=["-o", path, "-O", "exit"]), timeout_s=10, check=False)


def stop_sharing(target: Target) -> None:
    """Make new sessions log in again. Open sessions keep the current shared connection."""
    if target.control.exists():
        process.run(target.argv(options=["-O", "stop"]), timeout_s=10, check=False)
        target.control.unlink(missing_ok=True)


def script(command: str, *, cwd: str, env: Mapping[str, str], user: str = "") -> str:
    """A POSIX sh script that runs `command` in `cwd`, by default the current folder, with `env`, as `user`.

    `user` defaults to the login user. Another user is reached through doas, sudo or, from root, su.
    """
    return become(user, _prepared(command, cwd, env, home='"$0"'))


def _prepared(command: str, cwd: str, env: Mapping[str, str], home: str) -> str:
    """`command` with `cwd` and `env`; `home` is a shell word for the login user's home."""
    exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in env.items())
    place = shlex.quote(cwd) if cwd.startswith("/") else f"{home}/{shlex.quote(cwd)}"
    return f"{exports}{f'cd {place} && ' if cwd else ''}{{ {command}\n}}"


def end_group_script(group: int, user: str = "") -> str:
    """A script that ends a process group whose leader still runs: SIGTERM, up to 2 s, SIGKILL."""
    gone = "kill -0 -$group 2>/dev/null || exit 0"
    inner = f"group={group}; kill -TERM -$group 2>/dev/null; {gone}; sleep 1; {gone}; sleep 1; kill -KILL -$group"
    return become(user, inner + " 2>/dev/null; exit 0")


def session_argv(
    target: Target,
    mark: str,
    command: str,
    *,
    cwd: str = "",
    env: Mapping[str, str] | None = None,
    user: str = "",
    options: Sequence[str] = (),
    tty: bool = False,
) -> list[str]:
    """The argv of ssh that runs `command` as script() does; end_marked_script() ends its processes.

    A command too long for a command line is sent ahead, as a file that removes itself when it starts. SshError when
    that fails.
    """
    marked = f": {mark}\n{command}\nexit $?"
    text = script(marked, cwd=cwd, env=env or {}, user=user)
    line = session_line(text)
    if len(line) > LINE_BYTES:
        # Without another user the text is no argument, which Linux limits to 128 KiB.
        path = f"{SCRIPTS}/{mark}"
        _send(target, path, text if user else _prepared(marked, cwd, env or {}, home='"$HOME"'), options)
        line = session_line(f"exec /bin/sh {path}")
    return target.argv(line, options=[*options, *(["-tt"] if tty else [])])


def _send(target: Target, path: str, text: str, options: Sequence[str]) -> None:
    """Send a script to the guest that removes itself when it starts. SshError when that fails."""
    put = f'umask 077; mkdir -p {SCRIPTS} && printf %b "$(cat)" >{path}'
    line, stdin = remote_line(put), printf_escape(f"rm -f {path}\n{text}\n")
    sent = process.run(target.argv(line, options=options), timeout_s=SHARE_S, check=False, stdin=stdin)
    if sent.status != 0:
        raise SshError(
            f"{target.name}: the command is too long for a line, and its script could not be sent: "
            f"{last_line(sent.stderr)}"
        )


def session_line(text: str) -> str:
    """A command line for any login shell that runs `text` in its own process group, for end_marked_script().

    OpenSSH's server makes a group for each command, dropbear does not. Not every system has setsid.
    """
    run = 'eval "$(printf %b "$1")"'
    group = (
        'kill -0 -$$ 2>/dev/null || if command -v setsid >/dev/null 2>&1; then exec setsid /bin/sh -c "$2" sh "$1"; fi'
    )
    return f"""exec /bin/sh -c '{group}; eval "$2"' sh '{printf_escape(text)}' '{run}'"""


def end_marked_script(mark: str, user: str = "") -> str:
    """A script that ends the process groups whose leader has `mark` in its command line: SIGTERM, up to 2 s, SIGKILL.

    A process that does not lead its group is signalled alone: it may be in the server's group. `mark` must be unique,
    so that no other command line contains it.
    """
    if not re.fullmatch(r"vmtasks-[0-9a-f]{16}", mark):
        raise AssertionError(mark)
    return become(user, f"mark='[{mark[0]}]{mark[1:]}'\n{END_MARKED}")


def remote_line(text: str, program: str = "/bin/sh") -> str:
    """A command line that any login shell, csh included, passes to sh unchanged.

    csh allows neither a line break nor `!` in quotes, and some shells handle only ASCII. Such characters are escaped
    for printf's %b.
    """
    coded = printf_escape(text)
    if coded == text:
        return f"exec {program} -c '{text}' sh"
    return f"""exec {program} -c 'eval "$(printf %b "$1")"' sh '{coded}'"""


def printf_escape(text: str) -> str:
    """`text` as one line of ASCII without quotes and `!`, escaped for printf's %b."""
    return "".join(chr(b) if 32 <= b < 127 and b not in b"!'\\" else f"\\0{b:03o}" for b in os.fsencode(text))


def become(user: str, inner: str) -> str:
    """A script that execs `inner` as `user`, by default the login user; `$0` is the home."""
    word = shlex.quote(inner)
    home = '"$HOME"'
    if not user:
        return f"exec /bin/sh -c {word} {home}"
    name = shlex.quote(user)
    as_user = shlex.quote(remote_line(f"exec /bin/sh -c {word} {home}"))
    ways = [
        f'if [ "$(id -un)" = {name} ]; then exec /bin/sh -c {word} {home}',
        f"elif command -v doas >/dev/null 2>&1; then exec doas -n -u {name} /bin/sh -c {word} {home}",
        f"elif command -v sudo >/dev/null 2>&1; then exec sudo -n -u {name} /bin/sh -c {word} {home}",
        f'elif [ "$(id -u)" = 0 ]; then exec su -m {name} -c {as_user}',
        f"else echo 'the guest has neither doas nor sudo: cannot become '{name} >&2; exit 126; fi",
    ]
    return "\n".join(ways)


def _quoted(path: Path) -> str:
    """A path for ssh_config: in double quotes, with `%` doubled because ssh expands it."""
    text = os.fspath(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"'
