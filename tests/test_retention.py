"""Which checkpoints stay, when a run has gone back or was resumed too."""

import pytest
from problems import consume, linear_data

import shardkit as sk


def checkpoints(directory, **options):
    return sk.CheckpointConfig(directory=directory, every=1, **options)


@pytest.fixture
def evaluated(make, tmp_path):
    """Makes trainers that evaluate after every step to what a script says."""

    def evaluated(losses, **options):
        config = checkpoints(tmp_path, **{"keep": 1, "keep_best": 1, **options})
        evaluation = sk.EvalConfig(data=linear_data, every=1)
        trainer, _ = make(checkpoint=config, eval=evaluation)

        def evaluate():
            trainer._controller.metrics = {"loss": losses[trainer.step]}
            return trainer._controller.metrics

        trainer.evaluate = evaluate
        return trainer

    return evaluated


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_stays_when_the_run_is_resumed(evaluated, mode):
    sign = 1 if mode == "min" else -1
    losses = {step: sign * abs(step - 2) for step in range(9)}
    first = evaluated(losses, best_mode=mode)
    consume(first, 3)
    assert first.saved_steps == [2, 3]
    first.close()
    second = evaluated(losses, best_mode=mode)
    assert second.restore() == 3
    consume(second, 5)
    assert second.saved_steps == [2, 5]


def test_what_is_not_a_number_is_never_the_best(evaluated):
    losses = {1: float("nan"), 2: 3.0, 3: float("nan"), 4: float("-inf"), 5: 4.0}
    trainer = evaluated(losses)
    consume(trainer, 5)
    assert trainer.saved_steps == [2, 5]


def test_going_back_costs_none_of_those_that_are_kept(make, tmp_path):
    first, _ = make(checkpoint=checkpoints(tmp_path, keep=None))
    consume(first, 4)
    first.close()
    again, _ = make(checkpoint=checkpoints(tmp_path, keep=2))
    assert again.restore(2) == 2
    consume(again, 3)
    again.save()
    assert again.saved_steps == [2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3"}
