"""Reads the plan's inputs on this host, and judges which steps are up to date.

A step is up to date exactly when its record has the digest of its node, and what the record names exists, intact.
Cheap to import, because doit asks at every run, even if there is nothing to do. Writes nothing.
"""

import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path

import msgspec

from vmtasks.config.tables import Download
from vmtasks.errors import VmTasksError
from vmtasks.host import files
from vmtasks.images import plan
from vmtasks.images.plan import Inputs, Installer, IsoFile, Node, Rendering
from vmtasks.images.workspace import BuiltRecord, IsoRecord, PhaseRecord, RenderRecord, Workspace
from vmtasks.media import template
from vmtasks.store.records import ImageRecord, MediaRecord, read_json, read_record

PROGRAM, PLAIN = 0o555, 0o444
PFI = "pfi_script=run.sh\n"
MODES = {"lib.sh": PLAIN, "pfi.conf": PLAIN, "phase.sh": PLAIN, "poweroff": PLAIN, "run.sh": PROGRAM}
"""The files that a phase is rendered into."""
REBUILT = "the image below it was rebuilt"
SHIPPED = ("lib.sh", "run.sh")


class Texts(msgspec.Struct, frozen=True, kw_only=True):
    """The sources of a phase, read once: the template, vmtasks' scripts by name, all values except the key."""

    template: str
    shipped: dict[str, str]
    values: dict[str, object]


