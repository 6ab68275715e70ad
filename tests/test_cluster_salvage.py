"""What a cluster makes of what is left, without any process: hosts, images, guards."""


import pytest
from worlds import World, begin, kill, make_settings

from shardkit.cluster.orders import Send
from shardkit.cluster.split import plan_hosts


def protected(redundancy, num_hosts=4, **options):
    """A world whose steps are protected."""
    hosts = plan_hosts(num_hosts, num_hosts, 2 * num_hosts)
    world = begin(redundancy=redundancy, hosts=hosts, **options)
    assert all(agent.guards for agent in world.agents.values())
    return world


def wait_next(world):
    generation = world.machine.generation
    world.until(lambda: world.machine.generation > generation and world.machine.live)
    return world.machine.recoveries[-1]


@pytest.mark.parametrize("redundancy", ["mirror", "parity", "parity:2", "parity:3"])
def test_a_lost_host_loses_no_protected_step(redundancy):
    world = protected(redundancy)
    step = world.machine.live.protected
    world.lose("host-1")
    recovery = wait_next(world)
    assert recovery.step >= step
    assert recovery.rebuilt_bytes > 0
    assert "of process 1, lost with host-1, are rebuilt on host-" in recovery.said
    assert recovery.said in world.told[-2] + world.told[-1]
    # The one that was rebuilt is among those that are gone on from.
    resume = world.machine.live.seats[0].assignment.resume
    assert sorted(image.process for image in resume.images) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("redundancy", "survives"), [("parity:2", True), ("parity", False), ("none", False)]
)
def test_two_hosts_at_once(redundancy, survives):
    if redundancy == "none":
        world = begin(hosts=plan_hosts(4, 4, 8))
    else:
        world = protected(redundancy)
    step = world.machine.live.protected
    world.lose("host-1")
    world.lose("host-3")
    recovery = wait_next(world)
    assert (recovery.step >= step) == survives
    if not survives:
        assert recovery.step == 0
        assert "the newest checkpoint on disk is next" in recovery.said


def test_every_host_keeps_two_protections_at_most():
    world = protected("parity")
    world.wait(20)
    assert {len(agent.guards) for agent in world.agents.values()} <= {1, 2}


def test_a_host_that_is_lost_before_it_has_said_what_it_has():
    world = protected("parity:2")
    step = world.machine.live.protected
    good = world.answer

    def answer(host, number, *, verify):
        if host != "host-3":
            good(host, number, verify=verify)

    world.answer = answer
    world.lose("host-1")
    world.until(lambda: world.machine.state == "choosing")
    world.answer = good
    world.lose("host-3")
    assert wait_next(world).step >= step


def test_a_step_is_told_to_be_protected_before_the_next_is_ordered():
    hosts = plan_hosts(4, 4, 8)
    world = World(make_settings(redundancy="parity", hosts=hosts))
    good, world.protect = world.protect, lambda *_: None
    world.until(
        lambda: (
            world.agents
            and all(len(agent.images) == 2 for agent in world.agents.values())
        )
    )
    # Two steps are there, and neither is protected; now they will be.
    said, carry_out = [], world.carry_out

    def note(orders):
        sent = [x for x in orders if isinstance(x, Send) and x.host == "host-0"]
        said.extend((x.header["type"], x.header.get("step")) for x in sent)
        carry_out(orders)

    world.protect, world.carry_out = good, note
    world.wait(3)
    assert said.index(("protected", 1)) < said.index(("protect", 2))


def test_a_host_that_is_lost_while_images_are_rebuilt():
    world = protected("parity:2")
    step = world.machine.live.protected
    good, world.rebuild = world.rebuild, lambda *_: None
    world.lose("host-1")
    world.until(lambda: world.machine.state == "choosing")
    assert "images of step" in world.machine.salvage.spell()
    world.rebuild = good
    world.lose("host-0")
    recovery = wait_next(world)
    assert recovery.step >= step
    assert recovery.rebuilt_bytes > 0


