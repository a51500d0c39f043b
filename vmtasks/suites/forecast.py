"""What a run would do: which steps and why, what the store already has, how long each took last time.

Writes nothing and boots nothing.
"""

import difflib
from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec

from vmtasks.config.load import Config
from vmtasks.errors import ConfigError
from vmtasks.images import plan
from vmtasks.images.plan import Node
from vmtasks.images.reader import REBUILT, Reader
from vmtasks.images.workspace import PhaseRecord
from vmtasks.store.records import ImageRecord, read_record
from vmtasks.suites.results import Results

Runs = Literal["no", "yes", "unknown"]


AGAIN = "{} is built again, perhaps with other bytes"


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One node, and what a run would do about it.

    `runs`: `unknown` if it depends on an earlier step's result. `from_store`: it runs, but takes its product from the
    store, without a boot or a download. `cost_s`: how many seconds it took last time, or None. `diffs`: the changes of
    its source texts, by part.
    """

    name: str
    runs: Runs
    causes: list[str] = []
    from_store: bool = False
    cost_s: float | None = None
    after: list[str] = []
    diffs: dict[str, str] = {}


class Images(NamedTuple):
    """The steps up to the snapshot; the last image, if it exists already; and whether a run would make another one."""

    steps: list[Step]
    last: ImageRecord | None
    another: Runs


class Forecast:
    """What a run in this project would do."""

    def __init__(self, config: Config) -> None:
        """Reads nothing yet."""
        self.config = config
        self.reader = Reader(config, read_only=True)
        self.results = Results(config, read_only=True)

    def steps(self, asked: Iterable[str] = ()) -> list[Step]:
        """The steps that the tasks `asked` need, in the order of the plan; all steps if `asked` is empty.

        ConfigError for a name that is not a step's.
        """
        nodes = {node.name: node for node in plan.plan(self.config, self.reader.inputs({}))}
        asked = list(asked)
        wanted = self._needed(asked, nodes)
        images = self._images(nodes)
        made = [*images.steps, *self._suite_steps(asked, wanted, images, nodes)]
        return [step for step in made if step.name in wanted]

    def _needed(self, asked: list[str], nodes: dict[str, Node]) -> set[str]:
        after = {name: set(node.after) for name, node in nodes.items()}
        after |= {kind: {name for name in nodes if name.startswith(f"{kind}:")} for kind in plan.PER_PHASE}
        after |= {"auto_install": {"snapshot"}, "start": {"snapshot"}, "quick": {"snapshot"}}
        after["quick"] |= {f"test:{name}" for name in self.config.quick}
        after["test"] = after["test_all"] = {f"test:{name}" for name in self.config.suites}
        for name in asked:
            if name not in after:
                raise ConfigError(f"why: {name!r} is no step of the plan", hint=f"one of {', '.join(sorted(after))}")
        found, todo = set[str](), [*asked] or list(after)
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                todo += after[name]
        return found

    def _images(self, nodes: dict[str, Node]) -> Images:
        made = [self._fetch(nodes["fetch"])]
        image: ImageRecord | None = None
        another: Runs = "no"
        for number in self.reader.numbers:
            made += [self._file_step(f"{kind}:{number}", nodes) for kind in ("render", "phase_iso")]
            step, image, another = self._phase(number, nodes, image, another)
            made.append(step)
        made.append(self._snapshot(nodes, image, another))
        return Images(made, image, another)

    def _snapshot(self, nodes: dict[str, Node], image: ImageRecord | None, another: Runs) -> Step:
        node = nodes["snapshot"]
        named = read_record(self.reader.clean_record, PhaseRecord)
        same = named.sha256 if named and image is None else image.sha256 if image else ""
        causes = self.reader.snapshot_causes(nodes, same)
        if another == "yes" and named is not None:
            causes = [f"{node.after[0]} makes another image"]
        runs: Runs = "yes" if causes else "no"
        same_digest = named is not None and named.digest == node.digest
        if node.unknown == plan.NOT_FETCHED or (another == "unknown" and same_digest):
            runs, causes = "unknown", [node.unknown or AGAIN.format(node.after[0])]
        return Step(name="snapshot", runs=runs, causes=causes, after=list(node.after))

    def _fetch(self, node: Node) -> Step:
        causes = self.reader.causes("fetch", {"fetch": node})
        record, fault = self.reader.known_media(node.digest) if not node.unknown else (None, "")
        there = bool(causes) and record is not None and not fault
        cost = None if there or not causes else self.reader.store.history.expected_s(node.cost)
        return Step(name="fetch", runs="yes" if causes else "no", causes=causes, from_store=there, cost_s=cost)

    def _file_step(self, name: str, nodes: dict[str, Node]) -> Step:
        node, causes = nodes[name], self.reader.causes(name, nodes)
        runs: Runs = "yes" if causes else "no"
        runs = "unknown" if node.unknown == plan.NOT_FETCHED else runs
        return Step(name=name, runs=runs, causes=causes, after=list(node.after), diffs=self._diffs(name, causes))

    def _phase(
        self, number: int, nodes: dict[str, Node], below: ImageRecord | None, another: Runs
    ) -> tuple[Step, ImageRecord | None, Runs]:
        """The step; its image, if it exists; and whether a run would make another one.

        `below` and `another` are these two values of the previous phase.
        """
        name, before = f"phase:{number}", f"phase:{number - 1}"
        node, causes = nodes[name], self.reader.phase_causes(number, nodes, below)
        if node.unknown == plan.NOT_FETCHED:
            return Step(name=name, runs="unknown", causes=[node.unknown], after=list(node.after)), None, "unknown"
        if another != "no":
            causes = [cause for cause in causes if cause != REBUILT and not cause.startswith(before)]
        if another == "yes":
            causes.append(f"{before} makes another image")
        record = read_record(self.reader.record(number), PhaseRecord)
        found = self._there(number, node, record if not causes else None, below) if another == "no" else None
        there = bool(causes) and found is not None
        runs: Runs = "yes" if causes else "no"
        if another == "unknown" and not causes:
            runs, causes = "unknown", [AGAIN.format(before)]
        step = Step(
            name=name,
            runs=runs,
            causes=causes,
            from_store=there,
            cost_s=self.reader.store.history.expected_s(node.cost) if runs != "no" and not there else None,
            after=list(node.after),
            diffs=self._diffs(name, causes),
        )
        if found is not None:
            return step, found, "no"
        return step, None, "yes" if record is not None and record.digest != node.digest else "unknown"

    def _there(
        self, number: int, node: Node, named: PhaseRecord | None, below: ImageRecord | None
    ) -> ImageRecord | None:
        """The image of this phase in the store: the one that `named` names, or the one that a run would take."""
        found = self.reader.store.record(named.digest, named.sha256) if named else None
        if found or not node.digest:
            return found
        return self.reader.find_image(number, node.digest, chain=below.chain if below else "")[0]

    def _suite_steps(self, asked: list[str], wanted: set[str], images: Images, nodes: dict[str, Node]) -> list[Step]:
        another: Runs = images.another if self.results.state.on_clean(self.config.name) else "no"
        system = self.results.system(images.last.sha256 if images.last is not None else None)
        suites = [self._suite(name, system, another, nodes) for name in self.config.suites]
        running = [step.name for step in suites if step.runs == "yes" and step.name in wanted]
        causes = [f"{name} will run" for name in running]
        before = [
            Step(
                name=name,
                runs="yes" if causes or name in asked else "no",
                causes=causes or (["it is always carried out"] if name in asked else []),
                after=list(nodes[name].after),
            )
            for name in ("sync", "build")
        ]
        return [*before, *suites]

    def _suite(self, name: str, system: str, another: Runs, nodes: dict[str, Node]) -> Step:
        cause, last = self.results.cause(name, system if another == "no" else None), self.results.last(name)
        if not cause and another != "no":
            cause = "snapshot is another image" if another == "yes" else "snapshot may be another image"
        else:
            another = "yes" if cause else "no"
        causes = [cause] if cause else []
        cost = last.duration_s if last and causes else None
        node = nodes[f"test:{name}"]
        return Step(name=node.name, runs=another, causes=causes, cost_s=cost, after=list(node.after))

    def _diffs(self, name: str, causes: list[str]) -> dict[str, str]:
        """The diffs of the texts that the causes name."""
        if not causes:
            return {}
        number = int(name.partition(":")[2])
        edited = {part: pair for part, pair in self.reader.edited(number).items() if _names(causes, part)}
        return {part: _diff(part, *pair) for part, pair in edited.items()}


def _names(causes: list[str], part: str) -> bool:
    return any(cause.startswith(f"{part} changed") for cause in causes)


def _diff(part: str, old: str, new: str) -> str:
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), f"{part} (as built)", part, lineterm="")
    return "\n".join(lines)
