"""URLs and digests -> one verified file that is named by its SHA-256, from the folder if it is there.

<sha256>                the content, decompressed, 0444; published by rename after fsync
<sha256>.json           where it came from and each digest computed on the way; written after it
<name>.<key>.part       what was downloaded so far, still compressed
<name>.<key>.part.json  URL, validator and length that those bytes belong to; without it the part is not believed
<name>.<key>.unpacked   content being written
<name>.<key>.lock       held by the one process that fetches this
"""

import errno
import re
import time
from pathlib import Path

from vmtasks.errors import FetchError
from vmtasks.host.locks import lock
from vmtasks.host.progress import Say
from vmtasks.installer.download.digest import Digest, holds
from vmtasks.installer.download.meter import megabytes
from vmtasks.installer.download.transfer import Progress, Record, Transfer, free_bytes, read_json
from vmtasks.installer.download.want import Fetched, Limits, Want, stem


def fetch(
    want: Want,
    folder: Path,
    *,
    progress: Progress | None = None,
    waiting: Say | None = None,
    limits: Limits | None = None,
    allow_unverified: bool = False,
) -> Fetched:
    """Leave the content of `want` as `folder/<sha256>`, from there if it is there, else from the first URL that has it.

    `waiting` is told when another process fetches the same. FetchError says what was tried, what came back and what to
    do; StateError when the other process was not done in time. In both cases nothing is published.
    """
    if not want.digests and not allow_unverified:
        raise FetchError(
            f"no digest is known for {want.name}, so what a mirror sends could not be checked",
            hint="add its digest to the configuration, or pass --allow-unverified",
        )
    limits = limits or Limits()
    deadline = time.monotonic() + limits.total_s
    try:
        if (found := _reuse(want, folder)) is not None:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        left = max(0.0, deadline - time.monotonic())
        told = None if waiting is None else lambda holder: waiting(f"{want.name}: {holder} is fetching it; waiting")
        with lock(folder / f"{stem(want)}.lock", want.name, timeout_s=left, waiting=told):
            return _reuse(want, folder) or Transfer(want, folder, limits, progress, deadline).run()
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        reason = f"the disk is full ({megabytes(free_bytes(folder))} free)" if full else str(error)
        hint = "free some space" if full else "check the folder's permissions and its disk"
        raise FetchError(
            f"{want.name} could not be stored in {folder}: {reason}",
            hint=f"{hint}, then run it again: what has arrived is kept",
        ) from error


def _reuse(want: Want, folder: Path) -> Fetched | None:
    """What is already here, read again to be sure. The record knows digests of downloads that are gone."""
    strong = [d.hex for d in want.promises if d.algorithm == "sha256" and d.of == "content"]
    names = strong or [path.stem for path in sorted(folder.glob("*.json")) if re.fullmatch(r"[0-9a-f]{64}", path.stem)]
    for sha256 in names if want.promises else ():
        record = read_json(folder / f"{sha256}.json", Record)
        if not strong and (record is None or not want.promises <= record.digests):
            continue
        content = {d for d in want.promises if d.of == "content"} | {Digest("sha256", sha256)}
        if holds(folder / sha256, content):
            size = (folder / sha256).stat().st_size
            return Fetched(folder / sha256, sha256, size, record.url if record else "", verified=True)
    return None
