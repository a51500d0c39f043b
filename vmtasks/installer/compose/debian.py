"""Debian packages without root and without installing any: owns apt, and the cache of what it fetched."""

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from debian.deb822 import Deb822, PkgRelation
from debian.debian_support import Version

from vmtasks.errors import CommandError, FetchError
from vmtasks.host import files, process

log = logging.getLogger(__name__)

APT_HINT = "install apt and debian-archive-keyring: other distributions than Debian have packages of these names too"
ARCHITECTURE = "amd64"
FRESH_S = 6 * 3600.0
"""How long the lists of an archive are used before they are fetched again."""
HELPERS = ("/usr/lib/apt/apt-helper", "/usr/libexec/apt/apt-helper")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR = "http://deb.debian.org/debian"
MIRROR_VARIABLE = "VMTASKS_DEBIAN_MIRROR"
OFFLINE_HINT = (
    f"is the network up, and does a proxy stand in apt's configuration? {MIRROR_VARIABLE} names another mirror"
)
SECURITY = "http://deb.debian.org/debian-security"
TIMEOUT_S = 900.0
LEAST_FREE = 1 << 20


@dataclass(frozen=True)
class Archive:
    """Where packages come from: `mirror` with `suite` and its updates, and the security archive unless it is empty.

    Without a `keyring` the archive is trusted as it is: for a folder of one's own.
    """

    mirror: str = MIRROR
    suite: str = "bookworm"
    security: str = SECURITY
    keyring: Path | None = KEYRING

    def here(self) -> "Archive":
        """With what VMTASKS_DEBIAN_MIRROR says: a mirror and, after a blank, a security mirror."""
        words = os.environ.get(MIRROR_VARIABLE, "").split()
        return replace(self, **dict(zip(("mirror", "security"), words, strict=False)))  # type: ignore[arg-type]

    def sources(self) -> str:
        """The text of apt's deb822 sources file."""
        signed = f"Signed-By: {self.keyring}" if self.keyring else "Trusted: yes"
        wanted = [(self.mirror, [self.suite, f"{self.suite}-updates"] if self.keyring else [self.suite])]
        if self.security:
            wanted.append((self.security, [f"{self.suite}-security"]))
        return "\n".join(
            f"Types: deb\nURIs: {uri}\nSuites: {' '.join(suites)}\nComponents: main\n{signed}\n"
            for uri, suites in wanted
        )


