"""Carry out one build step of the plan: fetch, render, compose the phase ISO, boot the phase, publish the image.

Each step leaves a small record in the guest's state folder; the next step depends on that record, never on an image.
A finished phase is published in the store at once, so that no kill, and no loss of doit's database, costs it.
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec

from vmtasks.config import arguments
from vmtasks.config.tables import Download
from vmtasks.errors import ConfigError, StateError
from vmtasks.guest import keypair
from vmtasks.host import files, progress
from vmtasks.host.locks import lock
from vmtasks.images import make, plan, prune
from vmtasks.images.workspace import PhaseRecord, State
from vmtasks.installer import installer
from vmtasks.media import template
from vmtasks.media.iso import write_iso
from vmtasks.media.tree import Entry
from vmtasks.store.store import ImageRecord, Look, MediaRecord, read_record, write_record

LOCK_S = 4 * 3600.0
PROGRAM, PLAIN = 0o555, 0o444
P = ParamSpec("P")


def alone(step: Callable[Concatenate["Builder", int, P], None]) -> Callable[Concatenate["Builder", int, P], None]:
    """One run at a time carries out a phase's steps in a state folder: they share its files, its CD and its logs."""

    @functools.wraps(step)
    def held(self: "Builder", number: int, /, *args: P.args, **options: P.kwargs) -> None:
        what = self.title(number)
        path = self.home / f".phase-{number}.lock"
        with lock(path, f"{what} in {self.home}", timeout_s=LOCK_S, waiting=self._waiting(what)):
            step(self, number, *args, **options)

    return held


