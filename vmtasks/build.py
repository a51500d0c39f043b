"""Carry out one build step of the plan: fetch, render, compose the phase ISO, boot the phase, publish the image.

Each step leaves a small record in the guest's state folder; the next step depends on that record, never on an image.
A finished phase is published in the store at once, so that no kill, and no loss of doit's database, costs it.
"""

import hashlib
from functools import cached_property
from pathlib import Path

import msgspec

from vmtasks import atomic, image, plan, proc, progress
from vmtasks.config import Config
from vmtasks.errors import StateError
from vmtasks.machine.accel import Accel, probe
from vmtasks.media import installer, template
from vmtasks.media.iso import write_iso
from vmtasks.media.tree import Entry
from vmtasks.model import PhaseTable
from vmtasks.store import MediaRecord, Store, file_fault, read_record, write_record

LOCK_S = 4 * 3600.0
PROGRAM, PLAIN = 0o555, 0o444


class PhaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a build step leaves for the next one: which image, and which bytes of it."""

    digest: str
    sha256: str


class Builder:
    """The build steps of one guest, with the places where their results are."""

    def __init__(self, config: Config) -> None:
        """Nothing is touched until a step is called."""
        self.config = config
        self.state = config.guest_state
        self.store = Store(config.store_dir)

    # -- places

    @property
    def installer_record(self) -> Path:
        """Target of `fetch`."""
        return self.state / "installer.toml"

    @property
    def clean_record(self) -> Path:
        """Target of `snapshot`: the image that machines start from."""
        return self.state / "clean.toml"

    @property
    def key(self) -> Path:
        """The user's private key; its public half is beside it with `.pub`."""
        return self.store.root / "keys" / "id_ed25519"

    def folder(self, number: int) -> Path:
        """Rendered files of phase `number` (from 1)."""
        return self.state / f"phase-{number}"

    def iso(self, number: int) -> Path:
        """ISO of phase `number`."""
        return self.state / f"phase-{number}.iso"

    def record(self, number: int) -> Path:
        """Record of phase `number`; that of number 0 is the installer's."""
        return self.state / f"phase-{number}.toml" if number else self.installer_record

    def log(self, number: int) -> Path:
        """Console of the last boot of phase `number`."""
        return self.state / "logs" / f"{self.phase(number).name}.console.log"

    def phase(self, number: int) -> PhaseTable:
        """Phase `number` as guest.toml has it."""
        return self.config.guest.phases[number - 1]

    @cached_property
    def accel(self) -> Accel:
        """The accelerator that works here; probed once for each boot of the host."""
        return probe(self.store.root / "accel.json", want=self.config.accel)

    # -- steps

    def make_key(self) -> None:
        """Make the user's key pair when it is first needed."""
        if self.key.is_file() and self.key.with_suffix(".pub").is_file():
            return
        with self.store.lock("key", timeout_s=60):
            if self.key.is_file():
                return
            self.key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            beside = self.key.with_name("new")
            for old in (beside, beside.with_suffix(".pub")):
                old.unlink(missing_ok=True)
            proc.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "vmtasks", "-f", beside], timeout_s=60)
            beside.with_suffix(".pub").rename(self.key.with_suffix(".pub"))
            beside.rename(self.key)

    def fetch(self) -> None:
        """Have the installer in the store and say in its record which file it is."""
        recipe = installer.recipe_digest(self.config)
        record = self._media(recipe)
        if record is None:
            with self.store.lock(f"media-{recipe[:32]}", timeout_s=LOCK_S, waiting=self._waiting("the installer")):
                record = self._media(recipe)
                if record is None:
                    with progress.step(
                        "fetch: the installer", expected_s=self._history.expected_s(f"fetch {recipe[:12]}")
                    ) as step:
                        record = installer.make(self.config, self.store, recipe, step.now)
                    write_record(self.store.root / "media" / f"{recipe}.toml", record)
                    self._history.record(f"fetch {recipe[:12]}", step.elapsed_s)
        write_record(self.installer_record, record)

    def render(self, number: int) -> None:
        """Write the phase's files; those that are as they were are left alone, and so is what depends on them."""
        self.make_key()
        phase, config = self.phase(number), self.config
        values = {
            "disk_serial": config.guest.machine.disk_serial,
            "guest": config.guest.name,
            "hostname": config.guest.name,
            "public_key": self.key.with_suffix(".pub").read_text().strip(),
            "ssh_user": config.guest.ssh.user,
            "vars": dict(config.vars),
            "version": config.version,
        }
        folder = self.folder(number)
        texts = {
            "lib.sh": (template.shipped("lib.sh"), PLAIN),
            "pfi.conf": ("pfi_script=run.sh\n", PLAIN),
            "phase.sh": (template.render(config.template(phase), values), PLAIN),
            "poweroff": (config.guest.poweroff + "\n", PLAIN),
            "run.sh": (template.shipped("run.sh"), PROGRAM),
        }
        for name, (text, mode) in texts.items():
            atomic.write_if_changed(folder / name, text, mode)
        for path in folder.iterdir():
            if path.name not in texts:
                path.unlink()

    def phase_iso(self, number: int) -> None:
        """Put the phase's files, its packages and its token on an ISO."""
        sources = self._sources(number)
        token = plan.token(self._iso_files(sources))
        entries = [Entry(path, "file", mode, source) for path, (mode, source) in sources.items()]
        entries.append(Entry("token", "file", PLAIN, f"{token}\n".encode()))
        if any(e.path.startswith("packages/") for e in entries):
            entries.append(Entry("packages", "dir", 0o555))
        write_iso(self.iso(number), entries, label=f"PHASE{number}")

    def build(self, number: int) -> None:
        """Have the image of phase `number` in the store and say in its record which it is.

        Boots a guest only if the store holds no intact image for the digest. PhaseError when the guest fails.
        """
        digest, title = self.digest(number), f"phase {self.phase(number).name} of {self.config.label}"
        record, why = self.store.find(digest)
        if record is None:
            with self.store.lock(f"image-{digest}", timeout_s=LOCK_S, waiting=self._waiting(title)) as lock:
                record, why = self.store.find(digest)
                if record is None:
                    if why != "not built yet":
                        progress.say(f"{title}: {why}; building it again")
                    self.store.drop(digest)
                    record = image.make(self._job(number, digest), lock)
        write_record(self.record(number), PhaseRecord(digest=record.digest, sha256=record.sha256))

    def snapshot(self) -> None:
        """Name the last phase's image `clean`."""
        last = self._phase_record(len(self.config.guest.phases))
        write_record(self.clean_record, last)

    # -- what the steps look at

    def digest(self, number: int) -> str:
        """Digest of the image of phase `number`, from the record before it and the files on its ISO."""
        hardware, phase = self.config.guest.machine, self.phase(number)
        talk = self.config.guest.dialogue.get(phase.dialogue, [])
        facts = plan.facts(hardware, phase, talk, self.config.disk_size)
        before = self._installer().sha256 if number == 1 else self._phase_record(number - 1).digest
        return plan.phase_digest(before, self._iso_files(self._sources(number)), facts)

    def installer(self) -> Path:
        """The installer's ISO in the store. StateError before `fetch`."""
        return self.store.download(self._installer().sha256)

    def why_stale(self, number: int) -> str:
        """Why the record of phase `number` (0: the installer) cannot be believed; empty when it can. Reads no image."""
        if number == 0:
            media = read_record(self.installer_record, MediaRecord)
            if media is None:
                return "there is no record of the installer"
            return file_fault(self.store.download(media.sha256), media.size, media.mtime_ns)
        return self.image_fault(self.record(number))

    def image_fault(self, record: Path) -> str:
        """Why the image that `record` names cannot be believed; empty when it can."""
        named = read_record(record, PhaseRecord)
        if named is None:
            return f"there is no record {record.name}"
        image, why = self.store.find(named.digest)
        if image is None:
            return why
        return "" if image.sha256 == named.sha256 else "the image was built anew"

    def _sources(self, number: int) -> dict[str, tuple[int, Path]]:
        """Path on the phase ISO -> (mode, where its bytes are), without the token."""
        folder = self.folder(number)
        found = {path.name: (path.stat().st_mode & 0o777, path) for path in sorted(folder.iterdir())}
        for item in self._installer().local_packages.get(self.phase(number).name, []):
            sha256, _, name = item.partition(" ")
            found[f"packages/{name}"] = (PLAIN, self.store.download(sha256))
        return found

    @staticmethod
    def _iso_files(sources: dict[str, tuple[int, Path]]) -> list[plan.IsoFile]:
        return [
            plan.IsoFile(path, mode, hashlib.sha256(source.read_bytes()).hexdigest())
            for path, (mode, source) in sources.items()
        ]

    def _installer(self) -> MediaRecord:
        record = read_record(self.installer_record, MediaRecord)
        if record is None:
            raise StateError(f"there is no usable record {self.installer_record}", hint="doit fetch")
        return record

    def _phase_record(self, number: int) -> PhaseRecord:
        record = read_record(self.record(number), PhaseRecord)
        if record is None:
            raise StateError(f"there is no usable record {self.record(number)}", hint=f"doit phase:{number}")
        return record

    def _media(self, recipe: str) -> MediaRecord | None:
        record = read_record(self.store.root / "media" / f"{recipe}.toml", MediaRecord)
        if record is None:
            return None
        wanted = [(record.sha256, record.size, record.mtime_ns)]
        for items in record.local_packages.values():
            for item in items:
                if not self.store.download(item.partition(" ")[0]).is_file():
                    return None
        fault = next((f for f in (file_fault(self.store.download(s), n, m) for s, n, m in wanted) if f), "")
        if fault:
            progress.say(f"fetch: {fault}; fetching it again")
        return None if fault else record

    # -- small things

    @cached_property
    def _history(self) -> progress.History:
        return progress.History(self.store.root / "history.json")

    def _waiting(self, what: str) -> progress.Say:
        return lambda holder: progress.say(f"{what}: {holder} is making it; waiting")

    def _job(self, number: int, digest: str) -> image.Job:
        below = self._phase_record(number - 1).digest if number > 1 else ""
        return image.Job(
            config=self.config,
            store=self.store,
            accel=self.accel,
            phase=self.phase(number),
            number=number,
            digest=digest,
            token=plan.token(self._iso_files(self._sources(number))),
            isos={"installer": self.installer(), "phase": self.iso(number)},
            below=self.store.record(below) if below else None,
        )
