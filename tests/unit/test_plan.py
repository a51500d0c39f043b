"""What makes a phase's image another one, and what must not."""

import hashlib
import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from vmtasks.config.load import Config, load
from vmtasks.config.tables import Exchange, HardwareTable, PhaseTable, SuiteTable
from vmtasks.images import plan
from vmtasks.images.plan import Inputs, Installer, IsoFile, Node, Rendering

DATA = Path(__file__).parents[1] / "data/config/good"
HARDWARE = HardwareTable()
PHASE = PhaseTable(name="1-only", boot="cd", cds=["installer", "phase"], dialogue="loader")
TALK = [Exchange(expect="boot: ", send="\r")]
FACTS = plan.facts(HARDWARE, PHASE, TALK, 8 << 30)
FILES = (IsoFile("phase.sh", 0o444, "aa"), IsoFile("run.sh", 0o555, "bb"))

HEX = st.text("0123456789abcdef", min_size=1, max_size=4)
FILE = st.builds(IsoFile, st.text(min_size=1, max_size=4), st.sampled_from([0o444, 0o555]), HEX)
FILE_LISTS = st.lists(FILE, max_size=4, unique_by=lambda file: file.path)
CONFIG = load(DATA, {}, {"HOME": "/"})
COUNT = len(CONFIG.guest.phases)


def inputs(config: Config = CONFIG, media: str = "m", **files: str) -> Inputs:
    """What a host has; `files`: digests of the scripts of phases by name, as p1."""
    phases = tuple(
        Rendering(sources={"script": files.get(f"p{n}", "")}, files={"script": files.get(f"p{n}", ""), "run.sh": "r"})
        for n in range(1, len(config.guest.phases) + 1)
    )
    return Inputs(installer=Installer(recipe="r", parts={"installer.file": "x"}, media=media), phases=phases)


def nodes(config: Config = CONFIG, **changes: str) -> dict[str, Node]:
    return {node.name: node for node in plan.plan(config, inputs(config, **changes))}


def others(one: dict[str, Node], other: dict[str, Node]) -> list[str]:
    """The nodes that have another digest."""
    return [name for name in one if one[name].digest != other[name].digest]


def test_the_digest_stays_what_it_was():
    """Whoever changes this line raises plan.FORMAT: images of old digests must not be taken for new ones."""
    parts = {
        "vmtasks: digests": "2",
        "installer": "m",
        "script": "",
        "run.sh": "r",
        **plan.facts(CONFIG.guest.machine, CONFIG.guest.phases[0], dialogue(CONFIG), CONFIG.disk_size),
    }
    text = json.dumps([2, "phase", parts], sort_keys=True, separators=(",", ":"))
    assert nodes()["phase:1"].digest == hashlib.sha256(text.encode()).hexdigest()
    assert sorted(parts)[:6] == ["boot", "cd_bus", "cds", "dialogue", "disk_bus", "disk_serial"]


def dialogue(config: Config) -> list[Exchange]:
    return config.guest.dialogue.get(config.guest.phases[0].dialogue, [])


def test_every_step_is_a_node_after_those_that_it_needs():
    seen: set[str] = set()
    for name, node in nodes().items():
        assert set(node.after) <= seen
        assert node.digest
        seen.add(name)
    steps = [f"{kind}:{n}" for n in range(1, COUNT + 1) for kind in ("render", "phase_iso", "phase")]
    assert list(nodes()) == ["fetch", *steps, "snapshot", "sync", "build", *(f"test:{name}" for name in CONFIG.suites)]


def test_a_script_changes_its_phase_and_what_comes_after():
    last = f"p{COUNT}"
    assert others(nodes(), nodes(**{last: "x"})) == [
        f"render:{COUNT}",
        f"phase_iso:{COUNT}",
        f"phase:{COUNT}",
        "snapshot",
    ]
    first = others(nodes(), nodes(p1="x"))
    assert first == ["render:1", "phase_iso:1", *(f"phase:{n}" for n in range(1, COUNT + 1)), "snapshot"]


def test_another_installer_makes_other_images_and_no_other_rendering():
    assert others(nodes(), nodes(media="other")) == [*(f"phase:{n}" for n in range(1, COUNT + 1)), "snapshot"]


def test_before_fetch_nothing_after_it_is_known():
    known = nodes(media="")
    unknown = {name for name, node in known.items() if node.unknown == plan.NOT_FETCHED}
    assert unknown >= {"snapshot", *(f"phase:{n}" for n in range(1, COUNT + 1))}
    assert not any(known[name].digest for name in unknown)
    assert known["render:1"].digest == nodes()["render:1"].digest


def test_a_template_that_is_wrong_makes_its_phase_unknown_and_no_other_rendering():
    given = inputs()
    wrong = replace(given, phases=(*given.phases[:-1], Rendering(sources={"script": "x"}, fault="line 3")))
    found = {node.name: node for node in plan.image_nodes(CONFIG, wrong)}
    assert [name for name, node in found.items() if node.unknown] == [
        f"render:{COUNT}", f"phase_iso:{COUNT}", f"phase:{COUNT}", "snapshot",
    ]  # fmt: skip
    assert found["snapshot"].unknown == "line 3"


