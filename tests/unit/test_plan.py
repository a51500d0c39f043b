"""What makes a phase's image another one, and what must not."""

import hashlib
from pathlib import Path

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import fields, replace

from vmtasks.config.load import load
from vmtasks.config.tables import Exchange, HardwareTable, PhaseTable
from vmtasks.images import plan
from vmtasks.images.plan import Facts, IsoFile

DATA = Path(__file__).parents[1] / "data/config/good"
HARDWARE = HardwareTable()
PHASE = PhaseTable(name="1-only", boot="cd", cds=["installer", "phase"], dialogue="loader")
TALK = [Exchange(expect="boot: ", send="\r")]
FACTS = plan.facts(HARDWARE, PHASE, TALK, 8 << 30)
FILES = (IsoFile("phase.sh", 0o444, "aa"), IsoFile("run.sh", 0o555, "bb"))

HEX = st.text("0123456789abcdef", min_size=1, max_size=4)
FILE = st.builds(IsoFile, st.text(min_size=1, max_size=4), st.sampled_from([0o444, 0o555]), HEX)
FILE_LISTS = st.lists(FILE, max_size=4, unique_by=lambda file: file.path)


def digest(before: str = "installer", files: tuple[IsoFile, ...] = FILES, facts: Facts = FACTS) -> str:
    return plan.phase_digest(before, files, facts)


def test_the_digest_stays_what_it_was():
    """Whoever changes this line raises plan.FORMAT: images of old digests must not be taken for new ones."""
    assert (
        digest()
        == hashlib.sha256(
            b'[1,"installer","' + plan.files_digest(FILES).encode() + b'",{"boot":"cd","cd_bus":"ide",'
            b'"cds":["installer","phase"],"dialogue":[["boot: ","\\r"]],"disk_bus":"virtio-scsi",'
            b'"disk_serial":"vmtasks0",'
            b'"disk_size":8589934592,"machine_type":"pc","nic":"virtio-net-pci","rng":true}]'
        ).hexdigest()
    )


@given(st.permutations(FILES))
def test_order_of_files_does_not_matter(files: list[IsoFile]):
    assert digest(files=tuple(files)) == digest()
    assert plan.token(files) == plan.token(FILES)


@given(FILE_LISTS, FILE_LISTS)
def test_other_files_another_digest_and_token(one: list[IsoFile], other: list[IsoFile]):
    same = sorted(one) == sorted(other)
    assert (plan.files_digest(one) == plan.files_digest(other)) == same
    assert (plan.token(one) == plan.token(other)) == same
    assert (digest(files=tuple(one)) == digest(files=tuple(other))) == same


def test_name_mode_and_content_matter():
    run = FILES[1]
    changed = {digest(files=(FILES[0], new)) for new in (
        replace(run, path="run2.sh"), replace(run, mode=0o444), replace(run, sha256="cc"),
    )}  # fmt: skip
    assert len({*changed, digest(), digest(files=FILES[:1])}) == 5


@given(st.lists(HEX, min_size=2, max_size=5, unique=True), st.data())
def test_a_change_changes_all_that_comes_after_and_nothing_before(contents: list[str], data: st.DataObject):
    def chain(texts: list[str]) -> list[str]:
        digests = ["installer"]
        for text in texts:
            digests.append(digest(digests[-1], (IsoFile("phase.sh", 0o444, text),)))
        return digests[1:]

    at = data.draw(st.integers(0, len(contents) - 1))
    changed = [*contents[:at], "changed", *contents[at + 1 :]]
    before, after = chain(contents), chain(changed)
    assert before[:at] == after[:at]
    assert not set(before[at:]) & set(after[at:])


def test_the_installer_matters():
    assert digest("other") != digest()


def test_every_fact_matters():
    other = {int: 1, str: "other", tuple: ("other",), bool: False}
    digests = {digest(facts=replace(FACTS, **{f.name: other[type(getattr(FACTS, f.name))]})) for f in fields(Facts)}
    assert len(digests | {digest()}) == len(fields(Facts)) + 1


def facts(hardware: HardwareTable = HARDWARE, phase: PhaseTable = PHASE, talk: list[Exchange] = TALK) -> Facts:
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
    assert len({digest(facts=f) for f in (FACTS, *changes)}) == len(changes) + 1


def test_every_key_of_a_guests_machine_is_decided_upon():
    """A new key must be put either here or into Facts."""
    only_time = {"cpu", "cpus", "memory"}
    as_facts = {"type": "machine_type"}
    names = {f.name for f in fields(Facts)}
    for field in msgspec.structs.fields(HardwareTable):
        assert field.name in only_time or as_facts.get(field.name, field.name) in names, field.name


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