class Reader(Workspace):
    """One guest's plan, and which of its steps are up to date."""

    # -- the plan's inputs

    def nodes(self, read: Mapping[int, Texts] | None = None) -> dict[str, Node]:
        """The nodes from `fetch` to `snapshot` by name. `read`: texts already read, by phase number."""
        return {node.name: node for node in plan.image_nodes(self.config, self.inputs(read or {}))}

    def inputs(self, read: Mapping[int, Texts]) -> Inputs:
        """The inputs of the images' plan on this host now. `read`: texts already read, by phase number."""
        phases = tuple(self.rendering(number, read.get(number)) for number in self.numbers)
        return Inputs(installer=self._installer(), phases=phases)

    @property
    def numbers(self) -> range:
        """The numbers of all phases."""
        return range(1, len(self.config.guest.phases) + 1)

    def _installer(self) -> Installer:
        try:
            recipe, parts = self.recipe()
        except (OSError, VmTasksError) as error:
            return Installer(fault=_said(error))
        media = self.known_media(recipe)[0]
        if media is None:
            return Installer(recipe=recipe, parts=parts)
        return Installer(recipe=recipe, parts=parts, media=media.sha256, packages=media.local_packages)

    def known_media(self, recipe: str, *, allow_unverified: bool = False) -> tuple[MediaRecord | None, str]:
        """The record of an installer of this recipe, ours or the store's, and why the store lacks it, or ''."""
        ours = read_record(self.installer_record, MediaRecord)
        if ours is not None and ours.recipe == recipe and not self.media_fault(ours):
            return ours, ""
        record = read_record(self.store.root / "media" / f"{recipe}.toml", MediaRecord)
        if record is None and ours is not None and ours.recipe == recipe:
            record = ours
        if record is None:
            return None, ""
        trusted = record.verified or allow_unverified or (ours is not None and ours.sha256 == record.sha256)
        if isinstance(self.config.guest.installer, Download) and not trusted:
            return None, ""
        return record, self.media_fault(record)

    def read(self, number: int) -> Texts:
        """Read the sources of phase `number`. OSError, UnicodeDecodeError."""
        config = self.config
        return Texts(
            template=template.read(config.template(self.phase(number))),
            shipped={name: template.shipped(name) for name in SHIPPED},
            values={
                "disk_serial": config.guest.machine.disk_serial,
                "guest": config.guest.name,
                "hostname": config.guest.name,
                "ssh_user": config.guest.ssh.user,
                "vars": dict(config.vars),
                "version": config.version,
            },
        )

    def part_names(self, number: int) -> dict[str, str]:
        """File name -> part, named as a person edits it."""
        return {
            "lib.sh": "vmtasks: lib.sh",
            "pfi.conf": "vmtasks: pfi.conf",
            "phase.sh": self.config.template(self.phase(number)).name,
            "poweroff": "poweroff",
            "run.sh": "vmtasks: run.sh",
        }

    def sources(self, number: int, texts: Texts) -> dict[str, str]:
        """The parts of the node `render:N`."""
        names, values = self.part_names(number), dict(texts.values)
        own = values.pop("vars")
        parts = {
            names["phase.sh"]: text_digest(texts.template),
            names["poweroff"]: text_digest(self.config.guest.poweroff),
        }
        parts |= {names[name]: text_digest(text) for name, text in texts.shipped.items()}
        parts |= {"machine.disk_serial": str(values["disk_serial"]), "ssh.user": str(values["ssh_user"])}
        parts |= {"name": str(values["guest"]), "version": str(values["version"])}
        parts |= {f"vars.{name}": plan.digest_of("value", value) for name, value in _table(own).items()}
        return {**parts, plan.FORMAT_PART: f"{plan.FORMAT} {text_digest(PFI)}"}

    def texts_by_part(self, number: int, texts: Texts) -> dict[str, str]:
        """The source texts of phase `number`, by the part names of sources()."""
        names = self.part_names(number)
        return {
            names["phase.sh"]: texts.template,
            names["poweroff"]: self.config.guest.poweroff + "\n",
            **{names[name]: text for name, text in texts.shipped.items()},
        }

    def render_files(self, number: int, texts: Texts, public_key: str) -> dict[str, str]:
        """The text of each file of the phase, with this public key. ConfigError for an invalid template."""
        path = self.config.template(self.phase(number))
        return {
            **texts.shipped,
            "pfi.conf": PFI,
            "phase.sh": template.render(path, {**texts.values, "public_key": public_key}, texts.template),
            "poweroff": self.config.guest.poweroff + "\n",
        }

    def rendering(self, number: int, texts: Texts | None = None) -> Rendering:
        """Phase `number` for the plan, taken from the record of an earlier rendering if the sources are the same."""
        sources: dict[str, str] = {}
        try:
            texts = texts or self.read(number)
            sources = self.sources(number, texts)
            known = self.render_record(number)
            if known is not None and known.digest == plan.digest_of("render", sources):
                return Rendering(sources=sources, files=known.files)
            made = self.render_files(number, texts, plan.PUBLIC_KEY)
        except (OSError, UnicodeDecodeError, VmTasksError) as error:
            return Rendering(sources=sources, fault=_said(error))
        return Rendering(sources=sources, files=self.file_parts(number, made))

    def file_parts(self, number: int, made: Mapping[str, str]) -> dict[str, str]:
        """The digests of rendered files by named part."""
        names = self.part_names(number)
        return {
            names[name]: plan.file_part(IsoFile(name, MODES[name], text_digest(text))) for name, text in made.items()
        }

    # -- records beside those of the workspace

    def render_record(self, number: int) -> RenderRecord | None:
        """The record of phase `number`'s last rendering; None if it is missing or unreadable."""
        return read_json(self.render_file(number), RenderRecord)

    def render_file(self, number: int) -> Path:
        """The file of render_record()."""
        return self.home / f"render-{number}.json"

    def built(self, number: int) -> BuiltRecord | None:
        """The sources of the image that our record of phase `number` names, or None."""
        return read_json(self.built_file(number), BuiltRecord)

    def built_file(self, number: int) -> Path:
        """The file of built()."""
        return self.home / f"phase-{number}.json"

    def iso_file(self, number: int) -> Path:
        """The file of the IsoRecord of phase `number`."""
        return self.home / f"phase-{number}.iso.json"

    # -- keys

    def key_of(self, number: int, nodes: Mapping[str, Node]) -> Path:
        """The private key whose public half phase `number` is rendered with.

        That of its backing image, or else of an image with the same digest, or else the store's.
        """
        for name in (f"phase:{number - 1}", f"phase:{number}"):
            digest = nodes[name].digest if name in nodes else ""
            kept = self.store.snapshot_key(digest)
            if digest and kept.is_file():
                return kept
        return self.key

    def find_image(
        self, number: int, digest: str, sha256: str = "", *, chain: str | None = None
    ) -> tuple[ImageRecord | None, str]:
        """As Store.find(), for an image of phase `number`: without the private key that it accepts there is none.

        The key is in an image from the first phase whose files have it. A store may be copied without its keys.
        """
        found, why = self.store.find(digest, sha256, chain=chain)
        if found is None or self.store.snapshot_key(digest).is_file():
            return found, why
        if any(map(self._writes_key, range(1, number + 1))):
            return None, "the private key that it accepts is not in the store"
        return found, why

    def _writes_key(self, number: int) -> bool:
        """Whether the rendered files of a phase hold the public key: with another key they are other files."""
        texts = self.read(number)
        one, other = (self.render_files(number, texts, plan.PUBLIC_KEY + end) for end in ("", "-other"))
        return one != other

    def public_half(self, private: Path) -> str:
        """The `authorized_keys` line of a key in the store; '' if it is missing or unreadable."""
        try:
            return files.read_text(private.with_name(f"{private.name}.pub")).strip()
        except (OSError, ValueError):
            return ""

    # -- the one judge

    def why_stale(self, name: str, nodes: Mapping[str, Node] | None = None) -> str:
        """Why the step `name` must run, or ''. `nodes` as returned by nodes()."""
        return "; ".join(self.causes(name, nodes))

    def causes(self, name: str, nodes: Mapping[str, Node] | None = None) -> list[str]:
        """The reasons why the step `name` must run. Reads no image whose size and time match its record."""
        nodes = nodes or self.nodes()
        kind, _, number = name.partition(":")
        if kind == "fetch":
            return self._fetch_causes(nodes)
        if kind == "snapshot":
            return self._snapshot_causes(nodes)
        judge = {"render": self._render_causes, "phase_iso": self._iso_causes, "phase": self._phase_causes}[kind]
        return judge(int(number), nodes)

    def _fetch_causes(self, nodes: Mapping[str, Node]) -> list[str]:
        node, record = nodes["fetch"], read_record(self.installer_record, MediaRecord)
        if node.unknown:
            return [node.unknown]
        if record is None:
            return ["there is no record of the installer"]
        if record.recipe != node.digest:
            return self.named(record.parts, node) or ["what the installer is made of has changed"]
        return _some(self.media_fault(record))

    def _render_causes(self, number: int, nodes: Mapping[str, Node]) -> list[str]:
        node, record = nodes[f"render:{number}"], self.render_record(number)
        if node.unknown:
            return [node.unknown]
        if record is None:
            return ["it has not been rendered yet"]
        if record.digest != node.digest:
            return self.named(record.parts, node, number)
        if record.key != self.public_half(self.key_of(number, nodes)):
            return ["the public key changed"]
        folder = self.folder(number)
        return [f"{folder.name}/{name} is not as it was rendered" for name in MODES if not _is(folder / name, record)]

    def _iso_causes(self, number: int, nodes: Mapping[str, Node]) -> list[str]:
        node, record, iso = nodes[f"phase_iso:{number}"], read_json(self.iso_file(number), IsoRecord), self.iso(number)
        if node.unknown:
            return [node.unknown]
        if not iso.is_file():
            return [f"{iso} is not a file" if iso.exists() else f"there is no {iso.name}"]
        if record is None:
            return [f"there is no record of {iso.name}"]
        if record.digest != node.digest:
            return self.named(record.parts, node, number)
        if record.key != self.public_half(self.key_of(number, nodes)):
            return ["the public key changed"]
        stat = iso.stat()
        same = (stat.st_size, stat.st_mtime_ns) == (record.size, record.mtime_ns)
        return [] if same else [f"{iso.name} is not as it was written"]

    def _phase_causes(self, number: int, nodes: Mapping[str, Node]) -> list[str]:
        named = read_record(self.record(number - 1), PhaseRecord) if number > 1 else None
        return self.phase_causes(number, nodes, self.store.record(named.digest, named.sha256) if named else None)

    def phase_causes(self, number: int, nodes: Mapping[str, Node], below: ImageRecord | None) -> list[str]:
        """As causes(), for a phase with the backing image `below`; None for the first phase, or if it is missing."""
        node, path = nodes[f"phase:{number}"], self.record(number)
        record = read_record(path, PhaseRecord)
        if record is None:
            return [f"there is no record {path.name}"]
        if node.unknown:
            return [node.unknown]
        if record.digest != node.digest:
            built = self.built(number)
            same = built is not None and built.digest == record.digest
            return self.named(record.parts, node, number, built.sources if built and same else None)
        found, fault = self.find_image(number, record.digest, record.sha256)
        if found is None or number == 1:
            return _some(fault)
        grown = below is not None and below.chain == found.backing_sha256
        return [] if grown else [REBUILT]

    def _snapshot_causes(self, nodes: Mapping[str, Node]) -> list[str]:
        last = read_record(self.record(self.numbers[-1]), PhaseRecord)
        return self.snapshot_causes(nodes, last.sha256 if last else "")

    def snapshot_causes(self, nodes: Mapping[str, Node], sha256: str) -> list[str]:
        """As causes(), for the snapshot that should name the image with the digest of bytes `sha256`."""
        node, record = nodes["snapshot"], read_record(self.clean_record, PhaseRecord)
        if record is None:
            return [f"there is no record {self.clean_record.name}"]
        if node.unknown:
            return [node.unknown]
        if (record.digest, record.sha256) != (node.digest, sha256):
            return [f"{node.after[0]} has another image"]
        return _some(self.image_fault(self.clean_record))

    def named(
        self, old: Mapping[str, str], node: Node, number: int = 0, sources: Mapping[str, str] | None = None
    ) -> list[str]:
        """The changed parts, as causes. A rendered file is named by its changed source, if that is known.

        `number`: the phase whose texts give the changed line; 0 for none.
        """
        if not old:
            return [plan.OTHER_WAY] if node.name != "fetch" else []
        changed = plan.changes(old, node.parts)
        if plan.FORMAT_PART in changed:
            return [plan.OTHER_WAY]
        template_name = next((name for name in changed if name.endswith(".sh.j2")), "")
        if template_name and sources:
            deeper = [name for name in plan.changes(sources, node.sources) if name not in (plan.FORMAT_PART, *changed)]
            if sources.get(template_name) == node.sources.get(template_name) and deeper:
                changed.remove(template_name)
            changed += deeper
        lines = {name: _first_other(*pair) for name, pair in self.edited(number).items()} if number else {}
        return [_told(name, old, node.parts) + (f" (line {lines[name]})" if name in lines else "") for name in changed]

    def edited(self, number: int) -> dict[str, tuple[str, str]]:
        """The texts of a phase that changed after its image was made: part -> (old text, new text)."""
        built = self.built(number)
        now = self.texts_by_part(number, self.read(number)) if built else {}
        was = built.texts if built else {}
        return {part: (was[part], text) for part, text in now.items() if part in was and was[part] != text}


def _told(name: str, old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """The cause for one changed part; for a previous phase, that it makes another image."""
    if name.startswith("phase:"):
        return f"{name} makes another image"
    if name in new and name not in old:
        return f"{name} is new" if old else f"{name} changed"
    return f"{name} is gone" if name in old and name not in new else f"{name} changed"


def _first_other(old: str, new: str) -> int:
    """The number of the first line of `new` that differs from `old`."""
    pairs = enumerate(itertools.zip_longest(old.splitlines(), new.splitlines()), 1)
    return next((number for number, (was, is_now) in pairs if was != is_now), 1)


def _some(fault: str) -> list[str]:
    return [fault] if fault else []


def _table(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def text_digest(text: str) -> str:
    """SHA-256 (hex) of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def _said(error: Exception) -> str:
    return error.message if isinstance(error, VmTasksError) else str(error)


def _is(path: Path, record: RenderRecord) -> bool:
    """Whether a rendered file still has the mode and bytes that were written."""
    try:
        return path.stat().st_mode & 0o777 == MODES[path.name] and files.sha256(path) == record.left.get(path.name)
    except OSError:
        return False
