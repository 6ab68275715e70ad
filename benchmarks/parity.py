"""How fast redundancy is made and undone, beside zfec itself and plain copies.

    python benchmarks/parity.py [--mib 64] [--hosts 4] [--losses 2] [--rounds 9]

One thread, in memory; all ways in turn, once a round. GB/s are of the data that is
protected or rebuilt (10⁹ bytes), the median with its quartiles.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

CHUNK_BYTES = 1 << 20


def describe_machine():
    import numpy as np
    import xxhash
    import zfec

    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(x.split(": ")[1] for x in lines if x.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        pass
    return (
        f"{cpu}, Python {platform.python_version()}, numpy {np.__version__}, "
        f"zfec {zfec.__version__}, xxhash {xxhash.VERSION}"
    )


def chunks(num_bytes):
    return [
        slice(x, min(x + CHUNK_BYTES, num_bytes))
        for x in range(0, num_bytes, CHUNK_BYTES)
    ]


def make_ways(num_bytes, num_hosts, num_losses):
    """Returns name → (the bytes that count, what to do)."""
    import numpy as np
    import zfec

    from shardkit.snapshot.head import byte_sum
    from shardkit.snapshot.parity import ParitySum, decode

    rng = np.random.default_rng(0)

    def blocks(num_data):
        size = num_bytes // num_data // 64 * 64
        return [rng.integers(0, 256, size, np.uint8) for _ in range(num_data)]

    one, many = blocks(num_hosts - 1), blocks(num_hosts - num_losses)
    source = rng.integers(0, 256, num_bytes, np.uint8)
    target = np.zeros(num_bytes, np.uint8)

    def ours(data, num_parity):
        def run():
            for index in range(num_parity):
                memory = target[: data[0].size]
                block = ParitySum(memory, len(data), num_parity, index)
                for part in chunks(data[0].size):
                    for i, x in enumerate(data):
                        block.add(i, part.start, x[part])

        return run

    def theirs(data, num_parity):
        encoder = zfec.Encoder(len(data), len(data) + num_parity)
        wanted = tuple(range(len(data), len(data) + num_parity))

        def run():
            for part in chunks(data[0].size):
                encoder.encode(tuple(x[part] for x in data), wanted)

        return run

    def survivors(data, num_parity):
        """What is left when as many data blocks are lost as may be."""
        every = list(data)
        for index in range(num_parity):
            memory = np.zeros(data[0].size, np.uint8)
            block = ParitySum(memory, len(data), num_parity, index)
            for i, x in enumerate(data):
                block.add(i, 0, x)
            every.append(memory)
        num_lost = min(num_parity, len(data))
        return dict(list(enumerate(every))[num_lost : num_lost + len(data)])

    def undo(data, num_parity):
        left = survivors(data, num_parity)

        def run():
            for part in chunks(data[0].size):
                some = {i: x[part] for i, x in left.items()}
                found = decode(len(data), num_parity, some, 0)
                target[part] = np.frombuffer(found, np.uint8)

        run()
        assert np.array_equal(target[: data[0].size], data[0])
        return run

    def undo_theirs(data, num_parity):
        left = survivors(data, num_parity)
        decoder = zfec.Decoder(len(data), len(data) + num_parity)

        def run():
            for part in chunks(data[0].size):
                found = decoder.decode(
                    tuple(x[part] for x in left.values()), tuple(left)
                )
                target[part] = np.frombuffer(found[0], np.uint8)

        return run

    def total(data):
        return sum(x.size for x in data)

    single, double = f"{len(one)}+1", f"{len(many)}+{num_losses}"
    return {
        "memcpy": (num_bytes, lambda: np.copyto(target, source)),
        "checksum (XXH3)": (num_bytes, lambda: byte_sum(source)),
        f"encode {single}, ours (XOR)": (total(one), ours(one, 1)),
        f"encode {single}, zfec": (total(one), theirs(one, 1)),
        f"encode {double}, ours (sums as they come)": (
            total(many),
            ours(many, num_losses),
        ),
        f"encode {double}, zfec": (total(many), theirs(many, num_losses)),
        f"rebuild {single}, ours (XOR)": (one[0].size, undo(one, 1)),
        f"rebuild {single}, zfec": (one[0].size, undo_theirs(one, 1)),
        f"rebuild {double}, ours (sums)": (many[0].size, undo(many, num_losses)),
        # It finds all blocks that are lost.
        f"rebuild {double}, zfec": (
            min(len(many), num_losses) * many[0].size,
            undo_theirs(many, num_losses),
        ),
    }


def measure(ways, rounds):
    times = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, (_, run) in ways.items():
            start_s = time.perf_counter()
            run()
            if number:  # The first round touches the memory.
                times[name].append(time.perf_counter() - start_s)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--losses", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    if not 1 < arguments.losses < arguments.hosts:
        parser.error("--losses: expected 2 or more, and fewer than --hosts")
    ways = make_ways(arguments.mib << 20, arguments.hosts, arguments.losses)
    print(
        f"{describe_machine()}; {arguments.mib} MiB an image, {arguments.hosts} hosts"
    )
    print("| | GB/s, median [quartiles] |\n|---|---|")
    for name, seconds in measure(ways, arguments.rounds).items():
        speeds = [ways[name][0] / value / 1e9 for value in seconds]
        low, middle, high = statistics.quantiles(speeds, n=4)
        print(f"| {name} | {middle:.2f} [{low:.2f}, {high:.2f}] |", flush=True)


if __name__ == "__main__":
    main()
