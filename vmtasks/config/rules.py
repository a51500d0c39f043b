"""Rules across keys, files and this host; each violation is one line with a remedy."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from vmtasks.config.arguments import Forward, pattern_fault
from vmtasks.config.load import Config, Setting, show, show_size
from vmtasks.config.mistakes import key_path, suggest
from vmtasks.config.tables import Download, SuiteTable
from vmtasks.errors import ConfigError

PORTS = (1024, 65535)
FIRST_UNPRIVILEGED = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
CPUS = 255
"""The most that a machine type of QEMU takes without the kernel's help."""
DISK_BYTES = 1 << 51
"""The largest qcow2 with clusters of 64 KiB, as qemu-img makes them."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
ADDRESS = re.compile(r"https?://.|file:///|/|~", re.IGNORECASE)


def check(config: Config) -> None:
    """Raise ConfigError for the first rule that does not hold. Looks at the file system, changes nothing."""
    for problem in machine(config):
        raise ConfigError(problem)
    file = show(config.file)
    for problem in (*tree(config), *build(config), *suites(config)):
        raise ConfigError(f"{file}: {problem}")
    file = show(config.guest_dir / "guest.toml")
    for problem in (*guest(config), *questions(config), *installer(config), *dialogues(config), *expressions(config)):
        raise ConfigError(f"{file}: {problem}")


def machine(config: Config, options: Mapping[str, str] | None = None) -> Iterator[str]:
    """Values that this host cannot give, or no guest can use. They name their source themselves: not all are in a file.

    `options`: variable -> the command-line option that gave its value instead.
    """
    low, high = max(PORTS[0], first_port()), PORTS[1]
    where = {setting.variable.name: f"{origin(setting)} =" for setting in config.settings} | dict(options or {})
    if config.ssh_port is not None and not low <= config.ssh_port <= high:
        yield f'{where["port"]} {config.ssh_port}: out of range; use {low} to {high}, or "auto"'
    if not 1 <= config.cpus <= CPUS:
        yield f"{where['cpus']} {config.cpus}: QEMU gives a machine 1 to {CPUS} virtual CPUs; use one of these"
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if config.memory > host:
        yield f"{where['memory']} {show_size(config.memory)}: more than this host's {host >> 20}M; use less"
    if config.memory < 16 << 20:
        yield f"{where['memory']} {show_size(config.memory)}: too little for any guest; use 64M or more"
    if config.disk_size < 1 << 20:
        yield f"{where['disk']} {show_size(config.disk_size)}: too small for a disk; use 1M or more"
    if config.disk_size > DISK_BYTES:
        size, most = show_size(config.disk_size), show_size(DISK_BYTES)
        yield f"{where['disk']} {size}: more than a qcow2 image can have; use {most} or less"
    if config.version and not NAME.fullmatch(config.version):
        yield (
            f"{where['version']} {config.version!r}: names a folder too; "
            "use letters, digits, '.', '_' and '-', beginning with a letter or digit"
        )


def forwards(wanted: Iterable[Forward]) -> Iterator[str]:
    """Ports of this host that QEMU may not listen on: it runs without capabilities, also under root."""
    low = first_port()
    for forward in wanted:
        if 0 < forward.host < low:
            yield (
                f"-p {forward}: the host's side, {forward.host}, is below {low}, where QEMU may not listen, "
                f"also for root; use {low} to {PORTS[1]}, or 0 for any that is free"
            )


def first_port() -> int:
    """The lowest port of this host that needs no privilege."""
    try:
        return int(FIRST_UNPRIVILEGED.read_text())
    except (OSError, ValueError):
        return PORTS[0]


def origin(setting: Setting) -> str:
    """Where a setting is changed: `config/vm.toml: machine.memory`, or `environment VM_MEMORY (machine.memory)`."""
    if setting.source.endswith(".toml"):
        return f"{setting.source}: {setting.variable.key}"
    return f"{setting.source.rstrip('=')} ({setting.variable.key})"


def tree(config: Config) -> Iterator[str]:
    """A tree that cannot be synced, and values that no template takes."""
    source = config.root / config.sync.source
    if not source.is_dir():
        yield f"sync.source = {config.sync.source!r}: there is no folder {show(source)}; name the tree to sync"
    yield from destination(config.sync.dest)
    for pattern in config.sync.exclude:
        if fault := pattern_fault(pattern):
            yield f"sync.exclude = {pattern!r}: {fault}"
    for name in config.vars:
        if name not in config.guest.vars:
            where = key_path(["vars", config.guest.name, name])
            yield f"{where}: the guest has no such value; {suggest(name, config.guest.vars)}"


def destination(dest: str) -> Iterator[str]:
    """Destinations where `--delete` would remove the system or the login."""
    path = PurePosixPath(dest)
    if not path.parts or path.parts == ("/",) or ".." in path.parts:
        yield f"sync.dest = {dest!r}: what is not in the source is deleted there; name a folder of its own, as in 'src'"
    elif dest.startswith(("~", "-")) or not dest.isprintable():
        yield f"sync.dest = {dest!r}: not a folder's name; use one relative to the login user's home, or absolute"


def build(config: Config) -> Iterator[str]:
    """A build that cannot run."""
    yield from variables("build", config.build.env)


def variables(table: str, env: Iterable[str]) -> Iterator[str]:
    """Names that are no shell variable."""
    for name in env:
        if not VARIABLE.fullmatch(name):
            yield f"{table}.{key_path(['env', name])}: not a variable's name; use letters, digits and '_'"


def suites(config: Config) -> Iterator[str]:
    """Suites that cannot run."""
    for name, suite in config.suites.items():
        table = key_path(["suites", name])
        if not NAME.fullmatch(name):
            yield f"{table}: a suite's name is also a file name; use letters, digits, '.', '_' and '-'"
        if not suite.command.strip():
            yield f"{table}.command = {suite.command!r}: empty; say what runs the tests"
        yield from paths(table, suite)
        yield from variables(table, suite.env)
    for name in config.quick:
        if name not in config.suites:
            yield f"quick.suites = {name!r}: no such suite; {suggest(name, config.suites)}"


def paths(table: str, suite: SuiteTable) -> Iterator[str]:
    """Paths that leave the suite's folder."""
    for key, values in {"artifacts": suite.artifacts, "cwd": [suite.cwd], "junit": [suite.junit]}.items():
        for value in values:
            if value.startswith("/") or ".." in Path(value).parts:
                yield f"{table}.{key} = {value!r}: leaves the suite's folder; use a path below it"


