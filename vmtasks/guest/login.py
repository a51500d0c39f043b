"""Log in with paramiko: TCP, banner, key exchange with host key check, authentication.

Each step has an error of its own, because each has another cause and another remedy.
"""

import socket
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import paramiko

from vmtasks.config.arguments import public_key
from vmtasks.errors import AuthFailedError, BannerError, ConnectRefusedError, ConnectTimeoutError, HostKeyError
from vmtasks.guest.banner import HOST
from vmtasks.guest.ssh import KEX, Target
from vmtasks.guest.transport import Transport
from vmtasks.host import files

RSA = ("rsa-sha2-512", "rsa-sha2-256")


def open_transport(target: Target, deadline: float) -> Transport:
    """Log in to a machine, once, before the monotonic time `deadline`.

    ConnectRefusedError, BannerError, HostKeyError, AuthFailedError or ConnectTimeoutError; nothing stays open then.
    """
    transport = None
    sock = _tcp(target, deadline)
    try:
        _banner(target, sock, deadline)
        transport = Transport(sock)
        _negotiate(target, transport, deadline)
        _log_in(target, transport, deadline)
    except BaseException:
        if transport is not None:
            transport.close()
        sock.close()
        raise
    return transport


def _tcp(target: Target, deadline: float) -> socket.socket:
    where = f"port {target.port} of {HOST}"
    try:
        sock = socket.create_connection((HOST, target.port), timeout=max(0.1, deadline - time.monotonic()))
    except TimeoutError:
        raise ConnectTimeoutError(f"{target.name}: {where} did not answer in time") from None
    except OSError as error:
        raise ConnectRefusedError(
            f"{target.name}: {where} refused the connection ({error.strerror})", hint="is the machine running?"
        ) from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each small request waits for the previous one
    return sock


def _banner(target: Target, sock: socket.socket, deadline: float) -> None:
    """Wait for the server's first byte. QEMU accepts the connection even while the guest's CPU is stopped."""
    sock.settimeout(max(0.1, deadline - time.monotonic()))
    try:
        first = sock.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        raise BannerError(
            f"{target.name}: the port is open, but nothing behind it spoke",
            hint="the guest is still booting, or paused, or hangs",
        ) from None
    except OSError:
        first = b""
    if not first:
        raise BannerError(
            f"{target.name}: the connection was closed before a server answered",
            hint="the guest's SSH server is not up yet, or was stopped",
        )


def _negotiate(target: Target, transport: paramiko.Transport, deadline: float) -> None:
    """Exchange keys, and check the host key against the pinned ones, before anything of ours is sent."""
    pinned = {tuple(line.split()[:2]) for line in target.host_keys}
    if not pinned:
        raise HostKeyError(f"{target.name}: no host key is recorded for it", hint="its record was written without one")
    first = [name for kind, _ in sorted(pinned) for name in (RSA if kind == "ssh-rsa" else (kind,))]
    options = transport.get_security_options()
    options.key_types = _prioritized(first, options.key_types)
    options.kex = _prioritized(KEX.split(","), options.kex)
    event = threading.Event()
    left = max(0.1, deadline - time.monotonic())
    transport.banner_timeout = transport.handshake_timeout = left + 1
    transport.start_client(event=event)
    if not event.wait(left):
        raise ConnectTimeoutError(f"{target.name}: the key exchange did not finish in time")
    if not transport.is_active():
        why = transport.get_exception() or "it closed the connection"
        raise BannerError(f"{target.name}: the server broke off the key exchange: {describe(why)}")
    key = transport.get_remote_server_key()
    if (key.get_name(), key.get_base64()) not in pinned:
        raise HostKeyError(
            f"{target.name}: the server shows the host key {key.get_name()} {key.fingerprint}, which is not pinned",
            hint="another machine listens on this port, or the guest's host keys were regenerated",
        )


def _prioritized(first: Iterable[str], known: Sequence[str]) -> list[str]:
    """The names that paramiko supports, with those of `first` in front."""
    front = [name for name in first if name in known]
    return [*front, *(name for name in known if name not in front)]


def _log_in(target: Target, transport: paramiko.Transport, deadline: float) -> None:
    for key in _keys(target):
        event = threading.Event()
        transport.auth_publickey(target.user, key, event=event)
        if not event.wait(max(0.1, deadline - time.monotonic())):
            raise ConnectTimeoutError(f"{target.name}: the login as {target.user} did not finish in time")
        if transport.is_authenticated():
            return
        if not transport.is_active():
            raise BannerError(f"{target.name}: the server closed the connection during the login as {target.user}")
    raise AuthFailedError(
        f"{target.name}: the server does not let {target.user} in with the key {target.key}",
        hint="is it in that user's authorized_keys?",
    )


def _keys(target: Target) -> list[paramiko.PKey]:
    """The keys of the target; the first must exist. AuthFailedError for an unusable key."""
    extra = [key for key in target.extra_keys if key.is_file()]
    return [key for path in (target.key, *extra) for key in _load_key(path)]


def _load_key(path: Path) -> list[paramiko.PKey]:
    """Load a key from a file, or from the agent if the file is encrypted."""
    try:
        return [paramiko.PKey.from_path(path)]
    except FileNotFoundError:
        raise AuthFailedError(f"the private key {path} does not exist") from None
    except (TypeError, paramiko.PasswordRequiredException):
        pass  # encrypted
    except (OSError, ValueError, paramiko.SSHException, paramiko.pkey.UnknownKeyType) as error:
        raise AuthFailedError(f"the private key {path} cannot be used: {describe(error)}") from None
    held = list(paramiko.Agent().get_keys())
    public = Path(f"{path}.pub")
    named = public_key(files.read_text(public, "replace")) if public.is_file() else None
    found = [key for key in held if named is None or key.get_base64() == named.blob]
    if not found:
        raise AuthFailedError(f"{path} is encrypted, and no agent holds it", hint=f"ssh-add {path}")
    return found


def describe(error: object) -> str:
    """The message of an exception, or else its name."""
    return str(error) or type(error).__name__
