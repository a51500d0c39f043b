"""The two files a user writes, vm.toml and guest.toml, as frozen models; their JSON schemas come from here."""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from vmtasks.config.recipe import Recipe

NAME, USER = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", r"[a-z_][a-z0-9_-]{0,31}"
"""Patterns of what names machines, guests and snapshots, and of a guest's users."""
Value = str | int | bool | list[str]
# In the patterns below `(?!\n)` is for Python, whose `$` also matches before a line break at the end.
Name = Annotated[
    str,
    Meta(
        pattern=rf"^{NAME}$(?!\n)",
        description="letters, digits, '.', '_' and '-', beginning with a letter or digit",
    ),
]
Size = Annotated[
    str, Meta(pattern=r"^[1-9][0-9]{0,14}[KMGT]?$(?!\n)", description='a number with K, M, G or T, as in "2G"')
]
Seconds = Annotated[int, Meta(ge=1, le=86400, description="seconds")]


class Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A TOML table in which every key must be known."""


class MachineTable(Table, frozen=True, kw_only=True):
    """[machine] in vm.toml. What is left out is taken from the guest."""

    name: Annotated[Name, Meta(description="name of the machine and of its folder under .vm/run")] | UnsetType = UNSET
    memory: Annotated[Size, Meta(description='RAM of the machine, as in "2G"')] | UnsetType = UNSET
    cpus: Annotated[int, Meta(ge=1, le=255, description="virtual CPUs")] | UnsetType = UNSET
    disk_size: Annotated[Size, Meta(description="size of the disk the guest is installed on")] | UnsetType = UNSET
    disk_cache: (
        Annotated[
            Literal["writeback", "none", "unsafe"],
            Meta(description="how this host caches the disk; none: not at all, unsafe: a crash of the host loses it"),
        ]
        | UnsetType
    ) = UNSET
    ssh_port: (
        Annotated[int | Literal["auto"], Meta(description='loopback port for SSH, 1024 to 65535, or "auto"')]
        | UnsetType
    ) = UNSET
    accel: Literal["auto", "kvm", "hvf", "tcg"] | UnsetType = UNSET
    network: Literal["user", "none"] | UnsetType = UNSET


class SyncTable(Table, frozen=True, kw_only=True):
    """[sync]: which tree goes into the guest, and where."""

    source: Annotated[str, Meta(description="folder to sync, relative to the project")] = "."
    dest: Annotated[str, Meta(description="folder in the guest; relative to the login user's home")] = "src"
    exclude: Annotated[
        list[str],
        Meta(description="rsync patterns; one that begins with / is anchored at the source"),
    ] = []
    gitignore: Annotated[
        bool,
        Meta(description="leave alone in the guest what .gitignore files name, and do not send it if git is used"),
    ] = True
    delete: Annotated[bool, Meta(description="remove files in the guest that are gone from the source")] = True


class BuildTable(Table, frozen=True, kw_only=True):
    """[build]: a command that runs in the synced folder before any suite."""

    command: str = ""
    env: dict[str, str] = {}
    timeout_s: Seconds = 1800


class SuiteTable(Table, frozen=True, kw_only=True):
    """[suites.NAME]: a command that runs tests in the guest."""

    command: Annotated[str, Meta(min_length=1, description="shell command, run with sh in `cwd`")]
    user: Annotated[str, Meta(description="user to run as; default: the guest's login user")] = ""
    cwd: Annotated[str, Meta(description="folder, relative to sync.dest")] = "."
    env: dict[str, str] = {}
    timeout_s: Annotated[
        Seconds, Meta(description="the suite is ended, with all it started, after so many seconds")
    ] = 1800
    format: Annotated[
        Literal["auto", "tap", "go-json", "junit", "plain"], Meta(description="what the output looks like")
    ] = "auto"
    junit: Annotated[str, Meta(description="JUnit file that the suite writes, relative to `cwd`")] = ""
    artifacts: Annotated[
        list[str],
        Meta(description="plain files and folders to fetch after the run, whatever its end: globs relative to `cwd`"),
    ] = []
    artifacts_limit: Annotated[Size, Meta(description="no more than this is fetched, and what was left is said")] = "1G"
    artifacts_timeout_s: Annotated[Seconds, Meta(description="fetching takes no longer than this")] = 600


class QuickTable(Table, frozen=True, kw_only=True):
    """[quick]: what `doit quick` runs."""

    suites: list[str] = []


class VmFile(Table, frozen=True, kw_only=True):
    """config/vm.toml."""

    guest: Annotated[Name, Meta(description="folder in phases/")] = "dragonfly"
    version: Annotated[str, Meta(description="version of the guest; default: the guest's own")] = ""
    machine: MachineTable = MachineTable()
    sync: SyncTable = SyncTable()
    build: BuildTable = BuildTable()
    suites: dict[str, SuiteTable] = {}
    quick: QuickTable = QuickTable()
    vars: Annotated[
        dict[str, dict[str, Value]],
        Meta(description="[vars.GUEST]: values for the guest's templates; the guest's [vars] lists what there is"),
    ] = {}


class HardwareTable(Table, frozen=True, kw_only=True):
    """[machine] in guest.toml: hardware that the guest is known to work on."""

    memory: Size = "1G"
    cpus: Annotated[int, Meta(ge=1, le=255)] = 1
    disk_size: Size = "8G"
    type: Annotated[str, Meta(description="QEMU machine type")] = "pc"
    cpu: Annotated[dict[str, str], Meta(description="CPU model by accelerator, as in {kvm = 'host'}")] = {}
    disk_bus: Literal["virtio-scsi", "virtio-blk", "ide", "ahci"] = "virtio-scsi"
    disk_serial: Annotated[
        str, Meta(pattern=r"^[A-Za-z0-9_-]{1,20}$(?!\n)", description="up to 20 letters, digits, '_' and '-'")
    ] = "vmtasks0"
    cd_bus: Literal["virtio-scsi", "ide"] = "ide"
    nic: Literal["virtio-net-pci", "e1000"] = "virtio-net-pci"
    rng: bool = True


class SshTable(Table, frozen=True, kw_only=True):
    """[ssh] in guest.toml."""

    host_keys: Annotated[
        str,
        Meta(
            pattern=r"^(/.+)?$(?!\n)",
            description="folder of the server's host keys, `ssh_host_TYPE_key`, which each machine gets new; "
            "empty: it keeps those of its image",
        ),
    ] = "/etc/ssh"
    reload: Annotated[
        str,
        Meta(
            description="command, run as root, that has the server read its host keys again; empty: SIGHUP to the "
            "process in /run/sshd.pid or /var/run/sshd.pid"
        ),
    ] = ""
    ready_timeout_s: Annotated[
        Seconds, Meta(description="from power on to the first login, on fast hardware; scaled under emulation")
    ] = 120
    user: Annotated[
        str,
        Meta(
            pattern=rf"^{USER}$(?!\n)",
            description="user that vmtasks logs in as: lower-case letters, digits, '_' and '-'",
        ),
    ] = "root"


PublishedDigest = Annotated[
    str,
    Meta(
        pattern=r"^(md5:[0-9a-f]{32}|sha1:[0-9a-f]{40}|sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})"
        r" of (download|content)$(?!\n)",
        description="'sha256:HEX of download' for the file as published, 'sha256:HEX of content' for it unpacked; "
        "md5, sha1 and sha512 too, in lower case",
    ),
]


class Download(Table, frozen=True, kw_only=True, tag_field="source", tag="download"):
    """[installer] of a guest whose maker publishes an ISO."""

    file: Annotated[
        str, Meta(min_length=1, description="name of the ISO; {version} is replaced; .bz2, .gz and .xz are unpacked")
    ]
    mirrors: Annotated[
        list[str],
        Meta(
            min_length=1,
            description="addresses of the folder that holds the file, best first: https://, http://, file:/// "
            "or an absolute path; {version} is replaced",
        ),
    ]
    mirror_env: Annotated[
        str, Meta(description="environment variable that names a mirror, or a folder, to use in place of `mirrors`")
    ] = ""
    digests: Annotated[
        dict[str, list[PublishedDigest]], Meta(description="what is known of each version's file; all must hold")
    ] = {}
    sums: Annotated[
        str,
        Meta(
            description="file beside the ISO with lines as in 'MD5 (file) = hex' or 'hex  file'; "
            "used for a version that `digests` does not have"
        ),
    ] = ""
    sizes: Annotated[
        dict[str, Annotated[int, Meta(ge=1)]],
        Meta(description="bytes of each version's ISO, unpacked, to check for free space; without it that is guessed"),
    ] = {}


class Exchange(Table, frozen=True, kw_only=True):
    """One entry of a boot dialogue: wait for `expect` on the console, then type `send`."""

    expect: Annotated[
        str, Meta(min_length=1, description="regular expression; matched against text without control sequences")
    ]
    send: Annotated[str, Meta(description="text to type; \\r for Enter, \\u001b for Escape")]
    again: Annotated[
        bool, Meta(description="type it again each time that `expect` comes again before the next prompt does")
    ] = False
    echo: Annotated[
        bool,
        Meta(description="`send` is a line: each character must come back before the next is typed, and Enter is last"),
    ] = False
    timeout_s: Seconds = 60


class FailureText(Table, frozen=True, kw_only=True):
    """Console text that means that the boot has failed."""

    expect: Annotated[str, Meta(min_length=1, description="regular expression")]
    cause: Literal["panic", "loader", "single-user", "debugger", "mountroot", "login"]
    says: Annotated[str, Meta(description="what it means, to end the sentence 'the guest ...'")]


class PhaseTable(Table, frozen=True, kw_only=True):
    """[[phases]]: one unattended boot. Its script is NAME.sh.j2 beside guest.toml."""

    name: Annotated[Name, Meta(description="as in 1-install; the script is NAME.sh.j2")]
    boot: Annotated[Literal["cd", "disk"], Meta(description="boot from the first CD or from the disk")]
    cds: Annotated[
        list[Literal["installer", "phase"]], Meta(min_length=1, max_length=4, description="CDs in drive order")
    ]
    dialogue: Annotated[str, Meta(description="name of a [dialogue]; empty: nothing is typed")] = ""
    timeout_s: Annotated[
        Seconds, Meta(description="limit on fast hardware; longer under emulation, by the measured factor")
    ] = 1800
    silence_timeout_s: Annotated[Seconds, Meta(description="limit for a console without output, scaled likewise")] = 300
    poweroff_timeout_s: Annotated[
        Seconds, Meta(description="limit from the script's verdict to the end of the power-off, scaled likewise")
    ] = 60
    packages: Annotated[list[str], Meta(description="packages put into packages/ on the phase ISO")] = []


class Question(Table, frozen=True, kw_only=True):
    """[[questions]]: something that `doit verify_guest` answers in its report. One of the last three keys is set."""

    asks: Annotated[str, Meta(min_length=1, description="the question, as the report shows it")]
    observed: Annotated[str, Meta(description="name that a phase script gave to `observe`; `*` matches any text")] = ""
    command: Annotated[str, Meta(description="command that answers it, run as root in the installed machine")] = ""
    host: Annotated[
        Literal["", "power-button", "sums"],
        Meta(description="what the host finds out: the ACPI power button's effect, or the published list of sums"),
    ] = ""


class GuestFile(Table, frozen=True, kw_only=True):
    """phases/GUEST/guest.toml."""

    name: Name
    description: str = ""
    version: Annotated[str, Meta(description="version when none is asked for")] = ""
    version_env: Annotated[str, Meta(description="environment variable that sets the version")] = ""
    machine: HardwareTable = HardwareTable()
    ssh: SshTable = SshTable()
    installer: Recipe | Download
    dialogue: dict[str, list[Exchange]] = {}
    failures: list[FailureText] = []
    phases: Annotated[list[PhaseTable], Meta(min_length=1)]
    poweroff: Annotated[str, Meta(description="command that powers the guest off")] = "poweroff"
    hostname: Annotated[
        str,
        Meta(
            description="commands, run as root, that give a machine the host name $name for good; empty: hostname, and "
            "/etc/hostname, /etc/rc.conf and /etc/hosts where they hold one"
        ),
    ] = ""
    questions: list[Question] = []
    vars: Annotated[dict[str, Value], Meta(description="values for the templates, with their defaults")] = {}
