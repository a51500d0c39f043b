"""Run one build step of the plan: fetch, render, compose the phase ISO, boot the phase, publish the image.

Each step leaves a small record in the guest's state folder; the next step depends on that record, never on an image.
A finished phase is published in the store at once, so that it survives a kill and the loss of doit's database.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Concatenate, NamedTuple, ParamSpec

import msgspec

from vmtasks.config import arguments
from vmtasks.errors import ConfigError, StateError
from vmtasks.guest import keypair
from vmtasks.host import files, progress
from vmtasks.host.locks import lock
from vmtasks.images import make, plan, prune
from vmtasks.images.plan import IsoFile, Node
from vmtasks.images.reader import MODES, PLAIN, Reader, Texts, text_digest
from vmtasks.images.workspace import BuiltRecord, IsoRecord, PhaseRecord, RenderRecord
from vmtasks.installer import installer
from vmtasks.media.iso import write_iso
from vmtasks.media.tree import Entry
from vmtasks.store.records import ImageRecord, MediaRecord, read_record, write_record
from vmtasks.store.store import Look

LOCK_S = 4 * 3600.0
P = ParamSpec("P")


def alone(step: Callable[Concatenate["Builder", int, P], None]) -> Callable[Concatenate["Builder", int, P], None]:
    """Let one process at a time run a phase's steps in a state folder: they share its files, CD and logs."""

    @functools.wraps(step)
    def held(self: "Builder", number: int, /, *args: P.args, **options: P.kwargs) -> None:
        what = self.title(number)
        path = self.home / f".phase-{number}.lock"
        with lock(path, f"{what} in {self.home}", timeout_s=LOCK_S, waiting=self._waiting(what)):
            step(self, number, *args, **options)

    return held


class Rendered(NamedTuple):
    """A phase's files by name, and the key whose public half they contain."""

    private: Path
    public_key: str
    files: dict[str, str]


