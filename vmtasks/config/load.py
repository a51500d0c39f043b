"""vm.toml + guest.toml + variables -> one frozen Config, or ConfigError.

Precedence, strongest first: doit variables (`memory=1G`), environment (`VM_MEMORY=1G`), vm.toml, guest.toml.
"""

import os
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET

from vmtasks.config.mistakes import explain, nul, suggest
from vmtasks.config.tables import BuildTable, Download, GuestFile, PhaseTable, SuiteTable, SyncTable, Value, VmFile
from vmtasks.errors import ConfigError

CONFIG_PATH = Path("config/vm.toml")
PHASES_PATH = Path("phases")
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
FALLBACK_PORTS = range(22220, 22230)
"""Ports offered when the configured one is taken."""

F = TypeVar("F", VmFile, GuestFile)


class Variable(msgspec.Struct, frozen=True):
    """A setting of the command line, `name=...`, and of the environment, any of `env`."""

    name: str
    env: tuple[str, ...]
    key: str
    doc: str
    number: bool = False


VARIABLES = (
    Variable("accel", ("VM_ACCEL",), "machine.accel", "auto, kvm, hvf or tcg"),
    Variable(
        "cache", ("VM_DISK_CACHE",), "machine.disk_cache", "how this host caches the disk: writeback, none, unsafe"
    ),
    Variable("config", ("VM_CONFIG",), "", "the configuration file, if it is not config/vm.toml"),
    Variable("cpus", ("VM_CPUS",), "machine.cpus", "virtual CPUs", number=True),
    Variable("dir", ("VM_DIR",), "", "folder of records, machines, logs and results"),
    Variable("disk", ("VM_DISK_SIZE",), "machine.disk_size", "size of the guest's disk"),
    Variable("guest", ("VM_GUEST",), "guest", "folder in phases/"),
    Variable("memory", ("VM_MEMORY",), "machine.memory", "RAM of the machine"),
    Variable("name", ("VM_NAME",), "machine.name", "name of the machine"),
    Variable("network", ("VM_NETWORK",), "machine.network", "user, or none: only SSH reaches the guest"),
    Variable("port", ("VM_SSH_PORT", "SSH_PORT"), "machine.ssh_port", 'loopback port for SSH, or "auto"', number=True),
    Variable("store", ("VMTASKS_STORE",), "", "folder of downloads and images, shared by all projects"),
    Variable("version", (), "version", "version of the guest"),
)


class Setting(msgspec.Struct, frozen=True):
    """A value and where it came from, for `doit help_vars`."""

    variable: Variable
    value: str
    source: str


class Config(msgspec.Struct, frozen=True):
    """The configuration of a run. Sizes are in bytes, paths absolute."""

    root: Path
    file: Path
    guest: GuestFile
    guest_dir: Path
    version: str
    vm_dir: Path
    store_dir: Path
    name: str
    memory: int
    cpus: int
    disk_size: int
    disk_cache: str
    ssh_port: int | None
    accel: str
    network: str
    sync: SyncTable
    build: BuildTable
    suites: Mapping[str, SuiteTable]
    quick: tuple[str, ...]
    vars: Mapping[str, Value]
    settings: tuple[Setting, ...]

    @property
    def label(self) -> str:
        """`tiny`, or `dragonfly-6.4.2` where the guest has versions: names this guest's folder under vm_dir."""
        return f"{self.guest.name}-{self.version}" if self.version else self.guest.name

    @property
    def guest_state(self) -> Path:
        """Folder of this guest's records and phase ISOs."""
        return self.vm_dir / self.label

    def template(self, phase: PhaseTable) -> Path:
        """The phase's script as the user wrote it."""
        return self.guest_dir / f"{phase.name}.sh.j2"


