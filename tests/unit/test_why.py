"""What `doit why` names is what then runs: each kind of input is changed, on real QEMU with boot sectors."""

import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from test_build import KEY
from test_inputs import Built

from amount import exhaustive
from bootsector import ask, cd, phase, power_off, sector, write_disk
from vmtasks.media import template
from vmtasks.qemu import argv

pytestmark = pytest.mark.skipif(not shutil.which(argv.PROGRAM), reason="QEMU is not installed")

ONE, TWO = "phases/sector/1-install.sh.j2", "phases/sector/2-provision.sh.j2"
GUEST = "phases/sector/guest.toml"
SHIPPED = "lib/vmtasks/media/phase"
Change = Callable[["Asked"], object]
EACH = 3


class Asked(Built):
    """A project that is asked what it would do, and then does it. Its phases succeed with any of the scripts below."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        guest = root / GUEST
        guest.write_text(guest.read_text() + '[vars]\nunused = "1"\ntitle = "two"\n')
        (root / TWO).write_text("step {{ vars.title }}; true '{{ public_key }}'\n{{# a comment #}}\n")
        self.again()

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.root / name
        text = path.read_text()
        assert text.count(old) >= 1, (name, old)
        path.write_text(text.replace(old, new, 1))

    def fetched(self) -> None:
        """Let the store know what the installer's recipe of now leads to: the same CD."""
        image = self.builder.installer().read_bytes()
        record = self.builder.installer_record.read_bytes()
        self.again()
        self.install(image)
        self.builder.installer_record.write_bytes(record)

    def tokens(self, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
        """Those of all scripts that there are going to be."""
        monkeypatch.setattr(template, "shipped_path", lambda name: self.root / SHIPPED / name)
        found: tuple[dict[str, None], dict[str, None]] = {}, {}
        for change in (lambda _: None, *SCRIPTS.values()):
            with_it = self.kept()
            change(self)
            self.again()
            for number in (1, 2):
                found[number - 1][self.token(number)] = None
            self.put_back(with_it)
        self.again()
        return list(found[0]), list(found[1])

    def kept(self) -> dict[Path, tuple[int, bytes]]:
        paths = [path for name in ("config", "lib", "phases") for path in (self.root / name).rglob("*")]
        return {
            path: (path.stat().st_mode, path.read_bytes()) for path in paths if path.is_file() and not path.is_symlink()
        }

    def put_back(self, before: dict[Path, tuple[int, bytes]]) -> None:
        for path in self.kept().keys() - before.keys():
            path.unlink()
        for path, (mode, data) in before.items():
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)
            path.chmod(mode & 0o777)

    def seen(self) -> dict[str, tuple[int, int]]:
        """All files below the state folder and the store, with what a write would change."""
        found = {}
        for place in (self.root / ".vm", self.root / "store"):
            for path in place.rglob("*"):
                info = path.lstat()
                if path.is_file() and "doit.sqlite3" not in path.name:
                    found[str(path)] = (info.st_size, info.st_mtime_ns)
        return found

    def why(self, *words: str) -> dict[str, dict[str, object]]:
        steps = json.loads(self.doit("why", "--json", *words))["steps"]
        return {step["name"]: step for step in steps}

    def ran(self) -> set[str]:
        """Have the snapshot; the steps that doit carried out for it."""
        self.doit("run", "-r", "json", "-o", str(self.root / "ran.json"), "snapshot")
        tasks = json.loads((self.root / "ran.json").read_text())["tasks"]
        return {task["name"] for task in tasks if task["started"]} - {"_key"}


def comment(name: str) -> Change:
    return lambda made: (made.root / name).write_text((made.root / name).read_text() + "# a comment\n")


def edit(name: str, old: str, new: str) -> Change:
    return lambda made: made.edit(name, old, new)


SCRIPTS: dict[str, Change] = {
    "1-install.sh.j2 changed (line 1)": edit(ONE, "1-install", "other"),
    "2-provision.sh.j2 changed (line 1)": edit(TWO, "step ", "true; step "),
    "2-provision.sh.j2 changed (line 3)": comment(TWO),
    "vars.title changed": edit(GUEST, 'title = "two"', 'title = "three"'),
    "poweroff changed (line 1)": edit(GUEST, 'name = "sector"', 'name = "sector"\npoweroff = "halt -p"'),
    "vmtasks: run.sh changed (line 2)": edit(f"{SHIPPED}/run.sh", "# Runs the phase", "# Carries out the phase"),
    "vmtasks: lib.sh changed (line 2)": edit(f"{SHIPPED}/lib.sh", "# What a phase", "# All that a phase"),
}
"""What a guest reads. The key is the cause that some step must be told to have."""

FACTS: dict[str, Change] = {
    "disk_size changed": edit(GUEST, 'disk_size = "4M"', 'disk_size = "8M"'),
    "disk_bus changed": edit(GUEST, 'disk_bus = "virtio-blk"', 'disk_bus = "ide"'),
    "disk_serial changed": edit(GUEST, "[machine]", '[machine]\ndisk_serial = "other"'),
    "nic changed": edit(GUEST, "[machine]", '[machine]\nnic = "e1000"'),
    "rng changed": edit(GUEST, "[machine]", "[machine]\nrng = false"),
    "dialogue changed": edit(GUEST, 'expect = "OK $"', 'expect = "OK +$"'),
    "cds changed": edit(GUEST, 'cds = ["phase"]', 'cds = ["phase", "installer"]'),
}
"""What a guest notices of its machine."""