class Builder(Reader):
    """The build steps of one guest."""

    # -- steps

    def make_key(self) -> None:
        """Make the user's key pair if it is missing; rewrite its public half if that is unreadable."""
        if self.key.is_file() and _holds_public_key(self.public_key):
            return
        with self.store.lock("key", timeout_s=60):
            if self.key.is_file():
                if not _holds_public_key(self.public_key):
                    progress.say(f"{self.public_key}: no public key; derived again from the private key")
                    files.write(self.public_key, keypair.public_text(self.key))
                return
            self.key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            keypair.make_pair(self.key, "vmtasks")

    def fetch(self, *, allow_unverified: bool = False) -> None:
        """Get the installer into the store, and name its file in the record.

        FetchError for a download without a known digest, unless `allow_unverified` permits it, or did so in this
        project before.
        """
        recipe, parts = self.recipe()
        if not self._use_media(recipe, allow_unverified=allow_unverified):
            with self.store.lock(f"media-{recipe[:32]}", timeout_s=LOCK_S, waiting=self._waiting("the installer")):
                if not self._use_media(recipe, allow_unverified=allow_unverified):
                    with progress.step(
                        "fetch: the installer", expected_s=self.store.history.expected_s(f"fetch {recipe[:12]}")
                    ) as step:
                        record = installer.make(
                            self.config, self.store, recipe, step.now, allow_unverified=allow_unverified
                        )
                    record = msgspec.structs.replace(record, parts=parts)
                    write_record(self.store.root / "media" / f"{recipe}.toml", record)
                    self.store.history.record(f"fetch {recipe[:12]}", step.elapsed_s)
                    with self.naming():
                        write_record(self.installer_record, record)

    @alone
    def render(self, number: int) -> None:
        """Write the phase's changed files. ConfigError for an invalid template."""
        texts = self.read(number)
        self._write_files(number, texts, self.nodes({number: texts}))

    @alone
    def phase_iso(self, number: int) -> None:
        """Write an ISO with the phase's files, its packages and its token."""
        texts = self.read(number)
        nodes = self.known_nodes(f"phase_iso:{number}", {number: texts})
        self._write_iso(number, nodes, self._write_files(number, texts, nodes))

    def _write_files(self, number: int, texts: Texts, nodes: Mapping[str, Node]) -> Rendered:
        """Render the phase with the public key of the image to be made, and record the sources."""
        rendering = self.rendering(number, texts)
        private = self.key_of(number, nodes)
        if private == self.key:
            self.make_key()
        public_key = self.public_line(private)
        made = self.render_files(number, texts, public_key)
        if rendering.fault:
            raise ConfigError(rendering.fault)
        folder = self.folder(number)
        for name, text in made.items():
            files.write_if_changed(folder / name, text, MODES[name])
        for path in _whole(folder):
            if path.name not in made:
                path.unlink(missing_ok=True)
        record = RenderRecord(
            digest=plan.digest_of("render", rendering.sources),
            parts=rendering.sources,
            files=rendering.files,
            key=public_key,
            left={name: text_digest(text) for name, text in made.items()},
        )
        files.write_if_changed(self.render_file(number), msgspec.json.encode(record))
        return Rendered(private, public_key, made)

    def public_line(self, private: Path) -> str:
        """The public half of a key; it is written beside the key if it is missing."""
        public = self.public_half(private)
        if not public:
            public = keypair.public_text(private).strip()
            files.write(keypair.public_half(private), public + "\n")
        return public

    def _write_iso(self, number: int, nodes: Mapping[str, Node], rendered: Rendered) -> str:
        """Write the phase's ISO and its record; returns the token."""
        entries = self.iso_entries(number, rendered.files)
        token = iso_token(entries)
        entries.append(Entry("token", "file", PLAIN, f"{token}\n".encode()))
        if any(e.path.startswith("packages/") for e in entries):
            entries.append(Entry("packages", "dir", 0o555))
        iso, node = self.iso(number), nodes[f"phase_iso:{number}"]
        write_iso(iso, entries, label=f"PHASE{number}")
        stat = iso.stat()
        record = IsoRecord(
            digest=node.digest,
            parts=node.parts,
            key=rendered.public_key,
            size=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
        )
        files.write(self.iso_file(number), msgspec.json.encode(record))
        return token

    @alone
    def build(self, number: int, *, anew: bool = False) -> None:
        """Get the image of phase `number` into the store, and name it in the phase's record.

        Boots a guest only if the store has no intact image with the digest, or with `anew`. PhaseError if it fails.
        """
        title, texts = self.title(number), self.read(number)
        nodes = self.known_nodes(f"phase:{number}", {number: texts})
        node = nodes[f"phase:{number}"]
        if not anew and not self._use_image(number, node, texts):
            return
        with self.store.lock(f"image-{node.digest}", timeout_s=LOCK_S, waiting=self._waiting(title)) as held:
            why = "asked for anew" if anew else self._use_image(number, node, texts)
            if not why:
                return
            if why != "not built yet":
                progress.say(f"{title}: {why}; building it again")
            below = self.below(number, look="sample")
            with self.store.explaining(below, "doit auto_install"):
                made = make.make(self.job(number, texts, nodes, below), held)
            with self.naming():
                self._name(number, node, made, texts)

    def snapshot(self) -> None:
        """Name the last phase's image `clean`."""
        with self.naming():
            last = self.phase_record(self.numbers[-1])
            parts = {f"phase:{self.numbers[-1]}": last.digest}
            write_record(self.clean_record, PhaseRecord(digest=last.digest, sha256=last.sha256, parts=parts))

    def adopt(self) -> str:
        """Write the records of all steps from what the store has; returns what it lacks, or ''.

        Downloads nothing and boots nothing.
        """
        if not self._use_media(self.recipe()[0], allow_unverified=True):
            return "the installer"
        read = {number: self.read(number) for number in self.numbers}
        nodes = self.nodes(read)
        for number in self.numbers:
            node = nodes[f"phase:{number}"]
            if not node.digest:
                raise ConfigError(node.unknown)
            if self._use_image(number, node, read[number]):
                return f"the image of phase {self.phase(number).name}"
        if self.why_stale("snapshot", nodes):
            self.snapshot()
        return ""

    def naming(self) -> contextlib.AbstractContextManager[None]:
        """Hold off pruning while records are written; see vmtasks.images.prune.naming()."""
        return prune.naming(self.store, self.config.vm_dir)

    def _use_media(self, recipe: str, *, allow_unverified: bool) -> bool:
        """Whether the store has the installer; if so, our record names it."""
        with self.naming():
            record, fault = self.known_media(recipe, allow_unverified=allow_unverified)
            if fault:
                progress.say(f"fetch: {fault}; fetching it again")
            elif record is not None and record != read_record(self.installer_record, MediaRecord):
                write_record(self.installer_record, record)
        return record is not None and not fault

    def _use_image(self, number: int, node: Node, texts: Texts) -> str:
        """Let our record of phase `number` name an image in the store; returns why there is none, or ''.

        The image must have been built on the bytes that our previous record names: another project may have built its
        own.
        """
        below = self.below(number)
        with self.naming():
            found, why = self.find_image(number, node.digest, chain=below.chain if below else "")
            if found is not None:
                self._name(number, node, found, texts)
        return why

    def _name(self, number: int, node: Node, image: ImageRecord, texts: Texts) -> None:
        """Let our record of phase `number` name this image, and record its sources."""
        built = BuiltRecord(digest=node.digest, sources=node.sources, texts=self.texts_by_part(number, texts))
        files.write_if_changed(self.built_file(number), msgspec.json.encode(built))
        ours = PhaseRecord(digest=image.digest, sha256=image.sha256, parts=node.parts)
        if ours != read_record(self.record(number), PhaseRecord):
            write_record(self.record(number), ours)

    def below(self, number: int, *, look: Look = "time") -> ImageRecord | None:
        """The backing image of phase `number`; None for the first phase. StateError if it is invalid."""
        if number == 1:
            return None
        named = self.phase_record(number - 1)
        found, why = self.store.find(named.digest, named.sha256, look=look)
        if found is None:
            raise StateError(
                f"phase {self.phase(number).name} of {self.config.label} grows from image {named.digest[:12]}: {why}",
                hint=f"doit phase:{number - 1}",
            )
        return found

    # -- inputs of the steps

    def known_nodes(self, name: str, read: Mapping[int, Texts]) -> dict[str, Node]:
        """All nodes; that of `name` has a digest. StateError before `fetch`; ConfigError for an invalid template."""
        nodes = self.nodes(read)
        if nodes[name].digest:
            return nodes
        if nodes[name].unknown == plan.NOT_FETCHED:
            self.media()
            raise StateError(f"{name}: {plan.NOT_FETCHED}", hint="doit fetch")
        raise ConfigError(nodes[name].unknown)

    def iso_entries(self, number: int, made: Mapping[str, str]) -> list[Entry]:
        """The files of the phase's ISO without the token: the rendered files and the packages."""
        entries = [Entry(name, "file", MODES[name], text.encode()) for name, text in made.items()]
        for item in self.media().local_packages.get(self.phase(number).name, []):
            sha256, _, name = item.partition(" ")
            entries.append(Entry(f"packages/{name}", "file", PLAIN, self.store.download(sha256)))
        return entries

    # -- small things

    def title(self, number: int) -> str:
        """`phase 1-install of tiny`."""
        return f"phase {self.phase(number).name} of {self.config.label}"

    def _waiting(self, what: str) -> progress.Say:
        return lambda holder: progress.say(f"{what}: {holder} is making it; waiting")

    def job(self, number: int, texts: Texts, nodes: Mapping[str, Node], below: ImageRecord | None) -> make.Job:
        """All that making the image needs. Writes the CD again, because another run may have rendered meanwhile."""
        rendered, node = self._write_files(number, texts, nodes), nodes[f"phase:{number}"]
        token = self._write_iso(number, nodes, rendered)
        return make.Job(
            config=self.config,
            store=self.store,
            accel=self.accel,
            phase=self.phase(number),
            number=number,
            digest=node.digest,
            token=token,
            isos={"installer": self.installer(), "phase": self.iso(number)},
            below=below,
            parts=node.parts,
            key=rendered.private,
        )


def iso_token(entries: Iterable[Entry]) -> str:
    """The token for a CD with these files."""
    return plan.token(IsoFile(e.path, e.mode, hashlib.sha256(e.read()).hexdigest()) for e in entries)


def _whole(folder: Path) -> list[Path]:
    """The finished files in a folder: those being written have names that begin with a dot."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _holds_public_key(path: Path) -> bool:
    try:
        return bool(arguments.public_keys(files.read_text(path), str(path)))
    except (OSError, ValueError, ConfigError):
        return False