def parse_size(text: str, option: str = "") -> int:
    """`20G`, `20GB`, `512MB`, `1024` -> bytes; binary units, no fractions. ConfigError, naming `option`, for others."""
    match = re.fullmatch(r"([1-9][0-9]{0,20})(?:([KMGT])B?|B)?", text.strip(), re.IGNORECASE)
    if match is None:
        where = f"{option} {text!r}".lstrip()
        raise ConfigError(f"{where}: not a size; use a whole number with K, M, G or T, as in 20G")
    return int(match[1]) * UNITS[(match[2] or "").upper()]


def show_size(size: int) -> str:
    """Bytes -> the shortest exact form that parse_size reads back."""
    unit = max((u for u in UNITS if size % UNITS[u] == 0), key=lambda u: UNITS[u])
    return f"{size // UNITS[unit]}{unit}"


def load(
    root: Path,
    variables: Mapping[str, str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """Read the project at `root`. Raises ConfigError with one line: file, key, value, remedy."""
    overrides = _overrides(variables or {}, environ)
    given = {variable.name: (text, source) for variable, text, source in overrides}
    path = root / (_place(*given["config"], "file") if "config" in given else CONFIG_PATH)
    raw = _read(path)
    for variable, text, source in overrides:
        _apply(raw, variable, text, source)
    guest_source = show(path) if "guest" in raw else "default"
    vm = _convert(raw, VmFile, path, overrides)
    guest_dir = root / PHASES_PATH / vm.guest
    guest_path = guest_dir / "guest.toml"
    if not guest_path.is_file():
        there = sorted(p.parent.name for p in (root / PHASES_PATH).glob("*/guest.toml"))
        where = _source("guest", overrides) or f"{show(path)}: guest"
        raise ConfigError(
            f"{where} = {vm.guest!r}: there is no {show(guest_path)}; guests here: {', '.join(there) or 'none'}"
        )
    guest = _convert(_read(guest_path), GuestFile, guest_path, ())
    return _assemble(root, path, vm, guest, guest_dir, guest_source, overrides, environ)


def without_project(variables: Mapping[str, str] | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """The defaults of a guest that comes with vmtasks, with its state in the user's state folder.

    Raises ConfigError when there is no such guest.
    """
    overrides = _overrides(variables or {}, environ)
    given = {variable.name: text for variable, text, _ in overrides}
    vm = VmFile(guest=given.get("guest", "tiny"))
    guest_dir = shipped() / PHASES_PATH / vm.guest
    if not (guest_dir / "guest.toml").is_file():
        there = sorted(p.parent.name for p in (shipped() / PHASES_PATH).glob("*/guest.toml"))
        raise ConfigError(
            f"there is no project here (no {CONFIG_PATH}), and no guest {vm.guest!r} comes with vmtasks; "
            f"guests: {', '.join(there)}"
        )
    raw: dict[str, Any] = {"guest": vm.guest}
    for variable, text, source in overrides:
        _apply(raw, variable, text, source)
    vm = _convert(raw, VmFile, Path("the environment"), overrides)
    guest = _convert(_read(guest_dir / "guest.toml"), GuestFile, guest_dir / "guest.toml", ())
    root = default_state(environ)
    if "dir" not in given:
        dir_variable = next(variable for variable in VARIABLES if variable.name == "dir")
        overrides = (*overrides, (dir_variable, str(root), "default"))
    return _assemble(root, root / CONFIG_PATH, vm, guest, guest_dir, "default", overrides, environ)


def shipped() -> Path:
    """The folder of the guests that come with vmtasks: in the package, or the repository around it."""
    package = Path(__file__).parent.parent
    return package / "share" if (package / "share").is_dir() else package.parent


def default_state(environ: Mapping[str, str]) -> Path:
    """Folder of machines that belong to no project: in the user's state folder."""
    return _user_folder(environ, "XDG_STATE_HOME", ".local/state")


def _assemble(
    root: Path,
    path: Path,
    vm: VmFile,
    guest: GuestFile,
    guest_dir: Path,
    guest_source: str,
    overrides: tuple[tuple[Variable, str, str], ...],
    environ: Mapping[str, str],
) -> Config:
    given = {variable.name: (text, source) for variable, text, source in overrides}
    version, version_source = (vm.version, show(path)) if vm.version else (guest.version, "guest.toml")
    if guest.version_env and environ.get(guest.version_env) and "version" not in given:
        version, version_source = environ[guest.version_env], f"environment {guest.version_env}"
    folder = _place(*given["dir"], "folder") if "dir" in given else Path(".vm")
    store = _place(*given["store"], "folder") if "store" in given else default_store(environ)
    values = {
        **_machine_values(vm, guest, path, version),
        "config": (show(path), "default"),
        "dir": (str(folder), "default"),
        "guest": (vm.guest, guest_source),
        "store": (str(store), "default"),
        "version": (version, version_source),
    }
    settings = tuple(
        Setting(v, values[v.name][0], given[v.name][1] if v.name in given else values[v.name][1]) for v in VARIABLES
    )
    return Config(
        root=root,
        file=path,
        guest=guest,
        guest_dir=guest_dir,
        version=version,
        vm_dir=root / folder,
        store_dir=Path.cwd() / store,
        name=values["name"][0],
        memory=parse_size(values["memory"][0]),
        cpus=int(values["cpus"][0]),
        disk_size=parse_size(values["disk"][0]),
        disk_cache=values["cache"][0],
        ssh_port=None if values["port"][0] == "auto" else int(values["port"][0]),
        accel=values["accel"][0],
        network=values["network"][0],
        sync=vm.sync,
        build=vm.build,
        suites=vm.suites,
        quick=tuple(vm.quick.suites),
        vars={**guest.vars, **vm.vars.get(guest.name, {})},
        settings=settings,
    )


def _machine_values(vm: VmFile, guest: GuestFile, path: Path, version: str) -> dict[str, tuple[str, str]]:
    """Each setting of the machine, with its source: the project's file, or the default."""
    machine, hardware = vm.machine, guest.machine
    return {
        "accel": _from(machine.accel, "auto", path, "default"),
        "cache": _from(machine.disk_cache, "writeback", path, "default"),
        "cpus": _from(machine.cpus, hardware.cpus, path, "guest.toml"),
        "disk": _from(machine.disk_size, hardware.disk_size, path, "guest.toml"),
        "memory": _from(machine.memory, hardware.memory, path, "guest.toml"),
        "name": _from(machine.name, f"{vm.guest}-{version}" if version else vm.guest, path, "guest and version"),
        "network": _from(machine.network, "user", path, "default"),
        "port": _from(machine.ssh_port, 2222, path, "default"),
    }


def help_table(config: Config, environ: Mapping[str, str] = os.environ) -> list[tuple[str, str, str, str, str]]:
    """Rows for `doit help_vars`: variable, environment, value, where it came from, meaning."""
    rows = []
    for s in config.settings:
        env = s.variable.env or ((config.guest.version_env,) if config.guest.version_env else ())
        rows.append((f"{s.variable.name}=", " ".join(env), s.value, s.source, s.variable.doc))
    made = config.guest.installer
    if isinstance(made, Download) and made.mirror_env:
        other = environ.get(made.mirror_env, "")
        source = f"environment {made.mirror_env}" if other else "guest.toml"
        rows.append(("", made.mirror_env, other or made.mirrors[0], source, "where the installer is downloaded from"))
    return rows


def schema(kind: type[VmFile] | type[GuestFile]) -> bytes:
    """The JSON schema of one of the two files, ready to be written to docs/."""
    out = msgspec.json.schema(kind)
    out["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return msgspec.json.format(msgspec.json.encode(out, order="sorted"), indent=2) + b"\n"


def _overrides(variables: Mapping[str, str], environ: Mapping[str, str]) -> tuple[tuple[Variable, str, str], ...]:
    """(variable, text, source) of what the command line and the environment set."""
    names = {v.name for v in VARIABLES}
    for name, text in variables.items():
        if name not in names:
            raise ConfigError(f"{name}={text}: no such variable; {suggest(name, names)} (`doit help_vars` lists them)")
    found = []
    for variable in VARIABLES:
        if variable.name in variables:
            found.append((variable, variables[variable.name], f"{variable.name}="))
            continue
        env = next((e for e in variable.env if environ.get(e)), None)
        if env is not None:
            found.append((variable, environ[env], f"environment {env}"))
    return tuple(found)


def _apply(raw: dict[str, Any], variable: Variable, text: str, source: str) -> None:
    """Put an override into the parsed file, so that the same rules check both."""
    if not variable.key:
        return
    if not text.isprintable():
        raise ConfigError(f"{source.rstrip('=')} ({variable.key}) = {text!r}: not readable; use letters and digits")
    *tables, key = variable.key.split(".")
    table = raw
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{name} = {table!r}: must be a table; write [{name}]")
    table[key] = text
    if variable.number and text != "auto":
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise ConfigError(f"{source}: {text!r} is not a whole number; use one, as in {variable.name}=2")
        table[key] = int(text)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{show(path)}: there is no such file; `vmtasks init DIR` writes one") from None
    except RecursionError:
        raise ConfigError(f"{show(path)}: not valid TOML: nested too deeply; take brackets out") from None
    except ValueError as error:  # also text that is not UTF-8, and a number of thousands of digits
        raise ConfigError(f"{show(path)}: not valid TOML: {error}; correct that line") from None
    except OSError as error:
        raise ConfigError(f"{show(path)}: cannot be read: {error.strerror}; correct its mode or name") from None


def _convert(raw: dict[str, Any], kind: type[F], path: Path, overrides: tuple[tuple[Variable, str, str], ...]) -> F:
    """Parsed TOML -> model. ConfigError with file, key, value and remedy when it does not fit."""
    raw.pop("$schema", None)
    try:
        read = msgspec.convert(raw, kind)
        fault = nul(raw)
    except msgspec.ValidationError:
        fault = explain(raw, kind)
    if fault is None:
        return read
    source = _source(fault.key, overrides)
    raise ConfigError(
        f"{source} = {fault.value}: {fault.remedy}" if source else f"{show(path)}: {fault}",
    )


def _source(key: str, overrides: tuple[tuple[Variable, str, str], ...]) -> str | None:
    """What set `key`, if not the file."""
    return next((f"{source.rstrip('=')} ({v.key})" for v, _, source in overrides if v.key == key and key), None)


def _place(text: str, source: str, kind: str) -> Path:
    """The path of a folder or file that the user named. ConfigError."""
    where = source.rstrip("=")
    if not text.strip() or (kind == "file" and not text.isprintable()):
        raise ConfigError(f"{where} = {text!r}: names no {kind}; use one, as in {where}=/path")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"{where} = {text!r}: there is no such user's home; write the whole path") from None


def _from(value: Any, default: Any, path: Path, otherwise: str) -> tuple[str, str]:
    return (str(default), otherwise) if value is UNSET else (str(value), show(path))


def default_store(environ: Mapping[str, str]) -> Path:
    """The store where the user names none: in the cache folder, by the XDG rules or where macOS has it."""
    return _user_folder(environ, "XDG_CACHE_HOME", "Library/Caches" if sys.platform == "darwin" else ".cache")


def _user_folder(environ: Mapping[str, str], variable: str, default: str) -> Path:
    """Our folder in the one that an XDG `variable` names, or else in `default` in the user's home."""
    base, home = environ.get(variable, ""), Path(environ.get("HOME", "~")).expanduser()
    return (Path(base) if base.startswith("/") else home / default) / "vmtasks"


def show(path: Path) -> str:
    """`path` as the user would write it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
