"""What vm.toml, guest.toml, variables and the environment are refused for, and which of them wins."""

import json
import os
import shutil
import string
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import tomli_w
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vmtasks.config import rules
from vmtasks.config.load import VARIABLES, Config, help_table, load, parse_size, schema, show_size
from vmtasks.config.mistakes import explain, key_path
from vmtasks.config.tables import Exchange, GuestFile, MachineTable, PhaseTable, Recipe, SuiteTable, SyncTable, VmFile
from vmtasks.errors import ConfigError

TOP = Path(__file__).parents[2]
DATA = TOP / "tests/data/config"
CASES = tomllib.loads((DATA / "bad.toml").read_text())


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    shutil.copytree(DATA / "good", root)
    monkeypatch.chdir(root)
    return root


def read(root: Path, variables: dict[str, str] | None = None, environ: dict[str, str] | None = None) -> Config:
    config = load(root, variables, {"HOME": "/home/me", **(environ or {})})
    rules.check(config)
    return config


def test_the_good_project_is_accepted(project: Path):
    config = read(project)
    assert (config.guest.name, config.version, config.label) == ("small", "1.0", "small-1.0")
    assert (config.memory, config.disk_size, config.cpus, config.ssh_port) == (1 << 30, 8 << 30, 1, 2222)
    assert config.vm_dir == project / ".vm"
    assert config.store_dir == Path("/home/me/.cache/vmtasks")


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gives_one_line(name: str, project: Path):
    case = CASES[name]
    vm, guest = project / "config/vm.toml", project / "phases/small/guest.toml"
    vm.write_text(case["only"] if "only" in case else vm.read_text() + case.get("vm", ""))
    old, new = case.get("replace", ("", ""))
    assert old in guest.read_text(), "the case replaces what is not there"
    guest.write_text(guest.read_text().replace(old, new) + case.get("guest", ""))
    with pytest.raises(ConfigError) as caught:
        read(project, case.get("variables"), case.get("environ"))
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    said = str(caught.value)
    assert said == case["says"].replace("{host_mib}", str(pages >> 20))
    assert "\n" not in said
    assert caught.value.exit_code == 2


def test_unreadable_files(project: Path):
    vm = project / "config/vm.toml"
    vm.write_bytes(b"guest = '\xff'")
    with pytest.raises(ConfigError, match=r"^config/vm.toml: not valid TOML: 'utf-8' codec .* correct that line$"):
        read(project)
    vm.unlink()
    with pytest.raises(ConfigError, match=r"^config/vm.toml: there is no such file; `vmtasks init DIR` writes one$"):
        read(project)
    vm.mkdir()
    with pytest.raises(
        ConfigError, match=r"^config/vm.toml: cannot be read: Is a directory; correct its mode or name$"
    ):
        read(project)


