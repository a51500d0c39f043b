"""PURE: the inputs of each build step, as named parts and digests chained from the installer to the suites.

A phase's digest covers the contents of its image, not speed or owner: it leaves out memory, CPUs and the accelerator,
and its scripts are rendered with a placeholder for the public key.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping

import msgspec

from vmtasks.config.load import Config
from vmtasks.config.tables import Exchange, HardwareTable, PhaseTable, SuiteTable

FORMAT = 2
"""Increased when the meaning of a digest changes, so that no old image is mistaken for a new one."""

OTHER_WAY = "vmtasks makes digests in another way now"
"""The cause for an image without recorded parts, or of another FORMAT."""

FORMAT_PART = "vmtasks: digests"
PUBLIC_KEY = f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{'A' * 43} vmtasks"
"""The placeholder that scripts are rendered with for a digest, so that it does not depend on the user's key."""

NOT_FETCHED = "not known until fetch"
PER_PHASE = ("render", "phase_iso", "phase")
"""The kinds of nodes that each phase has, as in `phase:1`."""

FROM_SUITE = ("command", "user", "cwd", "env", "format", "junit")
"""The keys of a suite that affect its result. The others set its deadline and what is fetched."""


class IsoFile(msgspec.Struct, frozen=True, order=True):
    """A file on a phase ISO, as the guest sees it."""

    path: str
    mode: int
    sha256: str


class Installer(msgspec.Struct, frozen=True, kw_only=True):
    """The installer's inputs, and the SHA-256 of the ISO made of them, `media`; '' if it is unknown.

    `recipe` is the digest of all parts. `packages`: those on each phase's CD, as `sha256 name`. `fault`: why the parts
    could not be read.
    """

    recipe: str = ""
    parts: dict[str, str] = {}
    media: str = ""
    packages: dict[str, list[str]] = {}
    fault: str = ""


