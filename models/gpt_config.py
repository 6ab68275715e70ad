"""The options of the GPT, and what is wrong with those that cannot be used.

Owns names, defaults and ranges. Invariant: a `GPTConfig` that exists is valid. It
builds no model; `gpt.py` does.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import shardkit as sk

__all__ = ["GPTConfig", "checked_config"]

DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GPTConfig:
    """The options of a model; the defaults make a small Llama over bytes.

    Raises:
        ConfigError: Naming every option with a value that cannot be used.
    """

    vocab_size: int = 256
    num_layers: int = 4
    num_heads: int = 4  # of the queries
    num_kv_heads: int | None = None  # shared by groups of query heads; None: num_heads
    embed_dim: int = 128  # the width of the residual stream
    mlp_dim: int = 384
    max_sequence_length: int = 256
    norm: Literal["rms", "layer"] = "rms"  # before sublayers and before the logits
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0  # the base of RoPE's wavelengths
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    use_bias: bool = False  # in projections and layer norms
    tie_embeddings: bool = True  # the embedding table also makes the logits
    dropout: float = 0.0
    remat: bool = False  # compute blocks anew in the backward pass, to save memory
    offload_activations: bool = False  # with remat: keep its inputs in host memory
    sequence_parallel: bool = False  # let `tensor` cut norms and dropout too
    scan_layers: bool = False  # stack the blocks and loop, to compile faster
    compute_dtype: DType = "float32"  # norms, softmax and loss are always float32
    param_dtype: DType = "float32"

    def __post_init__(self):
        _check(self)

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads, with the default filled in."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @classmethod
    def gpt2(cls, **overrides: Any) -> "GPTConfig":
        """Returns GPT-2 124M, with what is overridden."""
        data = {"vocab_size": 50_257, "max_sequence_length": 1024, "dropout": 0.1}
        sizes = {"num_layers": 12, "num_heads": 12, "embed_dim": 768, "mlp_dim": 3072}
        kinds = {"norm": "layer", "positions": "learned", "mlp": "gelu"}
        return checked_config(data | sizes | kinds | {"use_bias": True} | overrides)

    @classmethod
    def llama(cls, **overrides: Any) -> "GPTConfig":
        """Returns Llama 3.2 1B, its RoPE not stretched, with what is overridden."""
        sizes = {"num_layers": 16, "num_heads": 32, "embed_dim": 2048, "mlp_dim": 8192}
        rest = {"num_kv_heads": 8, "rope_theta": 500_000.0, "vocab_size": 128_256}
        return checked_config(sizes | rest | {"max_sequence_length": 8192} | overrides)


def checked_config(options: Mapping[str, Any]) -> GPTConfig:
    """Makes a config of what a user wrote.

    Raises:
        ConfigError: For an unknown option, or an unusable value.
    """
    known = [field.name for field in dataclasses.fields(GPTConfig)]
    if unknown := sorted(set(options).difference(known)):
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise sk.ConfigError(
            f"models.gpt: unknown option {', '.join(map(repr, unknown))}; "
            f"{hint}the options are preset, {', '.join(known)}."
        )
    return GPTConfig(**options)


def _check(config: GPTConfig) -> None:
    expected: dict[str, str] = {}
    for field in dataclasses.fields(GPTConfig):
        name, value, kind = field.name, getattr(config, field.name), field.type
        # By exact type: True is an instance of int.
        accepted: Any = {float: (int, float), int | None: (int, type(None))}
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                expected[name] = f"one of {', '.join(get_args(kind))}"
        elif type(value) not in accepted.get(kind, (kind,)):
            expected[name] = getattr(kind, "__name__", str(kind))
        elif kind in (int, int | None) and value is not None and value < 1:
            expected[name] = "at least 1"
    if not expected:
        multiple = config.num_heads * (2 if config.positions == "rope" else 1)
        if not 0.0 <= config.dropout < 1.0:
            expected["dropout"] = "at least 0 and less than 1"
        if not config.rope_theta > 0.0:
            expected["rope_theta"] = "more than 0"
        if config.embed_dim % multiple:
            expected["embed_dim"] = (
                f"a multiple of {multiple} (heads, twice that for rope)"
            )
        if config.num_heads % config.kv_heads:
            expected["num_kv_heads"] = f"a divisor of num_heads = {config.num_heads}"
    if expected:
        found = [(name, text, getattr(config, name)) for name, text in expected.items()]
        lines = (f"{name}: expected {text}, found {v!r}" for name, text, v in found)
        raise sk.ConfigError("GPTConfig: " + "; ".join(lines) + ".")
