"""Text from a trained model, for `train.py --sample`.

Owns the options and the way from a state to text: bytes are the tokens. Invariant: the
text depends on parameters, prompt and options, not on the mesh, since parameters are
brought together first and one device draws. The model's own `sample` does the rest. JAX
is imported when something is drawn, not before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shardkit.errors import ConfigError

__all__ = ["Sampling", "sample_text"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """What to sample, and how.

    Raises:
        ConfigError: If a value cannot be used.
    """

    prompt: str
    """The text that is gone on with."""
    num_bytes: int = 200
    """How much is added."""
    temperature: float = 0.8
    """Below 1 likely bytes become likelier; 0 always takes the likeliest."""
    top_k: int | None = None
    """Only so many of the likeliest are drawn; None: all."""
    seed: int = 0
    """Another one draws another text."""

    def __post_init__(self):
        if not self.prompt:
            raise ConfigError("--sample: expected a text to go on with, found none")
        for name, least in (("num_bytes", 1), ("top_k", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                flag = name.removeprefix("num_").replace("_", "-")
                raise ConfigError(
                    f"--sample-{flag}: expected at least {least}, found {value}"
                )
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                "--sample-temperature: expected a number, at least 0, found "
                f"{self.temperature}"
            )


def sample_text(sample: Callable[..., Any], state: Any, sampling: Sampling) -> str:
    """Draws a text; the prompt is its beginning.

    Args:
        sample: The model's.
        state: `Trainer.state`; the average of its parameters counts if there is one.
        sampling: What is asked for.
    """
    import jax
    import numpy as np

    from shardkit import keys

    params = jax.tree.map(np.asarray, state.params if state.ema is None else state.ema)
    prompt = sampling.prompt.encode()
    key = keys.stream(keys.root_key(sampling.seed), "sample")
    tokens = sample(
        params,
        np.frombuffer(prompt, np.uint8),
        key,
        num_tokens=sampling.num_bytes,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
    )
    # A vocabulary may have more tokens than there are bytes; "?" stands for those.
    drawn = bytes(token if token < 256 else ord("?") for token in tokens.tolist())
    return (prompt + drawn).decode(errors="replace")
