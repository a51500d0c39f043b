"""Makes small .deb files and an archive of them that apt reads, for tests that must not touch the network."""

import hashlib
import io
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from vmtasks.installer.compose.debian import Archive
from vmtasks.media.tree import Entry

SUITE = "test"
KINDS = {"dir": tarfile.DIRTYPE, "file": tarfile.REGTYPE, "link": tarfile.SYMTYPE}


@dataclass
class Deb:
    """A package to be; `fields` adds to its control data, `archive` is a hard link from path to path."""

    name: str
    version: str = "1.0"
    entries: list[Entry] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)
    hard: dict[str, str] = field(default_factory=dict)

    def control(self) -> str:
        fields = {"Package": self.name, "Version": self.version, "Architecture": "amd64", **self.fields}
        return "".join(f"{key}: {value}\n" for key, value in fields.items())

    def bytes(self) -> bytes:
        """As dpkg-deb lays it out: an ar archive of a version, a control archive and a data archive."""
        parts = {
            "debian-binary": b"2.0\n",
            "control.tar.gz": tar([Entry("control", "file", data=self.control().encode())], {}),
            "data.tar.gz": tar(self.entries, self.hard),
        }
        return b"!<arch>\n" + b"".join(member(name, data) for name, data in parts.items())


def member(name: str, data: bytes) -> bytes:
    return f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)


def tar(entries: list[Entry], hard: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for entry in entries:
            info = tarfile.TarInfo(f"./{entry.path}")
            info.type, info.mode, info.size = KINDS[entry.kind], entry.mode, entry.size
            info.linkname, info.uid, info.mtime = entry.target, 1000, int(time.time())
            archive.addfile(info, io.BytesIO(entry.read()))
        for path, target in hard.items():
            info = tarfile.TarInfo(f"./{path}")
            info.type, info.linkname = tarfile.LNKTYPE, f"./{target}"
            archive.addfile(info)
    return out.getvalue()


def publish(folder: Path, debs: list[Deb]) -> Archive:
    """Write the packages and the lists that describe them; give what Apt wants to know."""
    stanzas = []
    for deb in debs:
        raw = deb.bytes()
        path = folder / "pool" / f"{deb.name}_{deb.version}_amd64.deb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
        stanzas.append(
            f"{deb.control()}Filename: {path.relative_to(folder)}\nSize: {len(raw)}\n"
            f"SHA256: {hashlib.sha256(raw).hexdigest()}\n"
        )
    listing = "\n".join(stanzas).encode()
    suite = folder / "dists" / SUITE
    packages = suite / "main/binary-amd64/Packages"
    packages.parent.mkdir(parents=True, exist_ok=True)
    packages.write_bytes(listing)
    (suite / "Release").write_text(
        f"Suite: {SUITE}\nCodename: {SUITE}\nComponents: main\nArchitectures: amd64\n"
        f"Date: {time.strftime('%a, %d %b %Y %H:%M:%S UTC', time.gmtime())}\n"
        f"SHA256:\n {hashlib.sha256(listing).hexdigest()} {len(listing)} main/binary-amd64/Packages\n"
    )
    return Archive(f"copy:{folder}", SUITE, security="", keyring=None)
