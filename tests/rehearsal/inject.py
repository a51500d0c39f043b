"""Boot one phase of the installed chain again, with what a test tells it on a CD of its own, and see how it is judged.

The image before it, its ISO and the judge are the project's; only the last CD is added. Runs in a process of its own,
so that two boots can go on at a time.
"""

import contextlib
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from msgspec.structs import replace as changed

from rehearsal import media, transcript
from vmtasks.config.load import load
from vmtasks.errors import PhaseError
from vmtasks.images import make
from vmtasks.images.steps import Builder

TIMEOUT_S, SILENCE_S, PROMPT_S = 40, 12, 4
"""Limits on fast hardware: a fault that goes unnoticed must not hold up the others for long."""


@dataclass(frozen=True)
class Order:
    """What to do: phase `number`, and which command fails with `status` from the `occurrence`-th time on.

    `pkg`: how the package manager is at first; `installer`: another installer CD.
    """

    number: int
    line: str = ""
    occurrence: int = 1
    status: int = 75
    pkg: str = ""
    installer: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """How the boot was judged: `cause` and `message` of the PhaseError, empty when the phase was believed."""

    order: Order
    cause: str
    message: str
    published: bool
    made_to_fail: tuple[str, ...]
    findings: tuple[str, ...]
    text: str


def boot(root: Path, env: dict[str, str], work: Path, order: Order) -> Outcome:
    """Carry out `order` for the project at `root`, with its environment; `work` is an absent folder."""
    os.environ.clear()
    os.environ.update(env)
    work.mkdir(parents=True)
    with (work / "output.log").open("w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        return _boot(root, work, order)


def _boot(root: Path, work: Path, order: Order) -> Outcome:
    config = load(root)
    told = media.fault_iso(
        work / "told.iso", line=order.line, occurrence=order.occurrence, status=order.status, pkg=order.pkg
    )
    digest = hashlib.sha256(repr(order).encode()).hexdigest()
    builder = Builder(config)
    texts = builder.read(order.number)
    job = builder.job(order.number, texts, builder.nodes({order.number: texts}), builder.below(order.number))
    job = replace(job, digest=digest)
    phase = changed(job.phase, cds=[*job.phase.cds, "told"], timeout_s=TIMEOUT_S, silence_timeout_s=SILENCE_S)
    talk = {
        name: [changed(exchange, timeout_s=PROMPT_S) for exchange in exchanges]
        for name, exchanges in config.guest.dialogue.items()
    }
    config = changed(config, vm_dir=work, guest=changed(config.guest, dialogue=talk))
    isos = {**job.isos, "installer": order.installer or job.isos["installer"], "told": told}
    job = replace(job, config=config, phase=phase, isos=isos)
    cause = message = ""
    with job.store.lock(f"image-{digest}", timeout_s=5) as lock:
        try:
            make.make(job, lock)
        except PhaseError as error:
            cause, message = error.cause, error.message
    images = [job.store.image(record) for record in job.store.made(digest)]
    published = bool(images)
    records = [path.with_suffix(".toml") for path in images]
    for path in (job.store.failed(digest), job.store.partial(digest), *records, *images):
        path.unlink(missing_ok=True)
    job.store.drop_key(digest)
    seen = transcript.read(job.console_log)
    return Outcome(order, cause, message, published, seen.made_to_fail, seen.findings, seen.text)
