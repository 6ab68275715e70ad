"""What of a machine's peak goes into a model: shardkit beside hand-written `jax.jit`.

    python benchmarks/mfu.py [--models gpt2_124m,llama_1b] [--rounds 7] [--profile h200]

The rivals are loops by `jax.jit` with specs picked by hand: all state cut as ours
and gathered once, and all state on every device; the better of them in each round's
median is what shardkit is measured against. Ours runs on meshes of the devices, exact
and fast, and with `optimizer`, `activations` or `both` in host memory if so named
after it. All are timed in turn within each round. FLOPs are those of products of a
loss, three times, whatever is computed again.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

# Options, rows and microbatches of a step, and how many tokens there are.
MODELS = {
    "tiny": (
        {"num_layers": 2, "embed_dim": 64, "num_heads": 4, "mlp_dim": 192},
        (16, 64, 8, 256),
    ),
    "gpt2_124m": ({"preset": "gpt2_124m"}, (64, 1024, 8, 50257)),
    "llama_1b": (
        {"preset": "llama_1b", "max_sequence_length": 2048, "remat": True},
        (16, 2048, 8, 128256),
    ),
}
OURS = "fsdp exact,fsdp fast,data exact,tensor exact"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="gpt2_124m,llama_1b")
    parser.add_argument("--ours", default=OURS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", default="h200")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="emulate the devices")
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("PJRT_NPROC", "8")
    import jax

    if arguments.cpu:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.devices)
    from benchmarks import common

    print(common.describe_machine(), "| peak:", arguments.profile)
    print(
        "| model | what | ms a step | MFU | MFU / the best jit, median [quartiles] "
        "| GiB a device |\n" + "|---" * 6 + "|"
    )
    for name in arguments.models.split(","):
        compare(name, arguments)


def compare(name, arguments):
    """Prints one model's rivals, and shardkit on every mesh."""
    import jax

    import shardkit as sk
    from benchmarks import common
    from benchmarks.rivals import Rival, with_jit
    from models import gpt
    from shardkit.planner.profile import load_profile
    from shardkit.planner.reading import read_model

    options, (rows, length, num_microbatches, vocab) = MODELS[name]
    model = gpt.build(scan_layers=True, compute_dtype="bfloat16", **options)
    batch = common.random_tokens(rows, length, vocab)
    devices = jax.devices()[: arguments.devices]

    def ours(axis, mode, away=""):
        sizes = {"data": 1, "fsdp": 1, axis: len(devices)}
        kept = {"offload_activations": away in ("activations", "both")}
        of = gpt.build(scan_layers=True, compute_dtype="bfloat16", **options, **kept)
        return common.Ours(
            *(of, common.optimizer(), devices, batch, num_microbatches),
            exact=mode == "exact",
            mesh=sk.MeshSpec(**sizes),
            offload=away in ("optimizer", "both"),
        )

    runners = {what: ours(*what.split()) for what in arguments.ours.split(",")}
    recipe = next(iter(runners.values())).recipe
    layout = next(iter(runners.values())).layout
    mesh = sk.MeshSpec(fsdp=len(devices)).build(devices)
    rivals = {"jit, cut and gathered": False, "jit, on every device": True}
    for what, whole in rivals.items():
        runners[what] = Rival(with_jit, recipe, layout, mesh, batch, whole=whole)
    for runner in runners.values():
        runner.start()
    times = common.time_interleaved(runners, rounds=arguments.rounds)
    microbatch = {
        key: jax.ShapeDtypeStruct((rows // num_microbatches, *x.shape[1:]), x.dtype)
        for key, x in batch.items()
    }
    facts = read_model(model, microbatch, common.optimizer())
    work = 3 * num_microbatches * facts.forward.total_flops
    peak = load_profile(arguments.profile).peak("bfloat16") * len(devices)
    best = min(rivals, key=lambda what: statistics.median(times[what]))
    for what, found in times.items():
        seconds = statistics.median(found)
        cells = [
            *(name, what, f"{1e3 * seconds:.1f}", f"{work / seconds / peak:.1%}"),
            # Times of the rival over ours are MFU of ours over the rival's.
            common.ratio_row(times, best, what),
            f"{common.memory_bytes(runners[what].compiled) / 2**30:.1f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
