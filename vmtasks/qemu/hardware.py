"""The hardware of a guest: [machine] of guest.toml and the configuration -> argv.Spec."""

from typing import Any

from vmtasks.config.load import Config
from vmtasks.qemu.accel import Accel
from vmtasks.qemu.argv import Spec


def spec(config: Config, accel: Accel, **fields: Any) -> Spec:
    """The guest's hardware with the configured memory and CPUs; `fields` are the other fields of Spec."""
    hardware = config.guest.machine
    return Spec(
        accel=accel.name,
        cd_bus=hardware.cd_bus,
        cpu=hardware.cpu.get(accel.name, accel.cpu),
        cpus=config.cpus,
        disk_bus=hardware.disk_bus,
        disk_cache=config.disk_cache,
        disk_serial=hardware.disk_serial,
        machine_type=hardware.type,
        memory=config.memory,
        nic=hardware.nic,
        rng=hardware.rng,
        **fields,
    )
