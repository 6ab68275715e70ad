"""Imaginary hosts around the state machine of a cluster: no processes, no sockets."""

from world_hosts import SIZES, Agent, make_image, make_settings

from shardkit.cluster.generations import Machine
from shardkit.cluster.orders import EndHost, EndRun, Save, Send, StartHost, Tell
from shardkit.cluster.salvage import Answer
from shardkit.errors import TornError
from shardkit.snapshot.groups import Group
from shardkit.snapshot.head import read_head
from shardkit.snapshot.protection import ProtectionWriter
from shardkit.snapshot.protection_plan import ProtectionPlan
from shardkit.snapshot.rebuild import rebuild
from shardkit.snapshot.recovery import report
from shardkit.snapshot.repairs import Rebuild


class World:
    """Hosts around a machine. Time passes; whatever is sent arrives, or is dropped."""

    def __init__(self, settings=None, last_step=10**9, prepares=False):
        self.settings, self.prepares = settings or make_settings(), prepares
        self.now_s, self.agents, self.count = 1000.0, {}, 0
        self.ended, self.told, self.last_step = None, [], last_step
        self.saved, self.generations, self.drops = None, [], 0
        self.is_cut, self.doomed = set(), {}
        self.delays = {}  # host → how late what it says is heard
        self.machine = Machine(self.settings, self.now_s)
        self.carry_out(self.machine.tick(self.now_s))

    def carry_out(self, orders):
        if any(isinstance(order, Save) for order in orders):
            self.saved = self.machine.to_json()
        for order in orders:
            match order:
                case StartHost(host):
                    self.count += 1
                    agent = Agent(host, self.count, self.prepares)
                    self.agents.setdefault(host, agent)
                case EndHost(host, _):
                    # It takes a moment to be gone.
                    self.doomed.setdefault(host, self.now_s + 3)
                case Send(host, header, payload):
                    if header["type"] == "assign":
                        self.note(header["assignment"]["generation"])
                    if self.drops:
                        self.drops -= 1
                    elif host in self.agents and host not in self.is_cut:
                        self.agents[host].obey(header)
                        self.serve(host, header, payload)
                case Tell(text):
                    self.told.append(text)
                case EndRun():
                    self.ended = order

    def serve(self, host, header, payload):
        """Does what the memory of a host is asked for."""
        kind = header["type"]
        if kind == "survey":
            self.answer(host, header["number"], verify=header["verify"])
        elif kind == "protect":
            self.protect(host, header)
        elif kind == "rebuild":
            self.rebuild(host, header, payload)

    def memory(self, host, name):
        """What others read of a segment; None if it is not there, or nobody answers."""
        is_there = host in self.agents and host not in self.is_cut
        return self.segment(host, name) if is_there else None

    def segment(self, host, name):
        """The bytes of a segment; None if it is not there."""
        agent = self.agents[host]
        if name in agent.made:
            return agent.made[name]
        for key, data in agent.guards.items():
            if name == f"guard-{key}":
                return data
        found = [image for image in agent.images if image["name"] == name]
        return make_image(self.settings.run, host, found[0]) if found else None

    def answer(self, host, number, *, verify):
        if self.drops:
            self.drops -= 1
            return
        agent = self.agents[host]
        damaged = sorted(agent.damaged)
        if verify:
            agent.images = [x for x in agent.images if x["name"] not in damaged]
            agent.damaged.clear()
        names = [image["name"] for image in agent.images]
        names += [f"guard-{key}" for key in agent.guards]
        found = [report(host, x, self.memory(host, x)) for x in names]
        answer = Answer(number, found, [f"{x} is damaged" for x in damaged if verify])
        self.carry_out(self.machine.surveyed(host, answer, self.now_s))

    def protect(self, host, header):
        key, heads, found = (header["of"], header["step"]), {}, {}
        for image in header["images"]:
            memory = self.memory(image["host"], image["name"])
            if memory is None:
                return
            found[image["host"], image["process"]] = memory
            head = memory[: read_head(memory).body_start]
            heads.setdefault(image["host"], []).append(head)
        group = Group(**{**header["group"], "hosts": (*header["group"]["hosts"],)})
        plan = ProtectionPlan.of(self.settings.run, group, host, heads)
        memory = bytearray(plan.num_bytes)
        writer = ProtectionWriter(memoryview(memory), plan)
        for want in plan.wants:
            data = found[want.host, want.process]
            writer.add(want, 0, data[want.offset : want.offset + want.num_bytes])
        writer.commit()
        guards = self.agents[host].guards
        self.agents[host].guards = {
            k: v for k, v in guards.items() if list(k) == self.agents[host].protected
        } | {key: memory}
        assert len(self.agents[host].guards) <= 2

    def rebuild(self, host, header, head):
        agent, plan = self.agents[host], Rebuild.of_fields(header["rebuild"], head)
        outcome = {"number": header["number"], "process": plan.process}
        if any(outcome.items() <= known.items() for known in agent.rebuilds):
            return

        def read(host, name, offset, num_bytes):
            memory = self.memory(host, name)
            if memory is None:
                raise TornError("it is gone")
            return memoryview(memory)[offset : offset + num_bytes]

        memory, old = memoryview(bytearray(plan.num_bytes)), read_head(head)
        try:
            rebuild(plan, read, memory)
        except TornError as error:
            outcome |= {"state": "failed", "why": str(error), "is_torn": True}
        else:
            name = f"rebuilt-{header['number']}-{plan.process}"
            agent.made[name] = memory
            values = {"name": name, "num_bytes": plan.num_bytes}
            outcome |= {"state": "done", **values}
            values |= {"process": plan.process, "num_processes": old.num_processes}
            values |= {"step": old.step, "generation": old.generation}
            agent.images.append(SIZES | values)
        agent.rebuilds = [
            x for x in agent.rebuilds if x["number"] == header["number"]
        ] + [outcome]

    def damage(self, host, step):
        """Breaks the images of a step on a host, so that who reads them finds out."""
        agent = self.agents[host]
        for name in [x["name"] for x in agent.images if x["step"] == step]:
            memory = bytearray(self.segment(host, name))
            memory[read_head(memory).body_start] ^= 1
            agent.made[name] = memory
            agent.damaged.add(name)

    def is_damaged(self, resume):
        images = [] if resume is None else resume["images"]
        found = [(self.agents.get(x["host"]), x["name"]) for x in images]
        return any(agent and name in agent.damaged for agent, name in found)

    def note(self, generation):
        # Else the next supervisor might use the number again.
        assert self.saved["generation"] >= generation
        if generation not in self.generations:
            assert generation > max(self.generations, default=0)
            self.generations.append(generation)

    def lose(self, host):
        self.is_cut.discard(host)
        self.doomed.pop(host, None)
        self.agents.pop(host, None)
        self.carry_out(self.machine.gone(host, "was lost", self.now_s))

    def restart_supervisor(self):
        there = sorted(self.agents)
        self.machine = Machine(
            self.settings, self.now_s, memory=self.saved, there=there
        )
        self.carry_out(self.machine.tick(self.now_s))

    def tell(self, beat=True):
        alive = {worker.assignment["generation"] for worker in self.running()}
        assert len(alive) <= 1, alive
        said_s, agents = self.now_s, list(self.agents.items())
        for host, agent in sorted(agents, key=lambda x: self.delays.get(x[0], 0)):
            agent.start_standbys()
            if host not in self.is_cut and self.agents.get(host) is agent:
                if self.drops:
                    self.drops -= 1
                else:
                    report = agent.report(said_s, beat)
                    self.now_s = max(self.now_s, said_s + self.delays.get(host, 0))
                    self.carry_out(self.machine.heard(report, self.now_s))

    def running(self):
        return [w for agent in self.agents.values() for w in agent.running()]

    def step(self):
        """All processes of the newest generation do a step, if they can."""
        newest = max((w.assignment["generation"] for w in self.running()), default=0)
        found = [
            (agent, worker)
            for agent in self.agents.values()
            for worker in agent.running()
            if worker.assignment["generation"] == newest
        ]
        if not found or len(found) < found[0][1].assignment["num_processes"]:
            return
        for _, worker in found:
            given = worker.assignment
            if worker.step < 0:
                resume = given["resume"]
                if self.is_damaged(resume):
                    crash_worker(worker, 1, "it is damaged", "DamagedError")
                    continue
                worker.step = 0 if resume is None else resume["step"]
                worker.phase = "step"
        if any(w.code is not None for _, w in found):
            return
        begun = {worker.step for _, worker in found}
        if given["leave"] or any(w.halt and w.halt[0] <= w.step for _, w in found):
            self.halt(found)
            return
        if len(begun) > 1 or not all(self.slot(*pair) for pair in found):
            return
        for agent, worker in found:
            worker.step += 1
            self.keep_image(agent, worker)
            if worker.step >= self.last_step:
                worker.state, worker.code = "exited", 0
                worker.told["finished"] = {}

    def halt(self, found):
        for _, worker in found:
            if worker.assignment["leave"] or (worker.halt and worker.halt[1]):
                worker.told["halted"] = {"step": worker.step}
                worker.state, worker.code = "exited", 75

    def slot(self, agent, worker):
        """Where the next image can be written: images that it takes the place of."""
        given = worker.assignment
        mine = [
            x
            for x in agent.images
            if (x["generation"], x["process"])
            == (given["generation"], given["process_index"])
        ]
        free = [x for x in mine if [x["generation"], x["step"]] < agent.protected]
        return free[:1] if len(mine) == 2 else [None]

    def keep_image(self, agent, worker):
        given = worker.assignment
        for image in self.slot(agent, worker):
            if image is not None:
                agent.images.remove(image)
        agent.images.append(
            {
                "name": f"{given['generation']}-{worker.step}",
                "step": worker.step,
                "generation": given["generation"],
                "process": given["process_index"],
                "num_processes": given["num_processes"],
                **SIZES,
            }
        )

    def wait(self, seconds=1.0, *, steps=True):
        """Time passes, with heartbeats and a step a second."""
        for _ in range(int(seconds)):
            self.now_s += 1.0
            for host in [h for h, at_s in self.doomed.items() if at_s <= self.now_s]:
                self.lose(host)
            if steps:
                self.step()
            self.tell()
            self.carry_out(self.machine.tick(self.now_s))
            if self.ended:
                return

    def until(self, look, limit_s=400):
        for _ in range(limit_s):
            if look():
                return
            self.wait()
        raise AssertionError(f"not within {limit_s} s; told {self.told}")


def begin(*, prepares=False, **options):
    world = World(make_settings(**options), prepares=prepares)
    world.until(lambda: world.machine.live and world.machine.live.protected >= 3)
    return world


def crash(world, host, code=1, message="no", kind="ValueError", age_s=0.0):
    worker = world.agents[host].running()[0]
    worker.ended_s = world.now_s - age_s
    crash_worker(worker, code, message, kind)


def crash_worker(worker, code, message, kind):
    worker.state, worker.code = "exited", code
    worker.told["failed"] = {
        "kind": kind,
        "message": message,
        "traceback": "where",
        "step": worker.step,
    }


def kill(world, host):
    worker = world.agents[host].running()[0]
    worker.state, worker.code = "exited", -9
