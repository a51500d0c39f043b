"""PURE: the requested properties of a machine, checked, and the configuration with them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from vmtasks.config import arguments, rules
from vmtasks.config.arguments import Bind, Forward, PublicKey
from vmtasks.config.load import Config, parse_size
from vmtasks.errors import ConfigError
from vmtasks.images.workspace import MachineRecord


@dataclass(frozen=True)
class MachineSpec:
    """The requested properties of a machine. None or '' means the project's, or else the guest's, value.

    `memory` and `disk_size` in bytes. `ssh_port` 0: 2222, or the first free port of 22220 to 22229, or any free one.
    `throwaway`: remove it when it stops. `lease_s`: its lifetime in seconds unless the lease is renewed; 0: unlimited.
    """

    image: str = ""
    name: str = ""
    memory: int | None = None
    cpus: int | None = None
    disk_size: int | None = None
    network: str = ""
    ssh_port: int = 0
    forwards: tuple[Forward, ...] = ()
    binds: tuple[Bind, ...] = ()
    authorized: tuple[PublicKey, ...] = ()
    user: str = ""
    throwaway: bool = False
    lease_s: float = 0.0

    @classmethod
    def parse(
        cls,
        image: str = "",
        *,
        name: str = "",
        memory: int | str | None = None,
        disk_size: int | str | None = None,
        network: str = "",
        forwards: Iterable[Forward | str] = (),
        binds: Iterable[Bind | str] = (),
        **more: Any,
    ) -> "MachineSpec":
        """Parse strings: `memory="512M"`, `disk_size="20G"`, `forwards=["8080:80"]`, `binds=["src:/src"]`.

        Numbers are bytes. ConfigError for an invalid value; TypeError for an unknown name.
        """
        if network not in ("", "none", "user"):
            raise ConfigError(f"--network {network!r}: use user, or none")
        return cls(
            image=image,
            name=arguments.machine_name(name) if name else "",
            memory=(arguments.memory(memory) if memory else None) if isinstance(memory, str) else memory,
            disk_size=(parse_size(disk_size, "--disk") if disk_size else None)
            if isinstance(disk_size, str)
            else disk_size,
            network=network,
            forwards=tuple(Forward.parse(item) if isinstance(item, str) else item for item in forwards),
            binds=tuple(Bind.parse(item) if isinstance(item, str) else item for item in binds),
            **more,
        )


def check(base: Config, spec: MachineSpec) -> None:
    """ConfigError, naming the option, for a value that this host cannot provide or no guest can use."""
    asked = (
        ("memory", "memory", "--memory", spec.memory),
        ("cpus", "cpus", "--cpus", spec.cpus),
        ("disk", "disk_size", "--disk", spec.disk_size),
        ("port", "ssh_port", "--ssh-port", spec.ssh_port or None),
    )
    given = [row for row in asked if row[-1] is not None]
    made = msgspec.structs.replace(base, **{field: value for _, field, _, value in given})
    names = {name: option for name, _, option, _ in given}
    for problem in (*rules.forwards(spec.forwards), *rules.machine(made, names)):
        raise ConfigError(problem)


def config_for(base: Config, record: MachineRecord) -> Config:
    """The configuration with the recorded properties of a machine of `vmtasks run`."""
    if not record.own:
        return base
    return msgspec.structs.replace(
        base,
        name=record.name,
        memory=record.memory,
        cpus=record.cpus,
        network=record.network,
        disk_size=record.disk_size,
        ssh_port=record.want_port or None,
    )