class Builder(State):
    """The build steps of one guest."""

    # -- steps

    def make_key(self) -> None:
        """Make the user's key pair when it is first needed, and its public half anew when that cannot be read."""
        if self.key.is_file() and _holds_public_key(self.public_key):
            return
        with self.store.lock("key", timeout_s=60):
            if self.key.is_file():
                if not _holds_public_key(self.public_key):
                    progress.say(f"{self.public_key}: no public key; made anew from the private one")
                    files.write(self.public_key, keypair.public_text(self.key))
                return
            self.key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            keypair.make_pair(self.key, "vmtasks")

    def fetch(self, *, allow_unverified: bool = False) -> None:
        """Have the installer in the store and say in its record which file it is.

        FetchError for a download that nothing is known to hold against, unless `allow_unverified` says yes, or did so
        in this project before.
        """
        recipe = self.recipe()
        if not self._use_media(recipe, allow_unverified=allow_unverified):
            with self.store.lock(f"media-{recipe[:32]}", timeout_s=LOCK_S, waiting=self._waiting("the installer")):
                if not self._use_media(recipe, allow_unverified=allow_unverified):
                    with progress.step(
                        "fetch: the installer", expected_s=self.store.history.expected_s(f"fetch {recipe[:12]}")
                    ) as step:
                        record = installer.make(
                            self.config, self.store, recipe, step.now, allow_unverified=allow_unverified
                        )
                    write_record(self.store.root / "media" / f"{recipe}.toml", record)
                    self.store.history.record(f"fetch {recipe[:12]}", step.elapsed_s)
                    with self.naming():
                        write_record(self.installer_record, record)

    @alone
    def render(self, number: int) -> None:
        """Write the phase's files; those that are as they were are left alone, and so is what depends on them."""
        self.make_key()
        phase, config = self.phase(number), self.config
        values = {
            "disk_serial": config.guest.machine.disk_serial,
            "guest": config.guest.name,
            "hostname": config.guest.name,
            "public_key": files.read_text(self.public_key).strip(),
            "ssh_user": config.guest.ssh.user,
            "vars": dict(config.vars),
            "version": config.version,
        }
        texts = {
            "lib.sh": (template.shipped("lib.sh"), PLAIN),
            "pfi.conf": ("pfi_script=run.sh\n", PLAIN),
            "phase.sh": (template.render(config.template(phase), values), PLAIN),
            "poweroff": (config.guest.poweroff + "\n", PLAIN),
            "run.sh": (template.shipped("run.sh"), PROGRAM),
        }
        rendered = self.rendered(number)
        for path in rendered:
            text, mode = texts[path.name]
            files.write_if_changed(path, text, mode)
        for path in _whole(self.folder(number)):
            if path not in rendered:
                path.unlink(missing_ok=True)

    @alone
    def phase_iso(self, number: int) -> None:
        """Put the phase's files, its packages and its token on an ISO."""
        self._write_iso(number)

    def _write_iso(self, number: int) -> None:
        sources = self.sources(number)
        token = plan.token(self._iso_files(sources))
        entries = [Entry(path, "file", mode, source) for path, (mode, source) in sources.items()]
        entries.append(Entry("token", "file", PLAIN, f"{token}\n".encode()))
        if any(e.path.startswith("packages/") for e in entries):
            entries.append(Entry("packages", "dir", 0o555))
        write_iso(self.iso(number), entries, label=f"PHASE{number}")

    @alone
    def build(self, number: int, *, anew: bool = False) -> None:
        """Have the image of phase `number` in the store and say in its record which it is.

        Boots a guest only if the store holds no intact image for the digest, or `anew`. PhaseError when it fails.
        """
        digest, title = self.digest(number), self.title(number)
        if not anew and not self._use_image(number, digest):
            return
        with self.store.lock(f"image-{digest}", timeout_s=LOCK_S, waiting=self._waiting(title)) as held:
            why = "asked for anew" if anew else self._use_image(number, digest)
            if not why:
                return
            if why != "not built yet":
                progress.say(f"{title}: {why}; building it again")
            below = self.below(number, look="sample")
            with self.store.explaining(below, "doit auto_install"):
                made = make.make(self._job(number, digest, below), held)
            with self.naming():
                write_record(self.record(number), PhaseRecord(digest=digest, sha256=made.sha256))

    def snapshot(self) -> None:
        """Name the last phase's image `clean`."""
        with self.naming():
            write_record(self.clean_record, self.phase_record(len(self.config.guest.phases)))

    def adopt(self) -> str:
        """Let the records of all steps say what the store holds for them; returns what it lacks, or ''.

        Downloads nothing and boots nothing.
        """
        if not self._use_media(self.recipe(), allow_unverified=True):
            return "the installer"
        for number in range(1, len(self.config.guest.phases) + 1):
            self.render(number)
            if self._use_image(number, self.digest(number)):
                return f"the image of phase {self.phase(number).name}"
        if read_record(self.clean_record, PhaseRecord) != self.phase_record(len(self.config.guest.phases)):
            self.snapshot()
        return ""

    def naming(self) -> contextlib.AbstractContextManager[None]:
        """Write records that name what is in the store; see vmtasks.images.prune."""
        return prune.naming(self.store, self.config.vm_dir)

    def _use_media(self, recipe: str, *, allow_unverified: bool) -> bool:
        """Whether the store has the installer; our record names it then."""
        with self.naming():
            record = self._media(recipe, allow_unverified=allow_unverified)
            if record is not None and record != read_record(self.installer_record, MediaRecord):
                write_record(self.installer_record, record)
        return record is not None

    def _use_image(self, number: int, digest: str) -> str:
        """Let our record of phase `number` name an image that the store holds; why there is none, or ''.

        It stands on the very bytes that our record before it names: another project may have built its own.
        """
        below = self.below(number)
        with self.naming():
            found, why = self.store.find(digest, chain=below.chain if below else "")
            if found is not None:
                ours = PhaseRecord(digest=found.digest, sha256=found.sha256)
                if ours != read_record(self.record(number), PhaseRecord):
                    write_record(self.record(number), ours)
        return why

    def below(self, number: int, *, look: Look = "time") -> ImageRecord | None:
        """The image that phase `number` grows from; None for the first phase. StateError when it is invalid."""
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

    # -- what the steps look at

    def digest(self, number: int) -> str:
        """Digest of the image of phase `number`, from the record before it and the files on its ISO."""
        hardware, phase = self.config.guest.machine, self.phase(number)
        talk = self.config.guest.dialogue.get(phase.dialogue, [])
        facts = plan.facts(hardware, phase, talk, self.config.disk_size)
        before = self.media().sha256 if number == 1 else self.phase_record(number - 1).digest
        return plan.phase_digest(before, self._iso_files(self.sources(number)), facts)

    def sources(self, number: int) -> dict[str, tuple[int, Path]]:
        """Path on the phase ISO -> (mode, where its bytes are), without the token."""
        folder = self.folder(number)
        found = {path.name: (path.stat().st_mode & 0o777, path) for path in _whole(folder)}
        for item in self.media().local_packages.get(self.phase(number).name, []):
            sha256, _, name = item.partition(" ")
            found[f"packages/{name}"] = (PLAIN, self.store.download(sha256))
        return found

    @staticmethod
    def _iso_files(sources: dict[str, tuple[int, Path]]) -> list[plan.IsoFile]:
        return [plan.IsoFile(path, mode, files.sha256(source)) for path, (mode, source) in sources.items()]

    def _media(self, recipe: str, *, allow_unverified: bool) -> MediaRecord | None:
        record = read_record(self.store.root / "media" / f"{recipe}.toml", MediaRecord)
        if record is None:
            return None
        if isinstance(self.config.guest.installer, Download) and not (record.verified or allow_unverified):
            ours = read_record(self.installer_record, MediaRecord)
            if ours is None or ours.sha256 != record.sha256:
                return None
        if fault := self.media_fault(record):
            progress.say(f"fetch: {fault}; fetching it again")
        return None if fault else record

    # -- small things

    def title(self, number: int) -> str:
        """`phase 1-install of tiny`."""
        return f"phase {self.phase(number).name} of {self.config.label}"

    def _waiting(self, what: str) -> progress.Say:
        return lambda holder: progress.say(f"{what}: {holder} is making it; waiting")

    def _job(self, number: int, digest: str, below: ImageRecord | None) -> make.Job:
        self._write_iso(number)  # another run may have rendered anew since `phase_iso`, and `digest` is of these files
        return make.Job(
            config=self.config,
            store=self.store,
            accel=self.accel,
            phase=self.phase(number),
            number=number,
            digest=digest,
            token=plan.token(self._iso_files(self.sources(number))),
            isos={"installer": self.installer(), "phase": self.iso(number)},
            below=below,
        )


def _whole(folder: Path) -> list[Path]:
    """The files in a folder, without those that another run is writing just now: their names begin with a dot."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _holds_public_key(path: Path) -> bool:
    try:
        return bool(arguments.public_keys(files.read_text(path), str(path)))
    except (OSError, ValueError, ConfigError):
        return False
