"""Trains what a config file names: `python train.py configs/tiny.toml --help`.

Owns the order of things from the command line to the exit code: 0 finished, 2 bad
input, 3 a failed certificate or a loss that is not finite, 75 preempted and to be
resumed. Errors that a user can mend end in one message, without a traceback.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import shardkit as sk
from shardkit import build, cli, report


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit code."""
    try:
        return train(cli.parse_arguments(argv))
    except sk.ShardkitError as error:
        say_last(f"{type(error).__name__}: {error}", error)
        return cli.exit_code(error)
    except KeyboardInterrupt as error:
        say_last("interrupted", error)
        return 130


def say_last(message: str, error: BaseException) -> None:
    """Says why it ends, and then what the error was given on its way here."""
    print(message, *getattr(error, "__notes__", []), sep="\n", file=sys.stderr)


def train(arguments: cli.Arguments) -> int:
    """Runs one config, and its uninterrupted twin if asked to."""
    terminal = report.Terminal()
    if arguments.inspect:
        return inspect(arguments)
    with contextlib.ExitStack() as stack:
        # From here to the end, also where no run listens, a signal kills nothing.
        listening = sk.signals()
        stack.callback(listening.start())
        directory = stack.enter_context(
            report.RunDirectory.open(
                arguments.out,
                arguments.config,
                stem=arguments.path.stem,
                resume=arguments.resume,
            )
        )
        if arguments.resume and not directory.resumes:
            terminal.line(f"--resume: there is no run in {directory.path}; one begins")
        try:
            return run_and_compare(directory, terminal, listening, arguments.twin)
        except (sk.Preempted, KeyboardInterrupt) as error:
            if directory.config_file.exists():
                command = cli.resume_command(
                    directory.config_file, directory.path, twin=arguments.twin
                )
                if not directory.has_checkpoint:
                    error.add_note("no step is saved: going on begins anew")
                error.add_note(f"go on with: {command}")
            raise


def inspect(arguments: cli.Arguments) -> int:
    """Prints what the programs of a config cost, on the whole pool; runs nothing."""
    with tempfile.TemporaryDirectory() as directory:
        cli.prepare_environment(arguments.config.devices, Path(directory) / "cache")
        trainer, _ = build.build_trainer(
            arguments.config,
            devices=build.device_pool(arguments.config.devices),
            checkpoints=Path(directory) / "checkpoints",
            events=sk.EventLog(),
        )
        with trainer:
            print(*trainer.inspect().values(), sep="\n\n")
    return 0


def run_and_compare(
    directory: report.RunDirectory,
    terminal: report.Terminal,
    listening: Any,
    twin: bool,
) -> int:
    """Runs a config, and its twin if asked to, and compares the two if there are two.

    Args:
        directory: Where the run is kept.
        terminal: Where it speaks.
        listening: The signals of this process.
        twin: Whether to run the twin.
    """
    config = directory.config
    cli.prepare_environment(config.devices, directory.path / "cache")
    devices = build.device_pool(config.devices)
    schedule, late = cli.plan_resizes(config, len(devices))
    if late and not directory.is_finished:
        entries = ",".join(f"{step}:{count}" for step, count in late.items())
        end = config.train.steps
        terminal.line(f"resize: {entries} is ignored, the run ends at step {end}")
    run(directory, terminal, devices, sk.combine(sk.scripted(schedule), listening))
    # What was found of an earlier twin is gone from the summary of a prolonged run.
    is_stale = directory.has_twin and "twin" not in directory.summary()
    if not (twin or is_stale):
        return 0
    other = directory.open_twin()
    if twin:
        run(other, terminal, devices, listening, is_twin=True)
    return compare(directory, other, terminal)


def run(
    directory: report.RunDirectory,
    terminal: report.Terminal,
    devices: list[Any],
    membership: Any,
    *,
    is_twin: bool = False,
) -> None:
    """Trains to the end of the config, from the newest checkpoint if there is one.

    Args:
        directory: Where the run is kept.
        terminal: Where it speaks.
        devices: The pool.
        membership: Who asks for other devices, or to leave.
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
        try:
            for metrics in trainer.run(steps=config.train.steps, membership=membership):
                watch.step(metrics)
                if membership.leaving():
                    terminal.busy("leaving: saving")
        except sk.Preempted:
            # What is left after the last step is less work than to come back for it.
            if trainer.step < config.train.steps:
                raise
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


def compare(
    directory: report.RunDirectory,
    twin: report.RunDirectory,
    terminal: report.Terminal,
) -> int:
    """Says, draws and keeps what differs, as far as both have got."""
    found = report.compare_runs(directory, twin)
    directory.write_summary(directory.summary() | {"twin": found.to_dict()})
    watch = report.Report(directory, terminal)
    watch.draw(twin=twin.metrics)
    rows = found.rows() | watch.picture_row()
    terminal.table("beside the uninterrupted twin", rows)
    if found.identical or directory.config.train.consistency == "fast":
        return 0
    print("the run and its uninterrupted twin differ", file=sys.stderr)
    return 3


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code == cli.EXIT_CODES["Preempted"]:
        # All is saved. A compile that was given up would hold the process until it
        # is done, and whoever asked it to leave may not wait for that.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