def test_what_was_chosen_is_lost_before_it_is_gone_on_from():
    world = protected("parity:2")
    step = world.machine.live.protected
    world.lose("host-1")
    for agent in world.agents.values():
        agent.start_standbys = lambda: None
        for worker in agent.workers.values():
            worker.state = "starting" if worker.state == "ready" else worker.state
    world.until(lambda: world.machine.state == "forming")
    assert world.machine.salvage.choice.rebuilt_bytes > 0
    first = world.machine.recoveries[-1].said
    world.lose("host-0")
    for agent in world.agents.values():
        vars(agent).pop("start_standbys", None)
    assert wait_next(world).step >= step
    assert len(world.machine.recoveries) == 1
    assert world.machine.recoveries[-1].said != first


def test_a_damaged_image_is_made_again():
    world = protected("parity")
    step = world.machine.live.protected
    world.damage("host-2", step)
    kill(world, "host-0")
    assert wait_next(world).rebuilt_bytes == 0
    # Who restores finds it damaged; then all is read, and it is rebuilt.
    recovery = wait_next(world)
    assert recovery.step >= step
    assert "is damaged" in recovery.said
    assert recovery.rebuilt_bytes > 0
    world.wait(10)
    assert world.machine.live.protected > step


def test_a_damaged_image_without_protection_costs_a_step():
    world = begin()
    step = world.machine.live.protected
    world.damage("host-2", step)
    kill(world, "host-0")
    wait_next(world)
    assert wait_next(world).step == step - 1


def test_damage_that_is_found_while_rebuilding():
    world = protected("parity")
    step = world.machine.live.protected
    world.damage("host-2", step)
    world.lose("host-1")
    recovery = wait_next(world)
    # One lost and one damaged are more than parity makes up for.
    assert recovery.step < step
    assert "a rebuild of step" in recovery.said
    world.wait(10)
    assert world.machine.live.protected > 0


@pytest.mark.parametrize("seconds", range(8))
def test_the_supervisor_is_replaced_at_any_moment(seconds):
    world = protected("parity")
    step = world.machine.live.protected
    world.lose("host-1")
    world.wait(seconds, steps=False)
    world.restart_supervisor()
    world.until(lambda: world.machine.live and world.machine.live.protected > step)
    assert all(x.step >= step for x in world.machine.recoveries)


@pytest.mark.parametrize("drops", range(1, 10))
def test_no_single_lost_message_matters(drops):
    world = protected("parity")
    step = world.machine.live.protected
    world.lose("host-1")
    world.drops = drops
    assert wait_next(world).step >= step
    world.until(lambda: world.machine.live and world.machine.live.protected > step + 5)


def test_one_host_alone_is_told_that_it_has_no_protection():
    world = World(make_settings(redundancy="parity", hosts=plan_hosts(1, 1, 1)))
    world.until(lambda: world.machine.live and world.machine.live.protected > 2)
    assert [x for x in world.told if "nothing can be protected with 1 host" in x]


def test_a_host_that_cannot_protect_holds_nothing_up_and_is_told_once():
    world = protected("parity")

    def fail(host, header):
        world.agents[host].failed = {
            "of": header["of"],
            "step": header["step"],
            "why": "no room",
            "count": 1,
            "is_final": True,
        }

    good, world.protect = (
        world.protect,
        lambda host, header: (
            fail(host, header) if host == "host-1" else good(host, header)
        ),
    )
    step = world.machine.live.protected
    world.wait(20)
    assert world.machine.live.protected >= step + 8
    assert len([x for x in world.told if "host-1 cannot protect step" in x]) == 1


def test_a_peer_that_never_gets_there_is_given_up_after_the_deadline():
    world = protected("parity")
    step, world.protect = world.machine.live.protected, lambda host, header: None
    world.until(lambda: world.machine.live.protected > step)
    assert [x for x in world.told if "host-0 cannot protect step" in x]


def test_what_it_takes_is_told_before_it_is_taken():
    world = protected("parity")
    assert [x for x in world.told if x.startswith("snapshots take up to")]
    costs = world.machine.protecting.costs
    assert costs.keys() == world.agents.keys()
    for host, agent in world.agents.items():
        held = sum(map(len, agent.guards.values()))
        assert held <= costs[host].protection_bytes