@dataclass(frozen=True, order=True)
class Package:
    """One .deb of an archive; `sha256` and `size` (bytes) are what apt states from signed lists."""

    name: str
    version: str
    arch: str
    uri: str
    sha256: str
    size: int

    @property
    def file_name(self) -> str:
        """As Debian names the file of a package, an epoch's colon written as %3a."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.arch}.deb"


class Apt:
    """apt with a state of its own below `folder`, one for each archive; the host's proxy settings stay in force."""

    def __init__(self, folder: Path, archive: Archive) -> None:
        """Make the folder; nothing is fetched yet. FetchError where apt could not name its files."""
        if not str(folder).isprintable():
            raise FetchError(
                f"{folder!s}: apt cannot work in a folder with such a name",
                hint="name a store in plain characters with VMTASKS_STORE",
            )
        name = hashlib.sha256(archive.sources().encode()).hexdigest()[:16]
        self.folder = folder.absolute() / "apt" / name
        self.archive = archive
        for part in ("lists/partial", "cache/archives/partial", "etc"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        files.write_if_changed(self.folder / "status", "")
        files.write_if_changed(self.folder / "etc/debian.sources", archive.sources())
        files.write_if_changed(self.folder / "apt.conf", self._settings())

    def _settings(self) -> str:
        """Read by apt after the host's own settings, of which hooks, pins and sources must not act here."""
        root = self.folder
        values = {
            "APT::Architecture": ARCHITECTURE,
            "APT::Architectures": ARCHITECTURE,
            "APT::Sandbox::User": "root",
            "APT::Update::Error-Mode": "any",
            "Acquire::GzipIndexes": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Dir::Cache": f"{root}/cache",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::Etc::sourcelist": f"{root}/etc/debian.sources",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State": str(root),
            "Dir::State::lists": f"{root}/lists",
            "Dir::State::status": f"{root}/status",
        }
        cleared = "".join(f"#clear {name};\n" for name in ("APT::Architectures", "APT::Update", "DPkg"))
        return cleared + "".join(f'{name} "{value}";\n' for name, value in values.items())

    def run(self, program: str, *words: str | Path) -> str:
        """Run an apt program with our settings; returns its output. CommandError, or FetchError without apt."""
        if shutil.which(program) is None:
            raise FetchError(f"{program}, which fetches Debian's packages, is not installed", hint=APT_HINT)
        return process.run(
            [program, "-c", self.folder / "apt.conf", *words], timeout_s=TIMEOUT_S, env={"LC_ALL": "C.UTF-8"}
        ).stdout

    def update(self) -> None:
        """Fetch the lists unless they are fresh. Without a network use older ones, with a warning."""
        with self._alone():
            self._update()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one process at a time in: apt gives up at once when another holds its lock."""
        with (self.folder / "busy").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _update(self) -> None:
        stamp = self.folder / "updated"
        if stamp.exists() and 0 <= time.time() - stamp.stat().st_mtime < FRESH_S:
            return
        if self.archive.keyring and not self.archive.keyring.exists():
            hint = "install the package debian-archive-keyring"
            raise FetchError(f"{self.archive.keyring}, which verifies Debian's packages, is missing", hint=hint)
        try:
            self.run("apt-get", "update")
        except CommandError as error:
            if not stamp.exists():
                message = f"the package lists of {self.archive.mirror} could not be fetched: {_said(error)}"
                raise FetchError(message, hint=lost_hint(self.folder)) from error
            log.warning("the package lists could not be renewed, older ones are used: %s", _said(error))
        else:
            stamp.touch()

    def index(self) -> "Index":
        """All packages in the lists."""
        self.update()
        found = Index()
        out = self.run("apt-get", "indextargets", "--format", "$(REPO_URI)\t$(FILENAME)", "Created-By: Packages")
        for line in out.splitlines():
            uri, _, path = line.partition("\t")
            found.add(Path(path).read_text(encoding="utf-8"), uri)
        return found

    def download(self, packages: Sequence[Package]) -> list[Path]:
        """Return the .deb files, in the order of `packages`, from the cache where it has them; checks each digest."""
        store = self.folder.parent.parent / "debs"
        places = [store / package.sha256 / package.file_name for package in packages]
        missing = [pair for pair in zip(packages, places, strict=True) if not _intact(pair[1], pair[0])]
        if missing:
            with files.temporary(store / "fetch", folder=True) as place:
                self._fetch([package for package, _ in missing], place)
                for package, kept in missing:
                    _keep(place / package.sha256, kept, package)
        return places

    def _fetch(self, packages: Sequence[Package], place: Path) -> None:
        helper = next((path for path in HELPERS if Path(path).exists()), None)
        if helper is None:
            raise FetchError("apt-helper, which fetches Debian's packages, is not installed", hint=APT_HINT)
        words = [
            word
            for package in packages
            for word in (package.uri, str(place / package.sha256), f"SHA256:{package.sha256}")
        ]
        try:
            self.run(helper, "download-file", *words)
        except CommandError as error:
            lost = [package.name for package in packages if not (place / package.sha256).exists()]
            names = ", ".join(lost or [package.name for package in packages])
            raise FetchError(f"not fetched: {names}: {_said(error)}", hint=lost_hint(self.folder)) from error


def lost_hint(folder: Path) -> str:
    """The hint after a failure of apt, whose own message hardly tells that the disk is full."""
    free = files.free_bytes(folder)
    if free < LEAST_FREE:
        return f"{free >> 10} KiB are free at {folder}: free some space, or put the store elsewhere with VMTASKS_STORE"
    return OFFLINE_HINT


class Index:
    """Package names -> their entries, parsed on demand: the lists hold 60,000 packages."""

    def __init__(self) -> None:
        self._texts: dict[str, list[tuple[str, str]]] = {}
        self._provided: dict[str, list[str]] = {}

    def add(self, text: str, uri: str) -> None:
        """Take in one Packages file, whose file names are relative to `uri`."""
        for paragraph in text.split("\n\n"):
            head, _, _ = paragraph.lstrip("\n").partition("\n")
            name = head.removeprefix("Package: ")
            if not head or name == head:
                continue
            self._texts.setdefault(name, []).append((paragraph, uri))
            _, found, rest = paragraph.partition("\nProvides: ")
            for provided in rest.partition("\n")[0].split(",") if found else ():
                self._provided.setdefault(provided.split()[0].partition(":")[0], []).append(name)

    def newest(self, name: str) -> tuple[Package, dict[str, str]] | None:
        """The highest version of `name` and its fields; None when no list has it."""
        known = [(Deb822(text), uri) for text, uri in self._texts.get(name, [])]
        if not known:
            return None
        fields, uri = max(known, key=lambda pair: Version(pair[0]["Version"]))
        address = f"{uri.rstrip('/')}/{fields['Filename']}"
        package = Package(
            name, fields["Version"], fields["Architecture"], address, fields["SHA256"], int(fields["Size"])
        )
        return package, dict(fields)

    def choose(self, names: Sequence[str], taken: set[str]) -> str | None:
        """The package that satisfies one of the alternatives: one that is `taken` first, then the first that exists."""
        real = [name for name in names if name in self._texts]
        virtual = [provider for name in names for provider in sorted(self._provided.get(name, []))]
        return next((name for name in [*names, *virtual] if name in taken), next(iter([*real, *virtual]), None))


def resolve(index: Index, names: Iterable[str], omit: Iterable[str] = ()) -> list[Package]:
    """`names` and all that they depend on, sorted by name, without `omit` and what only those need.

    Of alternatives one that is there or omitted anyway satisfies, otherwise the first that exists counts. Versions
    are not compared, since an archive is one whole.
    FetchError names a package that no list has.
    """
    left_out = set(omit)
    found: dict[str, Package] = {}
    queue = [(name, "") for name in names if name not in left_out]
    for name, wanted_by in queue:
        if name in found:
            continue
        known = index.newest(name)
        if known is None:
            because = f", which {wanted_by} depends on," if wanted_by else ""
            raise FetchError(f"there is no package {name}{because} in the archive", hint="check `packages` and `suite`")
        found[name], fields = known
        for alternatives in relations(fields):
            chosen = index.choose(alternatives, found.keys() | left_out | {wanted for wanted, _ in queue})
            if (chosen or alternatives[0]) not in left_out:
                queue.append((chosen or alternatives[0], name))
    return sorted(found.values())


def relations(fields: dict[str, str]) -> Iterator[list[str]]:
    """For each dependency the names of its alternatives."""
    for field in ("Pre-Depends", "Depends"):
        for alternatives in PkgRelation.parse_relations(fields[field]) if fields.get(field) else ():
            yield [part["name"] for part in alternatives]


def _intact(path: Path, package: Package) -> bool:
    return path.is_file() and path.stat().st_size == package.size and files.sha256(path) == package.sha256


def _keep(fetched: Path, kept: Path, package: Package) -> None:
    """Publish a fetched file if it is what apt promised."""
    if not _intact(fetched, package):
        message = f"{package.name} {package.version} from {package.uri} is not what the archive's lists promise"
        raise FetchError(message, hint=f"expected SHA256 {package.sha256} and {package.size} bytes; try again later")
    with files.replacing(kept) as beside:
        shutil.copyfile(fetched, beside)


def _said(error: CommandError) -> str:
    """The lines in which apt says what went wrong."""
    lines = [line for line in error.stderr.splitlines() if line.startswith(("E: ", "W: ", "Err:"))]
    return " ".join(lines)[-600:] or error.message[-600:]