class Rendering(msgspec.Struct, frozen=True, kw_only=True):
    """The sources of a phase's files, and the digests of these files rendered with PUBLIC_KEY, by named part.

    `fault`: why they cannot be rendered.
    """

    sources: dict[str, str]
    files: dict[str, str] = {}
    fault: str = ""


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """The inputs on this host, see vmtasks.images.reader. `tree` and `image` affect sync, build and suites only."""

    installer: Installer
    phases: tuple[Rendering, ...]
    tree: str = ""
    image: str = ""


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One step: its name, the named parts of its digest, the nodes that it depends on.

    `digest` is '' if it is unknown; `unknown` says why. `sources`: what the parts were rendered from, to name the
    edited input. `cost`: the step's key in the history of durations; '' for a step that takes no time.
    """

    name: str
    parts: dict[str, str]
    after: tuple[str, ...] = ()
    digest: str = ""
    unknown: str = ""
    sources: dict[str, str] = {}
    cost: str = ""


def plan(config: Config, inputs: Inputs) -> tuple[Node, ...]:
    """All nodes, each after those that it depends on."""
    return (*image_nodes(config, inputs), *suite_nodes(config, inputs.tree, inputs.image))


def image_nodes(config: Config, inputs: Inputs) -> tuple[Node, ...]:
    """The nodes from the installer to the snapshot."""
    made = inputs.installer
    fetch = Node(
        name="fetch", parts=made.parts, digest=made.recipe, unknown=made.fault, cost=f"fetch {made.recipe[:12]}"
    )
    nodes, before = [fetch], fetch
    for number, (phase, rendering) in enumerate(zip(config.guest.phases, inputs.phases, strict=True), 1):
        render = Node(
            name=f"render:{number}",
            parts=rendering.sources,
            digest=digest_of("render", rendering.sources),
            unknown=rendering.fault,
        )
        iso = _iso_node(number, phase, rendering, made)
        image = _phase_node(config, number, phase, iso, before, made)
        nodes += [render, iso, image]
        before = image
    nodes.append(
        Node(
            name="snapshot",
            parts={before.name: before.digest},
            after=(before.name,),
            digest=before.digest,
            unknown=before.unknown,
        )
    )
    return tuple(nodes)


def _iso_node(number: int, phase: PhaseTable, rendering: Rendering, made: Installer) -> Node:
    carried = {"packages": digest_of("packages", made.packages.get(phase.name, []))} if phase.packages else {}
    parts = {**rendering.files, **carried}
    unknown = rendering.fault or (NOT_FETCHED if phase.packages and not made.media else "")
    return Node(
        name=f"phase_iso:{number}",
        parts=parts,
        after=(f"render:{number}", "fetch"),
        digest="" if unknown else digest_of("iso", parts),
        unknown=unknown,
        sources=rendering.sources,
    )


def _phase_node(config: Config, number: int, phase: PhaseTable, iso: Node, before: Node, made: Installer) -> Node:
    talk = config.guest.dialogue.get(phase.dialogue, [])
    grown = {"installer": made.media} if number == 1 else {before.name: before.digest}
    parts = {
        FORMAT_PART: str(FORMAT),
        **grown,
        **iso.parts,
        **facts(config.guest.machine, phase, talk, config.disk_size),
    }
    above = (made.fault or ("" if made.media else NOT_FETCHED)) if number == 1 else before.unknown
    unknown = iso.unknown or above
    return Node(
        name=f"phase:{number}",
        parts=parts,
        after=(before.name, iso.name),
        digest="" if unknown else digest_of("phase", parts),
        unknown=unknown,
        sources=iso.sources,
        cost=f"phase {phase.name} of {config.label}",
    )


def facts(hardware: HardwareTable, phase: PhaseTable, dialogue: Iterable[Exchange], disk_size: int) -> dict[str, str]:
    """The hardware that a guest notices, by the name in guest.toml. `disk_size` in bytes.

    Machines with equal facts make the same image.
    """
    return {
        "boot": phase.boot,
        "cd_bus": hardware.cd_bus,
        "cds": " ".join(phase.cds),
        "dialogue": digest_of("dialogue", [[e.expect, e.send] for e in dialogue]),
        "disk_bus": hardware.disk_bus,
        "disk_serial": hardware.disk_serial,
        "disk_size": str(disk_size),
        "machine.type": hardware.type,
        "nic": hardware.nic,
        "rng": str(hardware.rng).lower(),
    }


def suite_nodes(config: Config, tree: str, image: str) -> tuple[Node, ...]:
    """The nodes that use a machine: sync, build, and the suites."""
    table = config.sync
    sync = {"tree": tree, "sync.source": table.source, "sync.dest": table.dest}
    build = build_parts(config, tree, image)
    nodes = [
        Node(name="sync", parts=sync, after=("snapshot",), digest=digest_of("sync", sync)),
        Node(name="build", parts=build, after=("sync",), digest=digest_of("build", build)),
    ]
    for name, suite in config.suites.items():
        parts = {**build, **suite_parts(suite)}
        nodes.append(Node(name=f"test:{name}", parts=parts, after=("build",), digest=digest_of("suite", parts)))
    return tuple(nodes)


def build_parts(config: Config, tree: str, image: str) -> dict[str, str]:
    """The tree, the image, the build and its place in the machine: the first parts of a suite's node."""
    return {
        "tree": tree,
        "image": image,
        "build.command": digest_of("text", config.build.command),
        "build.env": digest_of("env", config.build.env),
        "sync.dest": digest_of("text", config.sync.dest),
    }


def suite_parts(suite: SuiteTable) -> dict[str, str]:
    """The parts of a suite's table that affect its result, by key."""
    return {key: digest_of(key, getattr(suite, key)) for key in FROM_SUITE}


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The names of parts that differ between `old` and `new`, sorted."""
    return sorted(name for name in {*old, *new} if old.get(name) != new.get(name))


def file_part(file: IsoFile) -> str:
    """The digest of a file on a phase ISO."""
    return digest_of("file", [file.path, file.mode, file.sha256])


def files_digest(files: Iterable[IsoFile]) -> str:
    """SHA-256 (hex) over names, modes and contents, in the order of names."""
    return digest_of("files", [[f.path, f.mode, f.sha256] for f in sorted(files)])


def token(files: Iterable[IsoFile]) -> str:
    """The token that marks a sentinel line on the console as ours: in no script, and new if any file changes."""
    return digest_of("token", files_digest(files))[:16]


def suite_digest(parts: Mapping[str, object]) -> str:
    """Digest of parts in the form of earlier versions, in the records of suites' results and of synced trees."""
    return _sha256([1, "suite", dict(parts)])


def digest_of(kind: str, value: object) -> str:
    """SHA-256 (hex) of a value of texts, numbers, lists and tables. `kind` separates equal values of two kinds."""
    return _sha256([FORMAT, kind, value])


def _sha256(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
