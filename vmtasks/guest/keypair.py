"""Key pairs for SSH: made, and read back from the private half."""

from collections.abc import Sequence
from pathlib import Path

from vmtasks.config import arguments
from vmtasks.config.arguments import PublicKey
from vmtasks.host import files, process

MAKE_S = 60.0
READ_S = 30.0


def make_pair(private: Path, comment: str, kind: Sequence[str] = ("ed25519",)) -> PublicKey:
    """Make a key pair: `private` with mode 0600, the public half beside it. What is there is overwritten.

    `kind` is what `ssh-keygen -t` takes, with further options.
    """
    with files.temporary(private, folder=True) as place:
        beside = place / private.name
        process.run(["ssh-keygen", "-q", "-t", *kind, "-N", "", "-C", comment, "-f", beside], timeout_s=MAKE_S)
        files.publish(public_half(beside), public_half(private))
        files.publish(beside, private, 0o600)
    return read_public(private)


def public_half(private: Path) -> Path:
    """Where ssh-keygen puts it."""
    return private.with_name(f"{private.name}.pub")


def public_text(private: Path) -> str:
    """The public half of a key, taken from the private one: two files may be out of step after a kill."""
    return process.run(["ssh-keygen", "-y", "-f", private], timeout_s=READ_S).stdout


def read_public(private: Path) -> PublicKey:
    """That half, parsed."""
    (key,) = arguments.public_keys(public_text(private), str(private))
    return key
