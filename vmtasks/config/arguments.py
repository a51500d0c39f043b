"""PURE: command-line arguments -> checked values: memory, ports, binds, images, public keys."""

import base64
import binascii
import hashlib
import posixpath
import re
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import PurePosixPath

import msgspec

from vmtasks.config.load import UNITS
from vmtasks.config.mistakes import show_value
from vmtasks.config.tables import NAME, USER
from vmtasks.errors import ConfigError

NAME_CHARS, USER_CHARS = 63, 32
KEY_TYPES = (
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
)


def memory(text: str) -> int:
    """RAM in bytes, whole MiB: `2048` (MiB), `1.5G`, `512m`. ConfigError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMG]?)", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--memory {text!r}: not a size; use MiB, or a number with K, M or G, as in 2048 or 1.5G")
    mib = int(float(match[1]) * UNITS[match[2].upper() or "M"]) >> 20
    if mib == 0:
        raise ConfigError(f"--memory {text!r}: less than 1 MiB; use 64M or more")
    return mib << 20


class Forward(msgspec.Struct, frozen=True):
    """A loopback port of this host that leads to a port of the guest. `host` 0: any that is free."""

    host: int
    guest: int

    @classmethod
    def parse(cls, text: str) -> "Forward":
        """`8080:80`. ConfigError that names the side that is wrong."""
        left, colon, right = text.partition(":")
        if not colon:
            raise ConfigError(f"-p {text!r}: no colon; write HOST:GUEST, as in 8080:80")
        made = cls(_port(left, text, "the host's side"), _port(right, text, "the guest's side"))
        if made.guest == 0:
            raise ConfigError(f"-p {text!r}: the guest's side is 0, where nothing can listen; use 1 to 65535")
        return made

    def __str__(self) -> str:
        """As parse() takes it."""
        return f"{self.host}:{self.guest}"


def distinct(ssh_port: int, forwards: Iterable[Forward]) -> None:
    """Raise ConfigError when a port of this host is forwarded twice. 0 is any free port."""
    given = {ssh_port: f"--ssh-port {ssh_port}"}
    for forward in forwards:
        if forward.host and forward.host in given:
            raise ConfigError(
                f"{given[forward.host]} and -p {forward}: port {forward.host} of this host is given twice; "
                "use another in one of them"
            )
        given[forward.host] = f"-p {forward}"


def _port(text: str, whole: str, side: str) -> int:
    if not text:
        raise ConfigError(f"-p {whole!r}: {side} is missing; write HOST:GUEST, as in 8080:80")
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ConfigError(f"-p {whole!r}: {side}, {text!r}, is not a port number; use 0 to 65535")
    if int(text) > 65535:
        raise ConfigError(f"-p {whole!r}: {side}, {text}, is out of range; use 0 to 65535")
    return int(text)


class Bind(msgspec.Struct, frozen=True):
    """A folder of this host at a path of the guest."""

    host: str
    guest: str
    read_only: bool = False
    exclude: tuple[str, ...] = ()
    """rsync patterns; one that begins with / is anchored at the folder."""

    @classmethod
    def parse(cls, text: str, exclude: tuple[str, ...] = ()) -> "Bind":
        """`HOST:GUEST` or `HOST:GUEST:ro`. ConfigError that names the side that is wrong; looks at no file system.

        The host's side may hold colons, the guest's side none.
        """
        mode, rest = "rw", text
        for ending in (":ro", ":rw"):
            if text.endswith(ending) and text.count(":") > 1:
                mode, rest = ending[1:], text.removesuffix(ending)
        host, colon, guest = rest.rpartition(":")
        if not colon:
            raise ConfigError(f"--bind {text!r}: no colon; write HOST:GUEST or HOST:GUEST:ro")
        if not host:
            raise ConfigError(f"--bind {text!r}: the host's side is missing; name a folder of this host")
        if not guest:
            raise ConfigError(f"--bind {text!r}: the guest's side is missing; name an absolute path in the guest")
        path = PurePosixPath(guest)
        if not path.is_absolute() or ".." in path.parts or not guest.isprintable() or str(path) in ("/", "//"):
            raise ConfigError(f"--bind {text!r}: the guest's side, {guest!r}, must be an absolute path below /")
        for pattern in exclude:
            if fault := pattern_fault(pattern):
                raise ConfigError(f"--exclude {pattern!r}: {fault}")
        return cls(host, _one_way(guest), mode == "ro", exclude)

    def __str__(self) -> str:
        """As parse() takes it."""
        return f"{self.host}:{self.guest}{':ro' if self.read_only else ''}"


def pattern_fault(pattern: str) -> str:
    """Why `pattern` is no exclude pattern of rsync, or ''."""
    empty = not pattern.removeprefix("+ ").removeprefix("- ").strip()
    return "an empty pattern or one with a line break; remove it" if empty or "\n" in pattern else ""


def apart(binds: Sequence[Bind]) -> None:
    """Raise ConfigError when two binds have the same path in the guest, or one is inside the other."""
    for one, other in combinations(binds, 2):
        paths = [PurePosixPath(_one_way(bind.guest)) for bind in (one, other)]
        if paths[0] == paths[1]:
            how = f"both are at {paths[0]} in the guest"
        elif paths[0] in paths[1].parents or paths[1] in paths[0].parents:
            how = "in the guest, one is inside the other"
        else:
            continue
        raise ConfigError(f"--bind {str(one)!r} and --bind {str(other)!r}: {how}; give each a path of its own")


def _one_way(guest: str) -> str:
    """Normalize a path of the guest. POSIX gives two slashes at its beginning another meaning."""
    return "/" + posixpath.normpath(guest).lstrip("/")


def image(text: str) -> tuple[str, str]:
    """Split `guest[:snapshot]`; either the snapshot or all may be absent. ConfigError."""
    guest, colon, snapshot = text.partition(":")
    for part, what in ((guest, "guest"), (snapshot, "snapshot")):
        _not_too_long(f"image: the {what}", part, NAME_CHARS)
        if part and not re.fullmatch(NAME, part):
            raise ConfigError(f"image {text!r}: {part!r} is no name of a {what}; write GUEST or GUEST:SNAPSHOT")
    if colon and not (guest and snapshot):
        side = "after" if guest else "before"
        raise ConfigError(f"image {text!r}: nothing {side} the colon; write GUEST or GUEST:SNAPSHOT")
    return guest, snapshot


def machine_name(text: str) -> str:
    """Return the name of a machine. ConfigError when it cannot name a folder."""
    _not_too_long("--name", text, NAME_CHARS)
    if not re.fullmatch(NAME, text):
        raise ConfigError(f"--name {text!r}: use letters, digits, '.', '_' and '-', beginning with a letter or digit")
    return text


def user(text: str) -> str:
    """Return the name of a user of the guest. ConfigError when it cannot be one."""
    _not_too_long("--user", text, USER_CHARS)
    if not re.fullmatch(USER, text):
        raise ConfigError(f"--user {text!r}: not a user's name; use lower-case letters, digits, '_' and '-'")
    return text


def _not_too_long(what: str, text: str, most: int) -> None:
    if len(text) > most:
        raise ConfigError(f"{what} {show_value(text)}: too long, {len(text)} characters; use {most} at most")


class PublicKey(msgspec.Struct, frozen=True):
    """One line of authorized_keys, without options."""

    kind: str
    blob: str
    comment: str = ""

    def __str__(self) -> str:
        """The line."""
        return f"{self.kind} {self.blob} {self.comment}".rstrip()

    @property
    def fingerprint(self) -> str:
        """`SHA256:...`, as ssh-keygen shows it."""
        digest = hashlib.sha256(base64.b64decode(self.blob)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def public_keys(text: str, where: str) -> list[PublicKey]:
    """Parse a public key file. ConfigError for a private key, for what is no key, and for a file without one.

    No message quotes the text: it may be a secret that was named by mistake.
    """
    if "PRIVATE KEY" in text or "PuTTY-User-Key-File" in text:
        raise ConfigError(f"{where}: this is a private key; name the public half, which ends in .pub")
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key = public_key(line)
        if key is None:
            raise ConfigError(f"{where}: line {number} is not a public key; it begins with ssh-ed25519 or the like")
        found.append(key)
    if not found:
        raise ConfigError(f"{where}: there is no public key in it")
    return found


def public_key(line: str) -> PublicKey | None:
    """Parse one line; None when its type, its length fields or its characters are not those of a key."""
    kind, _, rest = line.strip().partition(" ")
    blob, _, comment = rest.strip().partition(" ")
    if kind not in KEY_TYPES or not line.strip().isprintable():
        return None
    try:
        raw = base64.b64decode(blob, validate=True)
    except (binascii.Error, ValueError):
        return None
    fields = _fields(raw)
    return PublicKey(kind, blob, comment.strip()) if len(fields) > 1 and fields[0] == kind.encode() else None


def _fields(raw: bytes) -> list[bytes]:
    """The fields of a key's blob, each with its length before it (RFC 4253, 6.6); [] when it is cut."""
    found = []
    while raw:
        end = 4 + int.from_bytes(raw[:4], "big")
        if len(raw) < max(4, end):
            return []
        found.append(raw[4:end])
        raw = raw[end:]
    return found
