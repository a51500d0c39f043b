"""Jobs of a machine: commands that outlive the connection and this process."""

from collections.abc import Callable, Mapping
from typing import Any

from vmtasks.errors import StateError
from vmtasks.guest import job
from vmtasks.guest.command import Command
from vmtasks.guest.job import JobEnd
from vmtasks.guest.jobview import JobView
from vmtasks.guest.link import Link


class Jobs:
    """The jobs of one machine. A job is identified by its id or a unique prefix of it."""

    def __init__(self, link: Callable[[], Link]) -> None:
        """`link` returns the link at each call."""
        self._link = link

    def start(
        self, command: Command, *, title: str = "", cwd: str = "", env: Mapping[str, str] | None = None, user: str = ""
    ) -> str:
        """Start a script (str) or a program with arguments (list), and return its job's id."""
        return job.start(self._link(), command, title=title, cwd=cwd, env=env, user=user)

    def list(self) -> "list[JobView]":
        """All jobs, finished ones too."""
        return job.listing(self._link())

    def follow(self, which: str, *, timeout_s: float, **more: Any) -> JobEnd:
        """Wait for a job's end: `.status`, `.stdout`. `more` as for vmtasks.guest.job.follow()."""
        link = self._link()
        link.open(wait_s=min(timeout_s, link.window_s))  # retry as long as after a later loss
        return job.follow(link, self.find(which), timeout_s=timeout_s, **more)

    def cancel(self, which: str) -> JobView:
        """End a job's process group: SIGTERM, then SIGKILL."""
        return job.cancel(self._link(), self.find(which))

    def remove(self, which: str) -> None:
        """Remove a finished job and its output."""
        job.remove(self._link(), self.find(which))

    def find(self, which: str) -> str:
        """The id that begins with `which`. StateError if none does, or more than one."""
        found = [view.job for view in self.list() if view.job.startswith(which)]
        if len(found) != 1:
            of = self._link().target.name
            many = f"{len(found)} jobs of {of} begin" if found else f"no job of {of} begins"
            raise StateError(f"{many} with {which!r}", hint=f"vmtasks jobs {of}")
        return found[0]
