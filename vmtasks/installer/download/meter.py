"""How far a download is: a line with rate and time left, not too often."""

import time
from collections import deque
from collections.abc import Callable

from vmtasks.host.progress import Say, seconds


def megabytes(count: float) -> str:
    """1_500_000 -> '1.5 MB'."""
    return f"{count / 1e6:.1f} MB"


class Meter:
    """A Progress that says a line with rate and time left, at most one each `every_s` seconds and one at the end."""

    def __init__(self, say: Say, *, every_s: float = 1, clock: Callable[[], float] = time.monotonic) -> None:
        """`say` gets `120.0 of 260.0 MB (46 %), 5.1 MB/s, 27 s left`; the rate is that of the last ten lines."""
        self._say = say
        self._every_s = every_s
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque(maxlen=11)

    def __call__(self, done: int, total: int | None) -> None:
        """Take note of `done` bytes out of `total`."""
        now = self._clock()
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()  # begun anew: an old rate would be negative
        if self._seen and now - self._seen[-1][0] < self._every_s and done != total:
            return
        self._seen.append((now, done))
        then, before = self._seen[0]
        rate = (done - before) / (now - then) if now > then else 0.0
        line = f"{done / 1e6:.1f} of {megabytes(total)} ({100 * done // total} %)" if total else megabytes(done)
        line += f", {megabytes(rate)}/s" if rate else ""
        self._say(line + (f", {seconds((total - done) / rate)} left" if rate and total and done < total else ""))
