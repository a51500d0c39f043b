"""A guest that is this host: what ssh is told runs here, in a home of its own, so that real rsync meets real rsync."""

import os
from pathlib import Path

import pytest

REMOTE = """#!/bin/sh
# In the place of ssh: runs the command here, as sshd would in the user's home. Arguments: -F config name command...
test "$1" = -F || exit 98
test "$2" = "$EXPECTED_CONFIG" || exit 99
shift 3
cd "$HOME" && exec ${LOGIN_SHELL:-/bin/sh} -c "$*"
"""


def lead_here(place: Path, monkeypatch: pytest.MonkeyPatch, config: Path) -> Path:
    """Put that ssh into the PATH; returns the guest's home. `config` is what it must be called with."""
    (place / "bin").mkdir(exist_ok=True)
    (place / "bin/ssh").write_text(REMOTE)
    (place / "bin/ssh").chmod(0o755)
    (place / "home").mkdir()
    monkeypatch.setenv("HOME", str(place / "home"))
    monkeypatch.setenv("PATH", f"{place}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("EXPECTED_CONFIG", str(config))
    return place / "home"
