"""What is told of a compiled program."""

import math

import jax
import jax.numpy as jnp
import pytest
from problems import language, linear, linear_data

import shardkit as sk
from shardkit.program_report import report_program


def test_work_and_memory_are_those_of_the_program():
    x = jnp.ones((64, 32))
    compiled = jax.jit(lambda x: x.T @ x).lower(x).compile()
    report = report_program("gram", 1, compiled)
    assert report.flops == 2 * 32 * 64 * 32
    assert report.argument_bytes == 4 * 64 * 32
    assert report.output_bytes == 4 * 32 * 32
    assert report.reused_bytes == 0
    text = str(report)
    assert text.startswith("gram on 1 devices, per device and execution\n")
    assert "131.1 kFLOP" in text
    assert "8.0 KiB" in text


def test_a_trainer_tells_what_its_programs_cost(make):
    trainer, _ = make(eval=sk.EvalConfig(data=linear_data, every=0), ema=0.9)
    before = trainer.inspect(5)
    assert list(before) == ["step", "evaluate"]
    assert trainer.compiles == {"init": 0, "step": 1, "evaluate": 1}
    step = before["step"]
    assert step.num_devices == 5
    kinds = {c.kind for c in step.collectives}
    # The parameters are gathered whole; sums go to whoever has the shard.
    assert "all-gather" in kinds
    assert all(c.num_bytes > 0 for c in step.collectives)
    assert step.argument_bytes > before["evaluate"].argument_bytes
    # The state is donated, so that nearly all of it is returned in place.
    assert 0 < step.reused_bytes <= step.output_bytes
    list(trainer.run(2, sk.scripted({0: 5})))
    trainer.inspect()
    assert trainer.compiles["step"] == 1


@pytest.mark.parametrize("problem", [linear, language])
def test_a_step_gathers_the_parameters_once(make, problem):
    trainer, _ = make(**problem())
    [gathered] = [
        c for c in trainer.inspect()["step"].collectives if c.kind == "all-gather"
    ]
    placement = trainer._controller.placements.on(8)
    sizes = [
        leaf.abstract.dtype.itemsize * math.prod(leaf.physical(placement.mesh).shape)
        for leaf in jax.tree.leaves(placement.layout.params)
        if leaf.dim >= 0
    ]
    assert sizes
    assert (gathered.count, gathered.num_bytes) == (1, sum(sizes))


def test_without_evaluation_there_is_the_step_alone(make):
    trainer, _ = make()
    assert list(trainer.inspect(2)) == ["step"]


def test_devices_that_are_not_there_are_refused(make):
    trainer, _ = make()
    with pytest.raises(sk.MembershipError, match="found 9"):
        trainer.inspect(9)
