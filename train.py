"""Trains what a config file names: `python train.py configs/tiny.toml --help`.

Owns the order of things from the command line to the exit code: 0 finished, 2 bad
input, 3 a failed certificate or a loss that is not finite, 75 preempted and to be
resumed. Errors that a user can mend end in one message, without a traceback.
"""

import contextlib
import dataclasses
import sys
from typing import Any

import shardkit as sk
from shardkit import build, cli, report


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit code."""
    try:
        return train(cli.parse_arguments(argv))
    except sk.ShardkitError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return cli.exit_code(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def train(arguments: cli.Arguments) -> int:
    """Runs one config, and its uninterrupted twin if asked to."""
    config = arguments.config
    terminal = report.Terminal()
    with report.RunDirectory.open(
        arguments.out, config, stem=arguments.path.stem, resume=arguments.resume
    ) as directory:
        cli.prepare_environment(config.devices, directory.path / "cache")
        devices = build.device_pool(config.devices)
        schedule, late = cli.plan_resizes(config, len(devices))
        if late:
            entries = ",".join(f"{step}:{count}" for step, count in late.items())
            end = config.train.steps
            terminal.line(f"resize: {entries} is ignored, the run ends at step {end}")
        try:
            run(directory, terminal, devices, schedule)
            return run_twin(directory, terminal, devices) if arguments.twin else 0
        except (sk.Preempted, KeyboardInterrupt):
            terminal.line(f"go on with --resume --out {directory.path}")
            raise


def run(
    directory: report.RunDirectory,
    terminal: report.Terminal,
    devices: list[Any],
    schedule: dict[int, int],
    *,
    is_twin: bool = False,
) -> None:
    """Trains to the end of the config, from the newest checkpoint if there is one.

    Args:
        directory: Where the run is kept.
        terminal: Where it speaks.
        devices: The pool.
        schedule: Device counts by step.
        is_twin: Whether this is only for comparison.
    """
    config = directory.config
    if directory.is_finished:
        steps = directory.summary()["steps"]
        terminal.line(f"{directory.path}: finished already, at step {steps}")
        return
    label = "uninterrupted twin" if is_twin else directory.path.name
    events = sk.EventLog()
    with contextlib.ExitStack() as stack:
        watch = report.Report(directory, terminal, label=label, extras=not is_twin)
        stack.enter_context(watch)
        events.subscribe(watch.event)
        trainer, corpus_digest = build.build_trainer(
            config, devices=devices, checkpoints=directory.checkpoints, events=events
        )
        stack.callback(trainer.close)
        watch.begin(trainer.restore() if directory.has_checkpoint else 0)
        membership = sk.combine(sk.scripted(schedule), sk.signals())
        for metrics in trainer.run(steps=config.train.steps, membership=membership):
            watch.step(metrics)
        if watch.saved_step != trainer.step:
            trainer.save()
        eval_loss = watch.evals.get(trainer.step)
        if eval_loss is None and config.train.eval_batches > 0:
            eval_loss = trainer.evaluate()["loss"]
        summary = report.summarize(
            report.read_records(directory.metrics),
            steps=trainer.step,
            eval_loss=eval_loss,
            state_digest=trainer.state_digest(),
            corpus_digest=corpus_digest,
        )
        watch.finish(summary)


def run_twin(
    directory: report.RunDirectory, terminal: report.Terminal, devices: list[Any]
) -> int:
    """Runs the same config on all devices throughout, and says what differs."""
    twin = report.RunDirectory.open(
        directory.path / "twin",
        dataclasses.replace(directory.config, resize=""),
        stem="twin",
        resume=True,
    )
    run(twin, terminal, devices, {}, is_twin=True)
    found = report.compare_runs(directory, twin)
    directory.write_summary(directory.summary() | {"twin": found.to_dict()})
    report.Report(directory, terminal).draw(twin=twin.metrics)
    terminal.table("beside the uninterrupted twin", found.rows())
    if found.identical or directory.config.train.consistency == "fast":
        return 0
    print("the run and its uninterrupted twin differ", file=sys.stderr)
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
