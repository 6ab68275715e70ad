"""A status as a supervisor tells it, and any JSON that somebody else might."""

from hypothesis import strategies as st


def make_status(**changed):
    """A run on four hosts, one of them kept out, after two recoveries."""
    hosts = [
        {
            "host": f"host-{number}",
            "state": "alive",
            "workers": [
                {
                    "process": number,
                    "pid": 41230 + number,
                    "step": 120,
                    "phase": "step",
                    "age_s": 0.1,
                    "speed": 0.62 if number == 1 else 1.0,
                }
            ],
            "standbys": 1,
            "flaps": 0,
            "until_s": None,
            "image_bytes": 82_000_000,
            "protection_bytes": 27_300_000,
            "predicted_bytes": 109_500_000,
        }
        for number in range(3)
    ]
    hosts.append(
        {
            "host": "host-3",
            "state": "quarantined",
            "workers": [],
            "standbys": 0,
            "flaps": 3,
            "until_s": 42.0,
            "image_bytes": None,
            "protection_bytes": None,
            "predicted_bytes": None,
        }
    )
    names = ("detect", "end", "choose", "form", "restore", "first_step")
    spent_s = (0.01, 0.05, 0.02, 0.8, 0.3, 0.52)
    recovery = {
        "generation": 2,
        "cause": "process 2 on host-2 was killed by SIGKILL",
        "step": 59,
        "lost_steps": 1,
        "started_s": 1_700_000_000.0,
        "total_s": 1.7,
        "phases": [
            {"name": name, "s": s} for name, s in zip(names, spent_s, strict=True)
        ],
        "rebuilt_bytes": 30_000_000,
        "fetched_bytes": 20_000_000,
    }
    return {
        "run": "tiny-001",
        "out": "runs/tiny-001",
        "state": "running",
        "generation": 3,
        "step": 120,
        "steps": 400,
        "loss": 2.1034,
        "step_s": 0.21,
        "devices": 6,
        "mesh": {"data": 1, "fsdp": 6},
        "redundancy": "parity",
        "snapshot": {
            "step": 119,
            "age_s": 0.2,
            "bytes": 123_000_000,
            "protection_bytes": 41_000_000,
            "predicted_bytes": 328_500_000,
        },
        "hosts": hosts,
        "recoveries": [
            recovery,
            {**recovery, "generation": 3, "cause": "host-3 was lost", "step": 118},
        ],
        "losses": [[step, 5.0 / (1 + step)] for step in range(120)],
        "goodput": 0.97,
        "waits": ["for 2 more devices: 6 of at least 8, gives up in 80 s"],
        **changed,
    }


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(max_size=12)
    | st.sampled_from(["nan", "-inf", "running", "\x1b[2J", 'a"b\\c\nd', "[bold]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def odd_statuses(draw):
    """A status of which some fields, at any depth, are anything."""
    said = make_status()

    def spoil(value):
        if isinstance(value, dict):
            return {
                name: draw(json_values) if draw(st.integers(0, 9)) == 0 else spoil(each)
                for name, each in value.items()
                if draw(st.integers(0, 19))
            }
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [spoil(each) for each in value]
        return value

    return {**spoil(said), **draw(st.dictionaries(st.text(), json_values, max_size=2))}
