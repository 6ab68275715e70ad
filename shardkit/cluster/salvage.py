"""From what is left of a generation to the snapshot that the next one goes on from.

Owns the questions between two generations: what every host has, and the rebuilds that
make a step whole. Invariants: only hosts that are still there are counted on; whatever
is lost or found damaged on the way, it is chosen anew, a bounded number of times; every
wait has a deadline. Pure: times come in, orders go out.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from shardkit.cluster.choosing import Choice, spell_words
from shardkit.cluster.hosts import Host
from shardkit.cluster.orders import Order, Save, Send
from shardkit.cluster.records import ImageRef, Resume
from shardkit.cluster.roster import Roster
from shardkit.cluster.settings import Settings
from shardkit.snapshot.recovery import Plan, Report, choose
from shardkit.snapshot.repairs import Rebuild

__all__ = ["Answer", "Salvage"]

_MOST_FAILURES = 2
"""So many rebuilds of one step may fail; then the step before is next."""


class Answer(NamedTuple):
    """What a host says when it is asked what it has.

    Attributes:
        number: Which question that answers.
        reports: Its segments.
        damaged: What it has found damaged, in words.
    """

    number: int
    reports: Sequence[Report]
    damaged: Sequence[str]


class Salvage:
    """Finds a snapshot to go on from.

    Args:
        settings: What the cluster was started with.
        roster: Its hosts.
        orders: Where orders are put.

    Attributes:
        choice: What was found last.
        number: How often hosts were asked, which marks questions and answers.
    """

    def __init__(self, settings: Settings, roster: Roster, orders: list[Order]) -> None:
        self._run, self._deadlines = settings.run, settings.deadlines
        self._roster, self._orders = roster, orders
        self.choice = Choice(resume=None)
        self.number = 0
        self._plan: Plan | None = None
        self._asked: dict[str, str] = {}
        self._found: dict[str, Sequence[Report]] = {}
        self._words: list[str] = []
        self._until_s = 0.0
        self._verify = False
        self._max_step: int | None = None
        self._num_failures = self._whole_step = 0

    def begin(self, now_s: float, whole_step: int, *, verify: bool = False) -> None:
        """Begins to ask; no process of a generation may be left.

        Args:
            now_s: The time.
            whole_step: The newest step that was known to be whole.
            verify: Whether something was found damaged, so that all is to be read.
        """
        self._whole_step, self._words = whole_step, []
        self._max_step, self._num_failures = None, 0
        self._ask(now_s, verify=verify)

    def _ask(self, now_s: float, *, verify: bool = False) -> None:
        self.number += 1
        # The next supervisor must not use the number again.
        self._orders.append(Save())
        self._plan, self._found, self._verify = None, {}, verify
        self._asked = {
            host.name: host.report["incarnation"]
            for host in self._roster
            if host.is_alive
        }
        deadlines = self._deadlines
        self._until_s = now_s + (deadlines.restore_s if verify else deadlines.request_s)
        for name in self._asked:
            self._send_survey(self._roster[name])

    def deadline_s(self) -> float:
        """When to check again at the latest."""
        return self._until_s

    def surveyed(self, host: str, answer: Answer) -> None:
        """Learns what a host has."""
        if answer.number == self.number and host not in self._found:
            self._found[host] = answer.reports
            self._words += answer.damaged

    def check(self, now_s: float) -> bool:
        """Goes on; whether `choice` is what there is to go on from."""
        if self._plan is None:
            waits = [name for name in self._asked if name not in self._found]
            if any(map(self._is_there, waits)) and now_s < self._until_s:
                return False
            return self._choose(now_s)
        if not all(map(self._is_there, self._asked)):
            self._ask(now_s)
            return False
        done = [self._outcome(job) for job in self._plan.rebuilds]
        failed = [x for x in done if x["state"] == "failed"]
        if failed or now_s >= self._until_s:
            self._has_failed(failed, now_s)
            return False
        if all(x["state"] == "done" for x in done):
            self._finish(self._plan, done)
            return True
        return False

    def is_stale(self) -> bool:
        """Whether a host with an image that was chosen is gone."""
        resume = self.choice.resume
        hosts = {image.host for image in resume.images} if resume else set()
        return not all(map(self._is_there, hosts))

    def spell(self) -> str:
        """Says what is waited for; empty if nothing is."""
        if self._plan is None or not self._plan.rebuilds:
            return ""
        jobs = self._plan.rebuilds
        return f"for {len(jobs)} images of step {self._plan.step} to be rebuilt"

    def repeat(self, host: Host) -> None:
        """Says again what the report of a host shows that it has not heard."""
        if host.name not in self._asked or not self._is_there(host.name):
            return
        if self._plan is None:
            if host.name not in self._found:
                self._send_survey(host)
            return
        for job in self._plan.rebuilds:
            if job.host == host.name and self._outcome(job)["state"] == "unknown":
                self._send_rebuild(job)

    def _is_there(self, name: str) -> bool:
        host = self._roster[name]
        return host.is_alive and host.report["incarnation"] == self._asked.get(name)

    def _send_survey(self, host: Host) -> None:
        header = {"type": "survey", "number": self.number, "verify": self._verify}
        self._orders.append(Send(host.name, header))

    def _send_rebuild(self, job: Rebuild) -> None:
        header = {
            "type": "rebuild",
            "number": self.number,
            "rebuild": job.to_fields(),
            "addresses": {
                name: self._roster[name].report["address"] for name in self._asked
            },
        }
        self._orders.append(Send(job.host, header, job.head))

    def _choose(self, now_s: float) -> bool:
        # Who was lost before it could answer is not waited for, nor read from.
        self._asked = {x: y for x, y in self._asked.items() if self._is_there(x)}
        reports = [
            report
            for host, found in self._found.items()
            if self._is_there(host)
            for report in found
        ]
        plan = choose(reports, run=self._run, max_step=self._max_step)
        if not plan.rebuilds:
            self._finish(plan, [])
            return True
        self._plan = plan
        self._until_s = now_s + self._deadlines.restore_s
        for job in plan.rebuilds:
            self._send_rebuild(job)
        return False

    def _outcome(self, job: Rebuild) -> dict[str, Any]:
        for found in self._roster[job.host].report["rebuilds"]:
            if (found["number"], found["process"]) == (self.number, job.process):
                return found
        return {"state": "unknown"}

    def _has_failed(self, failed: Sequence[dict[str, Any]], now_s: float) -> None:
        assert self._plan is not None
        limit_s = self._deadlines.restore_s
        why = failed[0]["why"] if failed else f"it took more than {limit_s:g} s"
        self._words.append(f"a rebuild of step {self._plan.step} failed: {why}")
        self._num_failures += 1
        if self._num_failures >= _MOST_FAILURES:
            assert self._plan.step is not None
            self._max_step, self._num_failures = self._plan.step - 1, 0
        # What is damaged is found by reading all of it, and is not counted on then.
        self._ask(now_s, verify=any(found["is_torn"] for found in failed))

    def _say_protected(self, plan: Plan) -> None:
        """Has what protects the step kept until the next generation has its own."""
        found = [self._roster[name] for name in {image.host for image in plan.images}]
        key = [plan.generation, plan.step]
        if all(key in host.report["guards"] for host in found):
            header = {"type": "protected", "of": plan.generation, "step": plan.step}
            self._orders += [Send(host.name, header) for host in found]

    def _finish(self, plan: Plan, rebuilt: Sequence[dict[str, Any]]) -> None:
        words = [*self._words, *plan.words]
        said = spell_words(words, plan.step, self._whole_step) if words else ""
        resume = None
        if plan.step is not None:
            places = [(x.host, x.name, x.process, x.num_bytes) for x in plan.images]
            places += [
                (job.host, found["name"], job.process, found["num_bytes"])
                for job, found in zip(plan.rebuilds, rebuilt, strict=True)
            ]
            images = tuple(
                ImageRef(
                    host=host,
                    address=self._roster[host].report["address"],
                    name=name,
                    process=process,
                    num_bytes=num_bytes,
                )
                for host, name, process, num_bytes in places
            )
            resume = Resume(step=plan.step, images=images)
            self._say_protected(plan)
        self.choice = Choice(resume=resume, said=said, rebuilt_bytes=plan.rebuilt_bytes)
        self._plan = None
