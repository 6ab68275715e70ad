"""Trains what a config file names: `python train.py configs/tiny.toml --help`.

Owns the order of things from the command line to the exit code: 0 finished, 2 bad
input, 3 a failed certificate or a loss that is not finite, 75 preempted and to be
resumed. Errors that a user can mend end in one message, without a traceback.
"""

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shardkit as sk
from shardkit import build, cli, report, sampling, supervised


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit code."""
    supervision = None
    try:
        arguments = cli.parse_arguments(argv)
        prepared: list[Built] = []
        supervision = supervised.join_supervisor(
            lambda: build.import_all(arguments.config),
            lambda assignment: prepared.append(prepare(arguments, assignment)),
        )
        if supervision is not None:
            return train_supervised(arguments, supervision, *prepared[:1] or [None])
        return train(arguments)
    except sk.ShardkitError as error:
        if not supervised.is_verdict(error, supervision):
            raise
        say_last(f"{type(error).__name__}: {error}", error)
        return cli.exit_code(error)
    except KeyboardInterrupt as error:
        say_last("interrupted", error)
        return 130


def say_last(message: str, error: BaseException) -> None:
    """Says why it ends, and then what the error was given on its way here."""
    print(message, *getattr(error, "__notes__", []), sep="\n", file=sys.stderr)


class Built:
    """All of one process of a supervised run that does not depend on its state.

    Args:
        arguments: The command line.
        assignment: What the process is, or will be if it is needed.
    """

    def __init__(self, arguments: cli.Arguments, assignment: Any) -> None:
        config, part = arguments.config, supervised.Part(assignment)
        self.is_first, self.store = part.is_first, part.store
        stem = arguments.path.stem
        self.out = part.directory(arguments.out, stem)
        if part.is_first:
            resume = arguments.resume or assignment.generation != 1
            self.directory = report.RunDirectory.open(
                self.out, config, stem=stem, resume=resume
            )
        else:
            # The first process is looking, or has begun to write there.
            self.directory = report.RunDirectory(self.out, config, resumes=True)
        cli.prepare_environment(
            config.devices,
            self.out / "cache",
            num_local=assignment.num_local_devices,
            join=part.start_jax,
        )
        self.devices = build.device_pool(assignment.num_devices)
        self.events = sk.EventLog()
        self.probe = part.probe(self.devices)
        self.trainer, self.corpus_digest = build.build_trainer(
            config,
            devices=self.devices,
            checkpoints=self.out / "checkpoints",
            events=self.events,
            snapshot=part.snapshots(config.snapshot.every),
            speeds=part.speeds(self.devices),
            probe=self.probe,
        )


def prepare(arguments: cli.Arguments, assignment: Any) -> Built:
    """Does all that a standby can do before it is known what to go on from."""
    built = Built(arguments, assignment)
    built.trainer.ready()
    return built


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
            return run_and_compare(directory, terminal, listening, arguments)
        except (sk.Preempted, KeyboardInterrupt) as error:
            if directory.config_file.exists():
                command = cli.resume_command(
                    directory.config_file, directory.path, twin=arguments.twin
                )
                if not directory.has_checkpoint:
                    error.add_note("no step is saved: going on begins anew")
                error.add_note(f"go on with: {command}")
            raise


def train_supervised(
    arguments: cli.Arguments,
    supervision: supervised.Supervision,
    prepared: Built | None,
) -> int:
    """Runs one config as one of several processes, or one generation of them."""
    if arguments.twin:
        raise sk.ConfigError("--twin: run it without a supervisor, and compare")
    if arguments.sampling is not None:
        raise sk.ConfigError(
            "--sample: no process has all parameters under a supervisor; when the run "
            "is done, sample with train.py alone, and --resume"
        )
    config = arguments.config
    built = prepared or Built(arguments, supervision.assignment)
    built.store.join(supervision.member)
    supervision.watch(
        built.events,
        config.train.steps,
        built.out if built.is_first else None,
        built.probe,
    )
    trainer = built.trainer
    directory = own = built.directory
    if not built.is_first:
        own = report.RunDirectory(supervision.own_directory(), config, resumes=False)
    schedule, _ = cli.plan_resizes(config, config.devices or len(built.devices))
    membership = supervision.membership(schedule, len(built.devices))
    with contextlib.ExitStack() as stack:
        watch = report.Report(
            own, report.Terminal(), label=directory.path.name, extras=built.is_first
        )
        stack.enter_context(watch)
        built.events.subscribe(watch.event)
        stack.callback(trainer.close)
        if trainer.go_on():
            watch.begin(trainer.step)
        else:
            begin(trainer, watch, directory, arguments)
        try:
            summary = train_to_end(
                trainer, watch, membership, built.corpus_digest, supervision.step
            )
        except sk.Halted:
            watch.close()
            supervision.halt(trainer.step)
        supervision.finish(summary)
    return 0


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
    arguments: cli.Arguments,
) -> int:
    """Runs a config, and its twin if asked to, and compares the two if there are two.

    Args:
        directory: Where the run is kept.
        terminal: Where it speaks.
        listening: The signals of this process.
        arguments: The command line.
    """
    config = directory.config
    cli.prepare_environment(config.devices, directory.path / "cache")
    if arguments.sampling is not None:
        # Who cannot sample is told so before the run, not after it.
        build.build_sampler(config)
    devices = build.device_pool(config.devices)
    schedule, late = cli.plan_resizes(config, len(devices))
    if late and not directory.is_finished:
        entries = ",".join(f"{step}:{count}" for step, count in late.items())
        end = config.train.steps
        terminal.line(f"resize: {entries} is ignored, the run ends at step {end}")
    membership = sk.combine(sk.scripted(schedule), listening)
    run(directory, terminal, devices, membership, arguments)
    if arguments.sampling is not None:
        sample(directory, terminal, devices, arguments.sampling)
    # What was found of an earlier twin is gone from the summary of a prolonged run.
    is_stale = directory.has_twin and "twin" not in directory.summary()
    if not (arguments.twin or is_stale):
        return 0
    other = directory.open_twin()
    if arguments.twin:
        run(other, terminal, devices, listening, arguments, is_twin=True)
    return compare(directory, other, terminal)


def sample(
    directory: report.RunDirectory,
    terminal: report.Terminal,
    devices: list[Any],
    wanted: sampling.Sampling,
) -> None:
    """Prints what the model of a run's newest checkpoint makes of a text."""
    trainer, _ = build.build_trainer(
        directory.config,
        devices=devices,
        checkpoints=directory.checkpoints,
        events=sk.EventLog(),
    )
    with trainer:
        step = trainer.restore()
        terminal.line(f"sample of step {step}, seed {wanted.seed}:")
        draw = build.build_sampler(directory.config)
        print(sampling.sample_text(draw, trainer.state, wanted))


