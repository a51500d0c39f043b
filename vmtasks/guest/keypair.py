"""SSH key pairs: generate them, and derive the public key from the private one."""

from collections.abc import Sequence
from pathlib import Path

from vmtasks.config import arguments
from vmtasks.config.arguments import PublicKey
from vmtasks.host import files, process

MAKE_S = 60.0
READ_S = 30.0


def make_pair(private: Path, comment: str, kind: Sequence[str] = ("ed25519",)) -> PublicKey:
    """Generate a key pair: `private` with mode 0600, and the public key beside it. Overwrites existing files.

    `kind` is the argument of `ssh-keygen -t`, with further options.
    """
    with files.temporary(private, folder=True) as place:
        beside = place / private.name
        process.run(["ssh-keygen", "-q", "-t", *kind, "-N", "", "-C", comment, "-f", beside], timeout_s=MAKE_S)
        files.publish(public_half(beside), public_half(private))
        files.publish(beside, private, 0o600)
    return read_public(private)


def public_half(private: Path) -> Path:
    """The path where ssh-keygen puts the public key."""
    return private.with_name(f"{private.name}.pub")


def public_text(private: Path) -> str:
    """The public key, derived from the private one: the two files may differ after a kill."""
    return process.run(["ssh-keygen", "-y", "-f", private], timeout_s=READ_S).stdout


def read_public(private: Path) -> PublicKey:
    """public_text(), parsed."""
    (key,) = arguments.public_keys(public_text(private), str(private))
    return key
