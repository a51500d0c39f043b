"""What the documents say is there is there: tasks, commands, variables, files, keys, modules, messages, packages."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec
import pytest
from typer.main import get_command

from vmtasks import __version__
from vmtasks.cli import app
from vmtasks.config import recipe, tables
from vmtasks.config.load import VARIABLES, schema

TOP = Path(__file__).parents[2]
CHANGELOG, DEPENDENCIES, README = TOP / "CHANGELOG.md", TOP / "docs/dependencies.md", TOP / "README.md"
CONTRACT = TOP / "phases/README.md"
DOCUMENTS = [
    README,
    CHANGELOG,
    CONTRACT,
    TOP / "CONTRIBUTING.md",
    *sorted(TOP.glob("docs/*.md")),
    *sorted(TOP.glob("phases/*/README.md")),
]
CONFTEST = TOP / "tests/vm/conftest.py"
OURS = ("benchmarks/", "config/", "docs/", "examples/", "phases/", "tests/", "vmtasks/")
KEYS = {
    "Top level": tables.GuestFile,
    "[machine]": tables.HardwareTable,
    "[ssh]": tables.SshTable,
    "[[phases]]": tables.PhaseTable,
    "[[dialogue.NAME]]": tables.Exchange,
    "[[failures]]": tables.FailureText,
    "[[questions]]": tables.Question,
    "[installer], downloaded": tables.Download,
    "[installer], composed from Debian packages": recipe.Recipe,
    "[installer.initramfs]": recipe.Initramfs,
    "[installer.iso]": recipe.Iso,
    "[[installer.links]]": recipe.Links,
}
FORBIDDEN = re.compile(r"\b(?:pkill|killall)\b|StrictHostKeyChecking[ =]+(?:no|off|accept-new)\b", re.IGNORECASE)

PYPROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(TOP)))


@cache
def tasks() -> frozenset[str]:
    """What doit itself says there is, in a state folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        env = {"PATH": os.environ["PATH"], "VM_DIR": f"{folder}/vm", "VMTASKS_STORE": f"{folder}/store"}
        words = [sys.executable, "-m", "doit", "list", "--all", "--quiet"]
        done = subprocess.run(words, cwd=TOP, env=env, capture_output=True, text=True, check=True)
    return frozenset(done.stdout.split())


@cache
def source() -> str:
    """All that may hold the name of a variable or the text of a message."""
    shell = TOP.glob("vmtasks/media/phase/*.sh")
    files = [TOP / "doit", *TOP.glob("vmtasks/**/*.py"), *shell, *TOP.glob("phases/*/guest.toml")]
    return "\n".join(path.read_text() for path in files)