def run(
    directory: report.RunDirectory,
    terminal: report.Terminal,
    devices: list[Any],
    membership: Any,
    arguments: cli.Arguments,
    *,
    is_twin: bool = False,
) -> None:
    """Runs a config to its end, from the newest checkpoint if there is one.

    Args:
        directory: Where the run is kept.
        terminal: Where it speaks.
        devices: The pool.
        membership: Who asks for other devices, or to leave.
        arguments: The command line, for what a new run begins from.
        is_twin: Whether this is only for comparison.
    """
    config = directory.config
    if directory.is_finished:
        steps, end = directory.summary()["steps"], config.train.steps
        more = f", beyond step {end} that is asked for" if steps > end else ""
        terminal.line(f"{directory.path}: finished already, at step {steps}{more}")
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
        begin(trainer, watch, directory, arguments)
        train_to_end(trainer, watch, membership, corpus_digest)


def train_to_end(
    trainer: Any,
    watch: report.Report,
    membership: Any,
    corpus_digest: str | None,
    on_step: Callable[[Any], None] = lambda metrics: None,
) -> dict[str, Any]:
    """Trains, evaluates and saves; returns the summary, which is written, too.

    Args:
        trainer: Stands where it is to go on; so does `watch`.
        watch: What tells and keeps what happens.
        membership: Who asks for other devices, or to leave.
        corpus_digest: Of the data.
        on_step: Called with the metrics of every step.
    """
    config = watch.directory.config
    watch.describe(trainer.layout, corpus_digest=corpus_digest)
    if trainer.step > config.train.steps:
        watch.terminal.line(
            f"{watch.directory.path}: is at step {trainer.step} already, beyond step "
            f"{config.train.steps}; nothing is trained"
        )
    try:
        for metrics in trainer.run(steps=config.train.steps, membership=membership):
            watch.step(metrics)
            on_step(metrics)
            if membership.leaving():
                watch.terminal.busy("leaving: saving")
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
        report.read_records(watch.directory.metrics),
        steps=trainer.step,
        eval_loss=eval_loss,
        state_digest=trainer.state_digest(),
        corpus_digest=corpus_digest,
    )
    watch.finish(summary)
    return summary


def begin(
    trainer: sk.Trainer,
    watch: report.Report,
    directory: report.RunDirectory,
    arguments: cli.Arguments,
) -> None:
    """Goes to where a run is to go on from: its own newest step, or another run's."""
    if directory.has_checkpoint:
        # It is read when it is first needed, and may turn out to be damaged.
        watch.begin(trainer.restore(), is_read=False)
        return
    if arguments.source is not None:
        trainer.restore(remap=arguments.remap, source=arguments.source)
        # From now on it is this run's own, also for who goes on with it.
        trainer.save()
    watch.begin(trainer.step, source=arguments.source)


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
    is_promised = found.is_promised and directory.config.train.consistency == "exact"
    if found.identical or not is_promised:
        return 0
    print("the run and its uninterrupted twin differ", file=sys.stderr)
    return 3


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code == cli.EXIT_CODES["Preempted"]:
        # All is saved. A compile that was given up would hold the process until it
        # is done, and whoever asked it to leave may not wait for that.
        supervised.leave(code)
    sys.exit(code)
