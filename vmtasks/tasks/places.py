"""The folders that a run needs, and doit's database, before doit opens it."""

import contextlib
import os
import sqlite3
import sys
from pathlib import Path
from typing import NoReturn

from vmtasks.config.load import show
from vmtasks.errors import ConfigError
from vmtasks.host import files
from vmtasks.host.progress import to_stderr
from vmtasks.tasks.context import CONFIG


def prepare_folders() -> None:
    """Create the state folder and the store; print one line and exit with 2 if the state folder is not usable."""
    folder = CONFIG.vm_dir
    try:
        files.private_folder(folder)
        fault = "" if os.access(folder, os.W_OK | os.X_OK) else "not writable"
    except (OSError, ValueError) as error:
        fault = _reason(error)
    if fault:
        _refuse(f"VM_DIR (dir=) = {show(folder)}: {fault}; name a folder that you may write to")
    with contextlib.suppress(OSError, ValueError):  # tasks that need the store report that
        files.private_folder(CONFIG.store_dir)


def database() -> Path:
    """The path of doit's database. A damaged one is renamed, with a warning; losing it costs nothing."""
    path = CONFIG.vm_dir / "doit.sqlite3"
    fault = _fault(path)
    if fault:
        aside = path.with_name(f"{path.name}.damaged")
        try:
            if aside.is_dir() and not aside.is_symlink():
                aside.rename(aside.with_name(f"{aside.name}.{aside.lstat().st_ino}"))
            path.rename(aside)
        except OSError as error:
            _refuse(f"{show(path)}: {fault}, and cannot be set aside: {_reason(error)}; remove it")
        to_stderr(f"warning: {show(path)}: {fault}; it was set aside as {aside.name}, and nothing is lost\n")
    return path


def _fault(path: Path) -> str:
    """Why doit cannot use the database, or ''."""
    try:
        path.lstat()
    except FileNotFoundError:
        return ""
    if not path.is_file():
        return "not a file"
    if not os.access(path, os.R_OK | os.W_OK):
        return "not ours to read and write"
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=0)) as connection:
            result = connection.execute("pragma quick_check(1)").fetchone()
            tables = dict(connection.execute("select name, sql from sqlite_master where type = 'table'"))
    except sqlite3.OperationalError:
        return ""  # another run holds it
    except sqlite3.DatabaseError as error:
        return str(error)
    intact = result == ("ok",) and (not tables or "doit" in tables)
    return "" if intact else "damaged"


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _refuse(message: str) -> NoReturn:
    to_stderr(f"error: {message}\n")
    sys.exit(ConfigError.exit_code)