@pytest.mark.parametrize("text", ["a = " + "[" * 9000, "a = " + "9" * 9000, "a." * 9000, "a = " + "{a=" * 9000])
def test_monstrous_files(text: str, project: Path):
    (project / "config/vm.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"^config/vm.toml: not valid TOML: [^\n]*$"):
        read(project)


# ---- which one wins


def test_precedence(project: Path):
    guest, vm = project / "phases/small/guest.toml", project / "config/vm.toml"
    assert read(project).memory == 1 << 30
    guest.write_text(guest.read_text() + '[machine]\nmemory = "100M"\n')
    assert read(project).memory == 100 << 20
    vm.write_text(vm.read_text() + '[machine]\nmemory = "200M"\n')
    assert read(project).memory == 200 << 20
    assert read(project, environ={"VM_MEMORY": "300M"}).memory == 300 << 20
    assert read(project, {"memory": "400M"}, {"VM_MEMORY": "300M"}).memory == 400 << 20


def test_precedence_of_version(project: Path):
    assert read(project, environ={"SMALL_VERSION": "1.1"}).version == "1.1"
    vm = project / "config/vm.toml"
    vm.write_text('version = "1.2"\n' + vm.read_text())
    assert read(project).version == "1.2"
    assert read(project, environ={"SMALL_VERSION": "1.1"}).version == "1.1"
    assert read(project, {"version": "1.3"}, {"SMALL_VERSION": "1.1"}).version == "1.3"


def test_ports(project: Path):
    assert read(project, environ={"SSH_PORT": "3000"}).ssh_port == 3000
    assert read(project, environ={"SSH_PORT": "3000", "VM_SSH_PORT": "3001"}).ssh_port == 3001
    assert read(project, {"port": "auto"}, {"SSH_PORT": "3000"}).ssh_port is None


def test_an_empty_environment_variable_is_none(project: Path):
    assert read(project, environ={"VM_MEMORY": "", "SSH_PORT": "", "SMALL_VERSION": "", "VM_DIR": ""}) == read(project)


def test_folders(project: Path):
    config = read(project, {"dir": "state", "store": "/srv/store"})
    assert (config.vm_dir, config.store_dir) == (project / "state", Path("/srv/store"))
    config = read(project, environ={"VM_DIR": "/srv/vm", "VMTASKS_STORE": "store"})
    assert (config.vm_dir, config.store_dir) == (Path("/srv/vm"), project / "store")
    assert read(project, environ={"XDG_CACHE_HOME": "/c"}).store_dir == Path("/c/vmtasks")
    assert read(project, environ={"XDG_CACHE_HOME": "c"}).store_dir == Path("/home/me/.cache/vmtasks")


def test_vars_of_the_guest_and_of_the_user(project: Path):
    vm = project / "config/vm.toml"
    vm.write_text(vm.read_text() + "[vars.small]\nflag = false\n[vars.other]\nanything = 'goes'\n")
    assert read(project).vars == {"flag": False, "list": ["a"]}


def test_help_says_where_each_value_came_from(project: Path):
    vm = project / "config/vm.toml"
    vm.write_text(vm.read_text() + "[machine]\ncpus = 3\n")
    rows = {
        row[0]: row[1:4] for row in help_table(read(project, {"memory": "1500M"}, {"SSH_PORT": "3000", "VM_DIR": "d"}))
    }
    assert rows == {
        "accel=": ("VM_ACCEL", "auto", "default"),
        "cache=": ("VM_DISK_CACHE", "writeback", "default"),
        "config=": ("VM_CONFIG", "config/vm.toml", "default"),
        "cpus=": ("VM_CPUS", "3", "config/vm.toml"),
        "dir=": ("VM_DIR", "d", "environment VM_DIR"),
        "disk=": ("VM_DISK_SIZE", "8G", "guest.toml"),
        "guest=": ("VM_GUEST", "small", "config/vm.toml"),
        "memory=": ("VM_MEMORY", "1500M", "memory="),
        "name=": ("VM_NAME", "small-1.0", "guest and version"),
        "network=": ("VM_NETWORK", "user", "default"),
        "port=": ("VM_SSH_PORT SSH_PORT", "3000", "environment SSH_PORT"),
        "store=": ("VMTASKS_STORE", "/home/me/.cache/vmtasks", "default"),
        "version=": ("SMALL_VERSION", "1.0", "guest.toml"),
    }


def test_help_of_a_guest_that_is_the_default(project: Path):
    (project / "phases/small").rename(project / "phases/dragonfly")
    guest = project / "phases/dragonfly/guest.toml"
    guest.write_text(guest.read_text().replace('name = "small"', 'name = "dragonfly"'))
    (project / "config/vm.toml").write_text("")
    sources = {s.variable.name: s.source for s in read(project).settings}
    assert sources["guest"] == "default"


# ---- anything at all

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.dates() | st.datetimes()
TABLES = (VmFile, GuestFile, MachineTable, SyncTable, SuiteTable, PhaseTable, Exchange, Recipe)
NAMES = sorted({field.encode_name for table in TABLES for field in msgspec.structs.fields(table)})
KEYS = st.sampled_from(NAMES) | st.text(max_size=4)
NONSENSE = st.recursive(
    SCALARS.filter(lambda value: value is not None),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
FILES = st.dictionaries(KEYS, NONSENSE, max_size=4)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(FILES)
@example({"machine": {"ssh_port": 10**30}})
@example({"suites": {"unit\n": {"command": "x"}}})
def test_any_vm_toml_is_read_or_refused(project: Path, content: dict[str, Any]):
    (project / "config/vm.toml").write_bytes(tomli_w.dumps({"guest": "small", **content}).encode())
    try:
        config = read(project)
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017 - most are refused, some are not
    else:
        assert isinstance(config, Config)


@QUICK
@given(FILES)
def test_any_guest_toml_is_read_or_refused(project: Path, content: dict[str, Any]):
    path = project / "phases/small/guest.toml"
    good = tomllib.loads((DATA / "good/phases/small/guest.toml").read_text())
    path.write_bytes(tomli_w.dumps({**good, **content}).encode())
    try:
        read(project)
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
SET = st.dictionaries(st.sampled_from([v.name for v in VARIABLES]), WORDS)
ENVIRON = st.dictionaries(
    st.sampled_from(["HOME", "SMALL_VERSION", *(name for v in VARIABLES for name in v.env)]), WORDS | st.just("\udcff")
)


@QUICK
@given(SET, ENVIRON)
def test_any_variables_are_taken_or_refused(project: Path, variables: dict[str, str], environ: dict[str, str]):
    try:
        config = read(project, variables, environ)
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert config.vm_dir.is_absolute()
        assert config.store_dir.is_absolute()


@given(FILES)
def test_explain_finds_a_fault_exactly_where_msgspec_finds_one(content: dict[str, Any]):
    try:
        msgspec.convert(content, VmFile)
    except msgspec.ValidationError:
        assert str(explain(content, VmFile))


@given(st.lists(st.text(), min_size=1, max_size=3))
def test_a_key_is_shown_as_toml_reads_it(keys: list[str]):
    shown = key_path(keys)
    assert "\n" not in shown
    value: Any = tomllib.loads(f"{shown} = 1")
    for key in keys:
        value = value[key]
    assert value == 1


# ---- sizes


@given(st.integers(1, 1 << 60))
def test_sizes_come_back(size: int):
    assert parse_size(show_size(size)) == size


@given(st.text(string.digits + "KMGTkmgt -.", max_size=6))
def test_parse_size_takes_sizes_only(text: str):
    try:
        assert parse_size(text) > 0
    except ConfigError:
        assert (
            not text.strip().upper().rstrip("KMGT").isdecimal()
            or text.strip()[0] == "0"
            or text.strip()[-2:-1].isalpha()
        )


def test_show_size_is_short():
    assert [show_size(n) for n in (1000, 1024, 1536 << 20, 2 << 30, 3 << 40)] == ["1000", "1K", "1536M", "2G", "3T"]


# ---- schemas


@pytest.mark.parametrize("kind", [VmFile, GuestFile])
def test_the_schema_is_one(kind: type[VmFile] | type[GuestFile]):
    jsonschema.Draft202012Validator.check_schema(json.loads(schema(kind)))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        *((path, VmFile) for path in [TOP / "config/vm.toml", DATA / "good/config/vm.toml"]),
        *((path, GuestFile) for path in [*sorted(TOP.glob("phases/*/guest.toml")), *DATA.glob("good/phases/*/*.toml")]),
    ],
    ids=lambda value: value.parent.name if isinstance(value, Path) else "",
)
def test_shipped_files_keep_to_the_schema_and_the_rules(path: Path, kind: type[VmFile] | type[GuestFile]):
    content = tomllib.loads(path.read_text())
    jsonschema.validate(content, json.loads(schema(kind)))
    msgspec.convert(content, kind)


@QUICK
@given(FILES)
def test_what_the_schema_allows_the_model_takes(content: dict[str, Any]):
    plain = json.loads(json.dumps(content, default=str))
    validator = jsonschema.Draft202012Validator(json.loads(schema(VmFile)))
    if validator.is_valid(plain):
        msgspec.convert(plain, VmFile)


@pytest.mark.parametrize("guest", sorted(p.parent.name for p in TOP.glob("phases/*/guest.toml")))
def test_shipped_guests_load_with_the_shipped_vm_toml(guest: str):
    read(TOP, {"guest": guest})