def guest(config: Config) -> Iterator[str]:
    """Faults of a guest's folder as a whole."""
    file = config.guest
    if file.name != config.guest_dir.name:
        yield f"name = {file.name!r}: must be the folder's name, {config.guest_dir.name!r}"
    crowded = file.machine.disk_bus == file.machine.cd_bus == "ide" and "q35" not in file.machine.type
    room = 3 if crowded else 4
    for phase in file.phases:
        template = config.template(phase)
        if not template.is_file():
            yield f"phases.name = {phase.name!r}: there is no {show(template)}; write it or remove the phase"
        if phase.dialogue and phase.dialogue not in file.dialogue:
            yield f"phases.dialogue = {phase.dialogue!r}: no such dialogue; {suggest(phase.dialogue, file.dialogue)}"
        if phase.boot == "cd" and phase.cds[0] != "installer":
            yield f"phases.cds = {phase.cds}: a phase that boots from CD needs 'installer' first"
        if "phase" not in phase.cds:
            yield f"phases.cds = {phase.cds}: the phase's own CD is missing; add 'phase'"
        if len(phase.cds) > room:
            yield f"phases.cds = {phase.cds}: beside an IDE disk there is room for {room} CDs; use another bus"
    if len({phase.name for phase in file.phases}) < len(file.phases):
        yield "phases.name: two phases have one name; rename one"


def questions(config: Config) -> Iterator[str]:
    """Questions with no answer, or two."""
    for question in config.guest.questions:
        if sum(map(bool, (question.observed, question.command, question.host))) != 1:
            yield f"questions.asks = {question.asks!r}: one way to answer it; set observed, command or host"


def installer(config: Config) -> Iterator[str]:
    """A download that cannot work, or that lacks what a phase asks for."""
    made = config.guest.installer
    if not isinstance(made, Download):
        return
    yield from versions(made, config.version)
    for key, text in (("file", made.file), ("sums", made.sums)):
        if text and not NAME.fullmatch(text.replace("{version}", "v")):
            yield f"installer.{key} = {text!r}: not a file's name; use letters, digits, '.', '_' and '-'"
    for mirror in made.mirrors:
        if not ADDRESS.match(mirror):
            yield f"installer.mirrors = {mirror!r}: not an address; use https://, http://, file:/// or an absolute path"
    if made.mirror_env and not VARIABLE.fullmatch(made.mirror_env):
        yield f"installer.mirror_env = {made.mirror_env!r}: not a variable's name; use letters, digits and '_'"
    for phase in config.guest.phases:
        if phase.packages:
            yield (
                f"phases.packages = {phase.packages}: an installer that is downloaded brings no packages for a phase; "
                "remove the key, and install them in the phase's script"
            )


def versions(made: Download, version: str) -> Iterator[str]:
    """Placeholders other than {version}, and {version} where the guest has none."""
    for key, text in (("file", made.file), *(("mirrors", mirror) for mirror in made.mirrors)):
        rest = text.replace("{version}", "")
        if "{" in rest or "}" in rest:
            yield f"installer.{key} = {text!r}: only {{version}} is replaced; remove the other braces"
        elif rest != text and not version:
            yield f"installer.{key} = {text!r}: the guest has no version; write version = ..."


def dialogues(config: Config) -> Iterator[str]:
    """Answers that cannot be typed with echo."""
    for name, exchanges in config.guest.dialogue.items():
        for exchange in exchanges:
            line = exchange.send.removesuffix("\r")
            if exchange.echo and not (line and line.isprintable() and line.isascii() and line != exchange.send):
                where = f"{key_path(['dialogue', name])}.send = {exchange.send!r}"
                yield f"{where}: with echo = true it must be a line of plain text that ends in \\r"


def expressions(config: Config) -> Iterator[str]:
    """Expressions that do not compile."""
    texts = [f.expect for f in config.guest.failures] + [e.expect for d in config.guest.dialogue.values() for e in d]
    for text in texts:
        try:
            re.compile(text)
        except (re.error, OverflowError) as error:
            yield f"expect = {text!r}: not a regular expression ({error}); correct it"
