"""Whatever happens to a cluster, in any order, with any message lost."""

import dataclasses

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from worlds import World, crash, make_settings


class Trouble(RuleBasedStateMachine):
    """Anything goes wrong, in any order; then nothing any more."""

    redundancy = "none"

    @initialize(devices=st.integers(1, 6), last=st.integers(20, 60))
    def begin(self, devices, last):
        settings = make_settings(min_devices=devices, redundancy=self.redundancy)
        settings = dataclasses.replace(
            settings, limits=dataclasses.replace(settings.limits, flaps=1)
        )
        self.world = World(settings, last_step=last)

    @rule(seconds=st.integers(1, 15), steps=st.booleans())
    def wait(self, seconds, steps):
        self.world.wait(seconds, steps=steps)

    @precondition(lambda self: self.world.running())
    @rule(data=st.data(), code=st.sampled_from([-9, -11, 1, 0]))
    def end_worker(self, data, code):
        worker = data.draw(st.sampled_from(self.world.running()))
        worker.state, worker.code = "exited", code

    @precondition(lambda self: self.world.running())
    @rule(data=st.data())
    def fail(self, data):
        hosts = [h for h, a in self.world.agents.items() if a.running()]
        crash(self.world, data.draw(st.sampled_from(hosts)))

    @precondition(lambda self: self.world.agents)
    @rule(data=st.data())
    def lose(self, data):
        self.world.lose(data.draw(st.sampled_from(sorted(self.world.agents))))

    @precondition(lambda self: self.world.agents)
    @rule(data=st.data())
    def cut(self, data):
        self.world.is_cut.add(data.draw(st.sampled_from(sorted(self.world.agents))))

    @precondition(lambda self: self.world.agents)
    @rule(data=st.data())
    def damage(self, data):
        host = data.draw(st.sampled_from(sorted(self.world.agents)))
        if images := self.world.agents[host].images:
            self.world.damage(host, data.draw(st.sampled_from(images))["step"])

    @rule()
    def mend(self):
        self.world.is_cut.clear()

    @rule(count=st.integers(1, 20))
    def drop(self, count):
        self.world.drops = count

    @precondition(lambda self: not self.world.ended)
    @rule()
    def restart(self):
        self.world.restart_supervisor()

    @rule()
    def leave(self):
        world = self.world
        world.carry_out(world.machine.leave("asked", world.now_s))

    @invariant()
    def every_wait_has_a_deadline(self):
        world = self.world
        assert (world.machine.next_s() is None) == (world.ended is not None)

    def teardown(self):
        """Without more trouble the run ends, in bounded time."""
        if hasattr(self, "world"):
            world = self.world
            world.is_cut.clear()
            for _ in range(3000):
                world.wait()
                if world.ended:
                    break
            assert world.ended is not None, (world.machine.state, world.told[-5:])


Trouble.TestCase.settings = hypothesis_settings(
    max_examples=100, stateful_step_count=30, deadline=None
)
test_trouble = Trouble.TestCase


class ProtectedTrouble(Trouble):
    """The same where hosts protect one another."""

    redundancy = "parity"


ProtectedTrouble.TestCase.settings = hypothesis_settings(
    max_examples=25, stateful_step_count=30, deadline=None
)
test_protected_trouble = ProtectedTrouble.TestCase