@given(st.permutations(FILES))
def test_order_of_files_does_not_matter(files: list[IsoFile]):
    assert plan.files_digest(files) == plan.files_digest(FILES)
    assert plan.token(files) == plan.token(FILES)


@given(FILE_LISTS, FILE_LISTS)
def test_other_files_another_digest_and_token(one: list[IsoFile], other: list[IsoFile]):
    same = sorted(one) == sorted(other)
    assert (plan.files_digest(one) == plan.files_digest(other)) == same
    assert (plan.token(one) == plan.token(other)) == same


def test_name_mode_and_content_matter():
    run = FILES[1]
    changed = [replace(run, path="run2.sh"), replace(run, mode=0o444), replace(run, sha256="cc")]
    assert len({plan.file_part(file) for file in (run, *changed)}) == 4
    assert len({plan.token((FILES[0], file)) for file in (run, *changed)}) == 4


@given(st.dictionaries(st.text(max_size=3), HEX, max_size=4), st.dictionaries(st.text(max_size=3), HEX, max_size=4))
def test_changes_names_what_differs(old: dict[str, str], new: dict[str, str]):
    changed = plan.changes(old, new)
    assert bool(changed) == (old != new)
    assert {**old, **{name: new[name] for name in changed if name in new}}.items() >= new.items()
    assert all(old.get(name) != new.get(name) for name in changed)


def facts(hardware: HardwareTable = HARDWARE, phase: PhaseTable = PHASE, talk: list[Exchange] = TALK) -> dict[str, str]:
    return plan.facts(hardware, phase, talk, 8 << 30)


def test_what_only_takes_time_does_not_matter():
    faster = msgspec.structs.replace(HARDWARE, memory="4G", cpus=8, cpu={"kvm": "host"}, disk_size="1G")
    patient = msgspec.structs.replace(PHASE, timeout_s=7, silence_timeout_s=7)
    assert facts(hardware=faster, phase=patient, talk=[Exchange(expect="boot: ", send="\r", timeout_s=7)]) == FACTS


def test_what_the_guest_notices_matters():
    changes = [
        facts(hardware=msgspec.structs.replace(HARDWARE, disk_bus="ide")),
        facts(hardware=msgspec.structs.replace(HARDWARE, disk_serial="other")),
        facts(hardware=msgspec.structs.replace(HARDWARE, cd_bus="virtio-scsi")),
        facts(hardware=msgspec.structs.replace(HARDWARE, nic="e1000")),
        facts(hardware=msgspec.structs.replace(HARDWARE, type="q35")),
        facts(hardware=msgspec.structs.replace(HARDWARE, rng=False)),
        facts(phase=msgspec.structs.replace(PHASE, cds=["phase", "installer"])),
        facts(phase=msgspec.structs.replace(PHASE, boot="disk")),
        facts(talk=[]),
        facts(talk=[*TALK, *TALK]),
        facts(talk=[Exchange(expect="boot: ", send="x\r")]),
        plan.facts(HARDWARE, PHASE, TALK, 9 << 30),
    ]
    assert len({plan.digest_of("phase", f) for f in (FACTS, *changes)}) == len(changes) + 1


def test_every_key_of_a_guests_machine_is_decided_upon():
    """A new key must be put either here or into facts()."""
    only_time = {"cpu", "cpus", "memory"}
    for field in msgspec.structs.fields(HardwareTable):
        assert field.name in only_time or field.name in FACTS or f"machine.{field.name}" in FACTS, field.name


@pytest.mark.parametrize("key", [field.name for field in msgspec.structs.fields(SuiteTable)])
def test_every_key_of_a_suite_is_decided_upon(key: str):
    """A new key must be put either here or into FROM_SUITE."""
    assert (key in plan.FROM_SUITE) != (key in {"timeout_s", "artifacts", "artifacts_limit", "artifacts_timeout_s"})


def test_memory_cpus_port_and_accelerator_are_not_in_a_plan():
    environ = {"HOME": "/"}
    slow, fast = (
        load(DATA, variables, environ)
        for variables in (
            {},
            {"memory": "2G", "cpus": "4", "port": "auto", "accel": "tcg", "name": "x", "network": "none"},
        )
    )
    one, other = (plan.facts(c.guest.machine, c.guest.phases[0], TALK, c.disk_size) for c in (slow, fast))
    assert one == other


def test_a_token_is_16_hex_digits_that_the_console_looks_for():
    assert plan.token(FILES).isalnum()
    assert len(plan.token(FILES)) == 16
    assert plan.token(FILES) not in plan.files_digest(FILES)


@given(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=3), st.text(max_size=3), st.text(max_size=3))
def test_suite_digest_changes_with_its_parts_only(parts: dict[str, str], key: str, value: str):
    assert (plan.suite_digest({**parts, key: value}) == plan.suite_digest(parts)) == (parts.get(key) == value)
    assert plan.suite_digest(dict(reversed(parts.items()))) == plan.suite_digest(parts)