def blocks(text: str, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """Command lines of fenced blocks, typed lines of transcripts, and commands named in the text."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    lines += [line[2:] for block in blocks(text, "console") for line in block.splitlines() if line.startswith("$ ")]
    lines += re.findall(r"`((?:\./|\.venv/bin/)?(?:doit|vmtasks) [^`]+)`", prose(text))
    yield from (words for line in lines if (words := shlex.split(line, comments=True)))


def check_doit(words: list[str]) -> None:
    """The arguments of doit: variables that there are, tasks that there are, options that a task has."""
    rest = iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if word.startswith("--"):
            assert word == "--all" or f'"long": "{word[2:]}"' in source(), word
            if word in {"--name", "--phase", "--user"}:
                next(rest, "")
        elif word.startswith("-"):
            assert word in {"-a", "-c", "-v"}, word
        elif equals:
            assert name in {variable.name for variable in VARIABLES}, word
        else:
            assert word in tasks() or word in {"help", "info", "list"}, f"doit {word}"


def check_vmtasks(words: list[str]) -> None:
    """A command that there is, with options that it has; what stands after `--` is somebody else's."""
    command: object = get_command(app)
    for word in words:
        if word == "--":
            return
        if word in getattr(command, "commands", {}):
            command = command.commands[word]  # type: ignore[attr-defined]
            continue
        command = getattr(command, "commands", {}).get(getattr(command, "default", ""), command)
        assert not hasattr(command, "commands") or word.startswith("--"), f"vmtasks {shlex.join(words)}: {word}"
        if word.startswith("-") and getattr(command, "name", "") not in ("exec", "ssh"):
            options = {name for parameter in command.params for name in parameter.opts}  # type: ignore[attr-defined]
            assert word in options | {"--help", "--version", "--install-completion"}, word


@documents
def test_commands_exist(document: Path) -> None:
    for program, *words in commands(document.read_text()):
        if Path(program).name == "doit":
            check_doit(words)
        elif Path(program).name == "vmtasks":
            check_vmtasks(words)


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_the_first_command_is_the_promise() -> None:
    first = next(commands(README.read_text()))
    assert first == ["./doit", "guest=tiny", "auto_install", "quick"]


@documents
def test_variables_exist(document: Path) -> None:
    known = {name for variable in VARIABLES for name in variable.env}
    for name in re.findall(r"\b(?:SSH|VM|VMTASKS)_[A-Z_]+\b", document.read_text()):
        assert name in known or name in source() or name in CONFTEST.read_text(), name


def test_every_variable_is_explained() -> None:
    text = (TOP / "docs/configuration.md").read_text()
    for variable in VARIABLES:
        assert f"`{variable.name}=`" in text, variable.name
        for name in variable.env:
            assert f"`{name}`" in text, name


def test_every_task_explains_itself() -> None:
    """What it does, how it ends, and an example that there is, in `doit help TASK`."""
    names = [name for name in sorted(tasks()) if not name.startswith("check:") and name != "check"]
    script = "import sys, doit.doit_cmd as d\nfor n in sys.argv[1:]: d.DoitMain().run(['help', n]); print('----')"
    with tempfile.TemporaryDirectory() as folder:
        env = {"PATH": os.environ["PATH"], "VM_DIR": f"{folder}/vm", "VMTASKS_STORE": f"{folder}/store"}
        words = [sys.executable, "-c", script, *names]
        done = subprocess.run(words, cwd=TOP, env=env, capture_output=True, text=True, check=True)
    pages = done.stdout.split("----\n")[:-1]
    assert len(pages) == len(names) > 20
    for name, page in zip(names, pages, strict=True):
        assert page.startswith(f"{name}  "), page
        assert "\n\nExit status: " in page, name
        example = re.findall(r"^Example: (doit .*?)(?:  .*)?$", page, re.MULTILINE)
        assert len(example) == 1, name
        for command in re.split(r" (?:&&|\|\|) ", example[0]):
            check_doit(shlex.split(command)[1:])


def test_tests_named_in_the_table_of_promises_exist() -> None:
    there = "\n".join(path.read_text() for path in TOP.glob("tests/**/*.py"))
    named = set(re.findall(r"`(test_\w+)`", (TOP / "docs/parity.md").read_text()))
    assert len(named) > 20
    for name in named:
        assert f"def {name}(" in there, name


@documents
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@documents
def test_files_exist(document: Path) -> None:
    """Paths in code marks that begin with one of our folders. NAME, GUEST and <...> stand for something else."""
    for path in re.findall(r"`([^`\s]+)`", prose(document.read_text())):
        if path.startswith(OURS) and not re.search(r"NAME|GUEST|<", path):
            assert (TOP / path).exists(), path


def test_modules_named_as_owners_exist() -> None:
    text = (TOP / "docs/architecture.md").read_text()
    for path in re.findall(r"`((?:[a-z_]+/)*\w+\.py)`", text):
        assert (TOP / "vmtasks" / path).is_file(), path


def test_every_module_is_in_the_table() -> None:
    """In the row of its package, by its name."""
    rows = dict(re.findall(r"(?m)^\| `(\w+)/` \| (.*) \|$", (TOP / "docs/architecture.md").read_text()))
    for path in sorted((TOP / "vmtasks").rglob("*.py")):
        package, *inner = path.relative_to(TOP / "vmtasks").parts
        if inner and not path.name.startswith("__"):
            assert f"`{path.stem}`" in rows[package], path


def test_the_module_map_is_the_enforced_one() -> None:
    contract = PYPROJECT["tool"]["importlinter"]["contracts"][0]
    wanted = [sorted(layer.split(" | ")) for layer in contract["layers"]]
    text = next(block for block in blocks((TOP / "docs/architecture.md").read_text(), "text") if " | tasks " in block)
    shown = [sorted(re.split(r"\s{2,}", line)[0].split(" | ")) for line in text.splitlines()]
    assert shown == wanted, "pyproject.toml has other layers: mend the map in docs/architecture.md"


@pytest.mark.parametrize(("heading", "kind"), KEYS.items(), ids=KEYS)
def test_every_key_of_guest_toml_is_explained(heading: str, kind: type[msgspec.Struct]) -> None:
    section = CONTRACT.read_text().partition(f"\n### {heading}\n")[2].partition("\n##")[0]
    shown = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    tag = kind.__struct_config__.tag_field
    assert sorted(shown) == sorted([*kind.__struct_fields__, *([tag] if tag else [])])


def test_the_library_of_phase_scripts_is_explained() -> None:
    functions = re.findall(r"^(\w+)\(\)", (TOP / "vmtasks/media/phase/lib.sh").read_text(), re.MULTILINE)
    shown = re.findall(r"^\| `(\w+) [A-Z]", CONTRACT.read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(name for name in functions if not name.startswith("vmtasks_"))


def test_messages_of_the_troubleshooting_table_exist() -> None:
    """Each piece of a quoted message has all its longer words on one line of the source."""
    table = (TOP / "docs/troubleshooting.md").read_text()
    lines = source().splitlines()
    quoted = [
        text for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for text in re.findall(r"`(.+?)`", cell)
    ]
    assert len(quoted) > 10
    for text in quoted:
        for piece in re.split(r"\.\.\.|[:(] ?", text):
            words = re.findall(r"[A-Za-z]{4,}", piece)
            assert any(all(word in line for word in words) for line in lines), text


@pytest.mark.parametrize(("name", "kind"), [("vm", tables.VmFile), ("guest", tables.GuestFile)])
def test_schemas_are_those_of_the_code(name: str, kind: type[tables.VmFile | tables.GuestFile]) -> None:
    """After a change of the models: `vmtasks schema docs`."""
    assert (TOP / f"docs/{name}.schema.json").read_bytes() == schema(kind)


def test_every_dependency_is_explained() -> None:
    project = PYPROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    shown = re.findall(r"^\| ([\w.-]+) \|", DEPENDENCIES.read_text(), re.MULTILINE)
    assert {re.split(r"[^\w.-]", item)[0] for item in wanted} <= set(shown)


def test_the_version_is_in_the_changelog() -> None:
    assert PYPROJECT["project"]["version"] == __version__
    assert re.search(rf"^## \[{re.escape(__version__)}\]", CHANGELOG.read_text(), re.MULTILINE)


def test_nothing_advises_what_harms() -> None:
    """Ending processes by a broad name, or not checking host keys. Tests may name it in order to look for it."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=TOP, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, done.stdout.split("\0")):
        path = TOP / name
        if not name.startswith("tests/") and path.is_file():
            found = FORBIDDEN.search(path.read_text(errors="replace"))
            assert found is None, f"{name}: {found[0]}"
