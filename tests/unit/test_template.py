"""Whatever a value holds, the shell gets it back byte for byte; and the shipped phases are sound shell."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tools import SHELLCHECK
from vmtasks.config.load import load
from vmtasks.errors import ConfigError
from vmtasks.media import template
from vmtasks.media.template import render, shell_words

TOP = Path(__file__).parents[2]
SHELLS = {
    name: [path, *words]
    for name, words in {"sh": (), "dash": (), "bash": (), "busybox": ("sh",)}.items()
    if (path := shutil.which(name))
}
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0")) | st.text(
    "'\"\\$`!*?[]{}#~;&|<>()\n\t -=%é", max_size=8
)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def to(text: str) -> Path:
        path = tmp_path / "x.sh.j2"
        path.write_text(text)
        return path

    return to


def words_of(shell: list[str], text: str) -> list[bytes]:
    """The words that a shell makes of `text`."""
    script = f'show() {{ for word in "$@"; do printf "%s\\0" "$word"; done; }}\nshow {text}\n'
    done = subprocess.run([*shell, "-s"], input=script.encode(), capture_output=True, check=True, timeout=10)
    return done.stdout.split(b"\0")[:-1]


@pytest.mark.parametrize("shell", SHELLS)
@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, max_size=5))
@example(
    ["", "-n", "a\\", "it's", "'", "\\'", '"$(id)"', "`id`", "a\nb\n", "{{ x }}", "!!", "~", "*", "\r\n", "\x7f\x1b"]
)
def test_any_words_come_back_byte_for_byte(shell: str, words: list[str]):
    assert words_of(SHELLS[shell], shell_words(words)) == [word.encode() for word in words]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(WORDS, WORDS)
def test_any_value_rendered_and_run_comes_back(write: Any, value: str, inside: str):
    path = write('printf "%s\\0" {{ value }} a{{ value }}b "x"{{ vars.inside }}\n')
    text = render(path, {"value": value, "vars": {"inside": inside}})
    out = subprocess.run(["/bin/sh"], input=text.encode(), capture_output=True, check=True, timeout=10).stdout
    assert out.split(b"\0")[:-1] == [value.encode(), f"a{value}b".encode(), f"x{inside}".encode()]


def test_values_of_other_kinds(write: Any):
    values = {"yes": True, "no": False, "n": 42, "empty": [], "list": ["a b", "$c", 3, True], "pair": ("x", "y")}
    text = render(write("{{ yes }} {{ no }} {{ n }} [{{ empty }}] {{ list }} {{ pair }}"), values)
    assert text == "yes no 42 [] 'a b' '$c' 3 yes x y"


def test_raw_is_not_quoted(write: Any):
    assert render(write("{{ a | raw }} {{ a }} {{ (a ~ 'x') | raw }} {{ n | raw }}"), {"a": "$b c", "n": 5}) == (
        "$b c '$b c' $b cx 5"
    )


def test_text_of_the_template_is_left_alone(write: Any):
    text = "${#name} ${name##*/} ${x%\\%*} $# '#' {#a} #} \\n \ttab {x} {}; #!/bin/sh\n\n"
    assert render(write(text), {}) == text
    assert render(write("a {{# a comment with {{ nothing }} #}}b"), {}) == "a b"


def test_conditions_and_loops(write: Any):
    path = write("{% if flag %}A{% else %}B{% endif %}{% for x in list %} -p {{ x }}{% endfor %}")
    assert render(path, {"flag": False, "list": ["a b", "c"]}) == "B -p 'a b' -p c"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n\n{{ hostnme }}", "x.sh.j2:3: 'hostnme' is undefined; there is hostname, vars.user"),
        ("\n{{ vars.usr }}", "x.sh.j2:2: 'dict object' has no attribute 'usr'; there is hostname, vars.user"),
        ("{{ hostnme | raw }}", "x.sh.j2:1: 'hostnme' is undefined; there is hostname, vars.user"),
        ("{% if hostnme %}{% endif %}", "x.sh.j2:1: 'hostnme' is undefined; there is hostname, vars.user"),
        ("\n{{ hostname", "x.sh.j2:2: unexpected end of template, expected 'end of print statement'."),
        ("\n{% if %}", "x.sh.j2:2: Expected an expression, got 'end of statement block'"),
        ("{{ hostname | nofilter }}", "x.sh.j2:1: No filter named 'nofilter'."),
        ("{{ 1 / 0 }}", "x.sh.j2:1: division by zero; there is hostname, vars.user"),
        ("{{ 1.5 }}", "x.sh.j2:1: 1.5 is no text, number, flag or list of them; there is hostname, vars.user"),
        ("{{ none }}", "x.sh.j2:1: None is no text, number, flag or list of them; there is hostname, vars.user"),
        (
            "{{ vars }}",
            "x.sh.j2:1: {'user': 'me'} is no text, number, flag or list of them; there is hostname, vars.user",
        ),
        ("{% include 'x' %}", "x.sh.j2:1: no loader for this environment specified; there is hostname, vars.user"),
    ],
)
def test_a_wrong_template_is_said_with_its_line(text: str, message: str, write: Any):
    with pytest.raises(ConfigError) as caught:
        render(write(text), {"hostname": "h", "vars": {"user": "me"}})
    assert caught.value.message == message


def test_a_value_that_no_shell_word_can_hold(write: Any):
    with pytest.raises(ConfigError, match="NUL"):
        render(write("{{ a }}"), {"a": "x\0y"})


def test_a_template_that_is_no_text(write: Any):
    path = write("")
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"^x.sh.j2: not UTF-8"):
        render(path, {})


# ---- the shipped phases

PHASES = sorted(TOP.glob("phases/*/*.sh.j2"))
SAMPLES = {"public_key": "ssh-ed25519 AAAAC3Nza me@here", "ssh_user": "dev"}


def rendered(path: Path, folder: Path) -> Path:
    """A shipped phase with sample values, in the place where it runs: after lib.sh."""
    config = load(TOP, {"guest": path.parent.name}, {"HOME": "/"})
    values = {
        "disk_serial": config.guest.machine.disk_serial,
        "guest": config.guest.name,
        "hostname": config.guest.name,
        "vars": dict(config.vars),
        "version": config.version,
        **SAMPLES,
    }
    (folder / "lib.sh").write_text(template.shipped("lib.sh"))
    script = folder / "phase.sh"
    script.write_text(f"# shellcheck shell=sh source=lib.sh\n. ./lib.sh\nset -e\n{render(path, values)}")
    return script


@pytest.mark.parametrize("path", PHASES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shipped_phases_are_sound_shell(path: Path, tmp_path: Path):
    script = rendered(path, tmp_path)
    for shell in SHELLS.values():
        subprocess.run([*shell, "-n", script], check=True, timeout=10)
    # SC2154 knows only variables that are set here, run.sh exports more; SC2317 and SC2329 take functions that `retry`
    # calls for dead code; SC2194 and SC2050 are about values that the template has filled in.
    argv = [SHELLCHECK, "-x", "-s", "sh", "-e", "SC2154,SC2317,SC2329,SC2194,SC2050", script.name]
    checked = subprocess.run(argv, cwd=tmp_path, capture_output=True, check=False, timeout=60)
    assert checked.stdout.decode() == ""


def test_there_are_phases_to_check():
    assert PHASES
