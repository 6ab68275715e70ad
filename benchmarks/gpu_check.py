"""Exactness and step times on real GPUs.

    python benchmarks/gpu_check.py [--quick]

Runs a GPT in float32 and bfloat16 on one GPU, on all, and through 1-N-1, without any
determinism flag, and compares every bit; continues a checkpoint in another process;
then times a step of GPT-2 124M beside hand-written ones.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

STEPS = 6


def make_trainer(dtype, directory=None):
    import shardkit as sk
    from benchmarks import common
    from models import gpt

    model = gpt.build(
        vocab_size=4096,
        num_layers=6,
        num_heads=12,
        embed_dim=768,
        mlp_dim=3072,
        max_sequence_length=512,
        dropout=0.1,
        scan_layers=True,
        compute_dtype=dtype,
    )
    checkpoint = directory and sk.CheckpointConfig(directory=directory)
    return sk.Trainer(
        init=model.init,
        loss=model.loss,
        tx=common.optimizer(),
        data=lambda step: common.random_tokens(24, 512, 4096, seed=step),
        axis_rules=model.axis_rules,
        num_microbatches=6,
        certify="always",
        checkpoint=checkpoint,
    )


def run(dtype, script, steps=STEPS, directory=None, restore=False):
    """Returns the loss bits of every step and the final digest."""
    import shardkit as sk

    trainer = make_trainer(dtype, directory)
    if restore:
        trainer.restore()
    found = [
        m.loss_bits for m in trainer.run(steps, membership=sk.scripted(dict(script)))
    ]
    if directory:
        trainer.save()
    digest = trainer.state_digest()
    trainer.close()
    return found, digest


def child(dtype, directory, count, steps, restore):
    """One process of the two-process check; prints what `run` found as JSON."""
    found = run(dtype, {0: count}, steps, directory, restore)
    print("RESULT " + json.dumps(found), flush=True)


def in_process(dtype, directory, count, steps, restore, cache):
    arguments = [dtype, directory, str(count), str(steps), str(int(restore))]
    out = subprocess.run(
        [sys.executable, __file__, "--child", *arguments, "--cache", cache],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )
    lines = [x for x in out.stdout.splitlines() if x.startswith("RESULT ")]
    if not lines:
        print(out.stderr[-3000:])
        raise SystemExit("a child process failed")
    return json.loads(lines[0].removeprefix("RESULT "))


def check_exactness(num_gpus, cache):
    print("| compute | what | losses | state |\n|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        reference = run(dtype, {0: num_gpus})
        cases = {"again": {0: num_gpus}, "1 GPU": {0: 1}}
        if num_gpus > 1:
            cases[f"1-{num_gpus}-1"] = {0: 1, 2: num_gpus, 4: 1}
        for name, script in cases.items():
            report(dtype, name, reference, run(dtype, script))
        with tempfile.TemporaryDirectory() as directory:
            first = in_process(dtype, directory, num_gpus, 3, False, cache)
            second = in_process(dtype, directory, 1, STEPS, True, cache)
            found = first[0] + second[0], second[1]
            report(
                dtype, f"{num_gpus} GPUs, then 1 in another process", reference, found
            )


def report(dtype, name, reference, found):
    same = sum(a == b for a, b in zip(reference[0], found[0], strict=True))
    state = "identical" if reference[1] == found[1] else "DIFFERS"
    print(f"| {dtype} | {name} | {same}/{len(reference[0])} identical | {state} |")
    sys.stdout.flush()


def time_gpt2(num_gpus, rounds):
    import jax

    from benchmarks import common
    from models import gpt

    small = gpt.build(scan_layers=True)
    for count in sorted({1, num_gpus}):
        devices, batch = jax.devices()[:count], common.random_tokens(16, 128, 256)
        common.check_same_work(small, devices, batch, 8)
    print(common.HEADER)
    for dtype in ("bfloat16", "float32"):
        model = gpt.build(
            preset="gpt2_124m",
            scan_layers=True,
            compute_dtype=dtype,
            max_sequence_length=1024,
        )
        batch = common.random_tokens(64, 1024, 50257)
        for count in sorted({1, num_gpus}):
            print(f"GPT-2 124M, {dtype}, 64 rows of 1024 in 8 microbatches")
            devices = jax.devices()[:count]
            common.compare(model, devices, batch, 8, rounds=rounds)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=5)
    parser.add_argument("--cache")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", choices=["exact", "time"])
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    cache = arguments.cache or tempfile.mkdtemp()
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if arguments.child:
        dtype, directory, count, steps, restore = arguments.child
        child(dtype, directory, int(count), int(steps), bool(int(restore)))
        return
    from benchmarks import common

    start_s = time.monotonic()
    print(common.describe_machine(), "XLA_FLAGS:", os.environ.get("XLA_FLAGS", ""))
    num_gpus = len(jax.devices())
    if arguments.only != "time":
        check_exactness(num_gpus, cache)
    if arguments.only != "exact":
        time_gpt2(num_gpus, arguments.rounds)
    print(f"{time.monotonic() - start_s:.0f} s in all")


if __name__ == "__main__":
    main()