NOTHING: dict[str, Change] = {
    "memory": edit(GUEST, 'memory = "16M"', 'memory = "32M"'),
    "cpus": edit(GUEST, "[machine]", "[machine]\ncpus = 2"),
    "a deadline": edit(GUEST, "silence_timeout_s = 5", "silence_timeout_s = 6"),
    "a comment in guest.toml": comment(GUEST),
    "a comment in vm.toml": comment("config/vm.toml"),
    "doit's database": lambda made: (made.root / ".vm/doit.sqlite3").unlink(),
}

RENDERED: dict[str, Change] = {
    "2-provision.sh.j2 changed (line 2)": edit(TWO, "a comment", "another comment"),
    "vars.unused changed": edit(GUEST, 'unused = "1"', 'unused = "2"'),
    "phase-2/run.sh is not as it was rendered": lambda made: record(made, "phase-2/run.sh").write_text("exit 0\n"),
}
"""What comes to nothing when it is rendered."""

INSTALLER: dict[str, Change] = {
    "installer.packages changed": edit(GUEST, 'packages = ["none"]', 'packages = ["none", "more"]'),
    "files/motd changed": lambda made: (made.files / "motd").chmod(0o755),
    "files/new is new": lambda made: (made.files / "new").write_text("new\n"),
}


def record(made: Asked, name: str) -> Path:
    return next((made.root / ".vm").glob(f"*/{name}"))


def truncate(made: Asked) -> None:
    image = made.image(2)
    image.chmod(0o644)
    os.truncate(image, image.stat().st_size - 1)


def copy_store(made: Asked) -> None:
    store = made.root / "store"
    shutil.copytree(store, made.root / "copy", copy_function=shutil.copy, symlinks=True)
    shutil.rmtree(store)
    (made.root / "copy").rename(store)
    for path in (store / "keys").rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)


def other_key(made: Asked) -> None:
    """The images keep the key that they let in."""
    (made.root / "store/keys/id_ed25519").unlink()
    (made.root / "store/keys/id_ed25519.pub").unlink()


def lose_keys(made: Asked) -> None:
    """As in a store that was copied without its keys. The first phase's image holds none."""
    for path in (made.root / "store/keys/snapshots").glob(f"{made.image(2).name.partition('.')[0]}*"):
        path.unlink()


STORE: dict[str, Change] = {
    "the private key that it accepts is not in the store": lose_keys,
    "bytes, its record says": truncate,
    "there is no record phase-1.toml": lambda made: record(made, "phase-1.toml").unlink(),
    "there is no record phase-2.toml": lambda made: record(made, "phase-2.toml").unlink(),
    "there is no record clean.toml": lambda made: record(made, "clean.toml").unlink(),
    "there is no phase-1.iso": lambda made: record(made, "phase-1.iso").unlink(),
    "there is no record of the installer": lambda made: shutil.rmtree(made.root / ".vm"),
}

UNCHANGED: dict[str, Change] = {"a copied store": copy_store, "another key in the store": other_key}

ALL = [
    *(
        (cause, change, cause)
        for rows in (SCRIPTS, FACTS, RENDERED, INSTALLER, STORE)
        for cause, change in rows.items()
    ),
    *((name, change, "") for rows in (NOTHING, UNCHANGED) for name, change in rows.items()),
]
assert len({name for name, _, _ in ALL}) == len(ALL)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    made = Asked(tmp_path_factory.mktemp("why") / "project")
    made.install(b"")
    made.builder.make_key()
    with pytest.MonkeyPatch.context() as patch:
        one, two = made.tokens(patch)
    assert min(len(one), len(two)) > 3
    second = b"".join(phase(token, hostkey=KEY, power=False) for token in two) + power_off()
    first = b"".join(phase(token, power=False) for token in one) + power_off()
    made.install(cd(ask("OK ", "boot"), write_disk(sector(second)), first))
    made.doit("snapshot")
    assert made.boots() == ["1-install", "2-provision"]
    return made


@pytest.mark.sampled
@pytest.mark.timeout(1200)
def test_what_why_names_is_what_then_runs(
    asked: Asked, pytestconfig: pytest.Config, record_property: Callable[[str, object], None]
):
    """One project, every kind of change: sets of steps and of boots are compared, and nothing is written by asking.

    Each third change in each run, beginning with another one every day, or all of them.
    """
    wrong, equal = [], 0
    first = datetime.now(UTC).toordinal() % EACH
    tried = ALL if exhaustive(pytestconfig) else ALL[first::EACH]
    for name, change, cause in tried:
        kept = asked.kept()
        change(asked)
        if name in INSTALLER:
            asked.fetched()
        before, boots = asked.seen(), len(asked.boots())
        told = asked.why("snapshot")
        written = before != asked.seen()
        named = {step for step, each in told.items() if each["runs"] == "yes"}
        unsure = {step for step, each in told.items() if each["runs"] == "unknown"}
        phases = [step for step in told if step.startswith("phase:") and step in named]
        to_boot = [step for step in phases if not told[step]["from_store"]]
        ran = asked.ran()
        booted = [f"phase:{line[0]}" for line in asked.boots()[boots if asked.boots() else 0 :]]
        causes = {text for each in told.values() for text in each["causes"]}
        as_told = any(cause in text for text in causes) if cause else not named
        may = {"snapshot"} if change in (truncate, lose_keys) else set()  # a boot sector makes the same bytes again
        if written or not as_told or unsure != may or (named, to_boot) != (ran - unsure, booted):
            wrong.append((name, sorted(named), sorted(ran), to_boot, booted, sorted(causes), written))
        else:
            equal += 1
        asked.put_back(kept)
        asked.again()
        if cause:
            asked.doit("snapshot")
    counts = f"changes tried {len(tried)}, sets equal {equal}"
    record_property("counts", counts)
    assert not wrong, counts
