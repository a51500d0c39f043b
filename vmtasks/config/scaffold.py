"""Write a new project: dodo.py, config/vm.toml and a guest's phases, with schemas for the editor."""

import re
import shutil
from pathlib import Path

import tomli_w

from vmtasks.config.load import CONFIG_PATH, PHASES_PATH, schema, shipped
from vmtasks.config.mistakes import suggest
from vmtasks.config.tables import GuestFile, VmFile
from vmtasks.errors import ConfigError, MissingToolError, StateError
from vmtasks.host import files, process

GIT_S = 60.0
DODO = '''"""`doit list` shows the tasks, `doit help_vars` the variables; config/vm.toml is what to edit."""

from vmtasks.tasks import *  # noqa: F403
'''


def scaffold(folder: Path, guest: str) -> list[Path]:
    """Write a project into `folder`; returns what was written.

    ConfigError for a guest that does not exist, StateError when one of the files exists.
    """
    guests = {path.parent.name: path.parent for path in (shipped() / PHASES_PATH).glob("*/guest.toml")}
    if guest not in guests:
        raise ConfigError(f"--guest {guest!r}: there is no such guest; {suggest(guest, guests)}")
    dodo, config, phases = folder / "dodo.py", folder / CONFIG_PATH, folder / PHASES_PATH / guest
    for path in (dodo, config, phases):
        if path.exists():
            raise StateError(
                f"{path} is there already; nothing was written", hint="choose another folder, or remove it"
            )
    first = first_config(folder, guest)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(guests[guest], phases, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    files.write(config, "#:schema vm.schema.json\n" + tomli_w.dumps(first))
    guest_toml = phases / "guest.toml"
    text = re.sub(
        r"^#:schema .*$", "#:schema ../guest.schema.json", guest_toml.read_text(), count=1, flags=re.MULTILINE
    )
    files.write(guest_toml, text)
    files.write(dodo, DODO)
    contract = shipped() / PHASES_PATH / "README.md"
    if contract.is_file():
        files.write(phases.parent / "README.md", contract.read_bytes())
    ignore = folder / ".gitignore"
    if not ignore.exists():
        files.write(ignore, "/.vm/\n")
    return [dodo, config, phases, *write_schemas(config.parent, phases.parent)]


def first_config(folder: Path, guest: str) -> dict[str, object]:
    """A vm.toml that works at once: syncs the project and runs its tests as far as they can be guessed.

    To be asked before anything is written: what is ours is left out of the sync, and what is the project's is not.
    """
    name, command = first_suite(folder)
    return {
        "guest": guest,
        "machine": {"ssh_port": "auto"},
        "sync": {"source": ".", "dest": "src", "exclude": first_excludes(folder, guest)},
        "suites": {name: {"command": command, "timeout_s": 600}},
        "quick": {"suites": [name]},
    }


def first_excludes(folder: Path, guest: str) -> list[str]:
    """What no guest needs: what scaffold() writes, or else an edit of vm.toml would change the tree; and products."""
    ours = {
        CONFIG_PATH.parent: [CONFIG_PATH.name, "vm.schema.json"],
        PHASES_PATH: [f"{guest}/", "README.md", "guest.schema.json"],
    }
    written = ["/dodo.py"]
    for place, names in ours.items():
        written += [f"/{place}/{name}" for name in names] if (folder / place).exists() else [f"/{place}/"]
    build = [] if _has_sources(folder, "build") else ["/build/"]
    return ["/.git/", "/.venv/", "__pycache__/", *written, *build]


def _has_sources(folder: Path, name: str) -> bool:
    """Whether that folder is part of the project: git tracks something in it; without git: it is there."""
    if not (folder / name).is_dir():
        return False
    try:
        tracked = process.run(["git", "-C", folder, "ls-files", "--", name], timeout_s=GIT_S, check=False)
    except MissingToolError:
        return True
    return tracked.status != 0 or bool(tracked.stdout)


def first_suite(folder: Path) -> tuple[str, str]:
    """Name and command of how this project seems to run its tests; a mere sign of life where it cannot be told."""
    makefile = folder / "Makefile"
    if makefile.is_file():
        targets = re.findall(r"^(test|check)\s*:", makefile.read_text(errors="replace"), re.MULTILINE)
        if targets:
            return "unit", f"make {targets[0]}"
    if (folder / "go.mod").is_file():
        return "unit", "go test ./..."
    return "smoke", "uname -a"


def write_schemas(vm_folder: Path, guest_folder: Path) -> list[Path]:
    """Write the schemas of the two files; returns their paths."""
    written = []
    for path, kind in ((vm_folder / "vm.schema.json", VmFile), (guest_folder / "guest.schema.json", GuestFile)):
        files.write_if_changed(path, schema(kind))
        written.append(path)
    return written
