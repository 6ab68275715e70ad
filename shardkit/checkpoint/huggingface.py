"""Hugging Face's names for GPT-2 and Llama, and the directories that hold them.

Owns the rules between the params of `models.gpt` and the tensors of `transformers`,
both ways. Invariant: no bit of a weight changes, and the function computed stays the
same. Our RoPE turns the two halves of a head, as `transformers` does, so the elements
of a head keep their order. Tokenizers are not its business.
"""

import dataclasses
import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from shardkit.checkpoint.families import Decoder, Layout, infer_decoder, infer_layout
from shardkit.checkpoint.huggingface_config import decode_config, encode_config
from shardkit.checkpoint.remap import Remap
from shardkit.checkpoint.remap_ops import Drop, Op, Reshape, Split, Stack, Transpose
from shardkit.checkpoint.rules import Rule
from shardkit.checkpoint.safetensors_files import open_safetensors, write_safetensors
from shardkit.checkpoint.safetensors_header import read_small_json, refuse
from shardkit.checkpoint.views import View

__all__ = [
    "export_huggingface",
    "from_huggingface",
    "import_huggingface",
    "read_config",
    "to_huggingface",
]

# The buffers that old versions saved beside the weights.
_BUFFERS = {
    "gpt2": ("h.{i}.attn.bias", "h.{i}.attn.masked_bias"),
    "llama": ("layers.{i}.self_attn.rotary_emb.inv_freq",),
}
_BODY = {"gpt2": "transformer.", "llama": "model."}


@dataclasses.dataclass(frozen=True)
class _Match:
    """A tensor of theirs, and what it is in a tree of ours.

    Attributes:
        theirs: Its name, with `{i}` for the layer.
        ours: The params that it holds, one after the other along the last dim.
        shape: Of each of these.
        matrix: That shape with the dims of heads as one.
        is_transposed: Whether they keep the matrix as (out, in).
    """

    theirs: str
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    matrix: tuple[int, ...]
    is_transposed: bool = False

    @property
    def their_shape(self) -> tuple[int, ...]:
        """The shape of their tensor."""
        *outer, last = self.matrix
        shape = (*outer, last * len(self.ours))
        return shape[::-1] if self.is_transposed else shape

    def rule(self, layout: Layout, num_layers: int) -> Rule:
        """Makes the rule from theirs to ours; its inverse needs no tree."""
        is_stacked = layout.scan_layers and "{i}" in self.theirs
        lead = (num_layers,) * is_stacked
        matrix, num = lead + self.matrix, len(self.ours)
        dims = range(len(matrix))
        ops: list[Op] = [Stack("i")] * is_stacked
        if self.is_transposed:
            ops.append(Transpose(*dims[:-2], dims[-1], dims[-2]))
        if num > 1:
            ops.append(Split(len(matrix) - 1, (matrix[-1],) * num))
        if self.shape != self.matrix:
            ops.append(Reshape(*lead, *self.shape, was=matrix))
        return Rule(self.theirs, [layout.path(name) for name in self.ours], *ops)


def _plain(theirs: str, ours: str, *shape: int) -> _Match:
    return _Match(theirs, (ours,), shape, shape)


def _linear(
    theirs: str,
    ours: Collection[str],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    *,
    is_transposed: bool,
    use_bias: bool,
) -> Iterator[_Match]:
    """Yields the kernel of a projection, and its bias."""
    flat = (math.prod(inputs), math.prod(outputs))
    kernels = tuple(f"layer/{name}/kernel" for name in ours)
    shape = inputs + outputs
    yield _Match(f"{theirs}.weight", kernels, shape, flat, is_transposed)
    if use_bias:
        biases = tuple(f"layer/{name}/bias" for name in ours)
        yield _Match(f"{theirs}.bias", biases, outputs, flat[1:])


def _gpt2(decoder: Decoder, body: str) -> Iterator[_Match]:
    embed, mlp = (decoder.embed_dim,), (decoder.mlp_dim,)
    heads = (decoder.num_heads, decoder.head_dim)
    kinds = {"is_transposed": False, "use_bias": True}
    block, qkv = (
        f"{body}h.{{i}}.",
        [f"attention/{x}" for x in ("query", "key", "value")],
    )
    yield _plain(f"{body}wte.weight", "embedding", decoder.vocab_size, *embed)
    positions = decoder.max_sequence_length or 0
    yield _plain(f"{body}wpe.weight", "position_embedding", positions, *embed)
    yield from _linear(f"{block}attn.c_attn", qkv, embed, heads, **kinds)
    yield from _linear(f"{block}attn.c_proj", ["attention/out"], heads, embed, **kinds)
    yield from _linear(f"{block}mlp.c_fc", ["mlp/up"], embed, mlp, **kinds)
    yield from _linear(f"{block}mlp.c_proj", ["mlp/down"], mlp, embed, **kinds)
    norms = {
        f"{block}ln_1": "layer/attention_norm",
        f"{block}ln_2": "layer/mlp_norm",
        f"{body}ln_f": "final_norm",
    }
    for theirs, ours in norms.items():
        yield _plain(f"{theirs}.weight", f"{ours}/scale", *embed)
        yield _plain(f"{theirs}.bias", f"{ours}/bias", *embed)


def _llama(decoder: Decoder, body: str) -> Iterator[_Match]:
    embed, mlp = (decoder.embed_dim,), (decoder.mlp_dim,)
    heads = (decoder.num_heads, decoder.head_dim)
    kv_heads = (decoder.kv_heads, decoder.head_dim)
    kinds = {"is_transposed": True, "use_bias": decoder.use_bias}
    block = f"{body}layers.{{i}}."
    yield _plain(f"{body}embed_tokens.weight", "embedding", decoder.vocab_size, *embed)
    projections = {
        "self_attn.q_proj": ("attention/query", embed, heads),
        "self_attn.k_proj": ("attention/key", embed, kv_heads),
        "self_attn.v_proj": ("attention/value", embed, kv_heads),
        "self_attn.o_proj": ("attention/out", heads, embed),
        "mlp.gate_proj": ("mlp/gate", embed, mlp),
        "mlp.up_proj": ("mlp/up", embed, mlp),
        "mlp.down_proj": ("mlp/down", mlp, embed),
    }
    for theirs, (ours, inputs, outputs) in projections.items():
        yield from _linear(f"{block}{theirs}", [ours], inputs, outputs, **kinds)
    norms = {
        f"{block}input_layernorm": "layer/attention_norm",
        f"{block}post_attention_layernorm": "layer/mlp_norm",
        f"{body}norm": "final_norm",
    }
    for theirs, ours in norms.items():
        yield _plain(f"{theirs}.weight", f"{ours}/scale", *embed)


def _matches(decoder: Decoder, body: str | None) -> list[_Match]:
    body = _BODY[decoder.family] if body is None else body
    make = {"gpt2": _gpt2, "llama": _llama}[decoder.family]
    matches = list(make(decoder, body))
    if not decoder.tied:
        shape = (decoder.embed_dim, decoder.vocab_size)
        matches.append(_Match("lm_head.weight", ("head",), shape, shape, True))
    return matches


def from_huggingface(
    decoder: Decoder, layout: Layout, *, body: str | None = None
) -> Remap:
    """Makes the rules from their names to ours.

    Args:
        decoder: The numbers; `read_config` finds them.
        layout: Of the tree to be made.
        body: What the names of all but the head begin with; None for `transformer.`
            and `model.`, as models for language are saved.
    """
    matches = _matches(decoder, body)
    body = _BODY[decoder.family] if body is None else body
    rules = [match.rule(layout, decoder.num_layers) for match in matches]
    rules += [Rule(f"{body}{name}", (), Drop()) for name in _BUFFERS[decoder.family]]
    # Where it is tied, what a file says of the head beside the embedding is not read.
    rules += [Rule("lm_head.weight", (), Drop())] * decoder.tied
    return Remap(rules)


def to_huggingface(decoder: Decoder, layout: Layout) -> Remap:
    """Makes the rules from our names to theirs.

    Args:
        decoder: The numbers; `infer_decoder` finds them.
        layout: Of the tree that there is.
    """
    matches = _matches(decoder, None)
    return Remap([m.rule(layout, decoder.num_layers) for m in matches]).inverse()


def read_config(directory: str | Path, allow: Collection[str] = ()) -> Decoder:
    """Reads the numbers of a model from its `config.json`.

    Args:
        directory: Where the config is.
        allow: Keys that may ask for what `models.gpt` does not compute.

    Raises:
        RestoreError: If it is missing, damaged or of a model that is not ours.
    """
    path = Path(directory) / "config.json"
    return decode_config(read_small_json(path), str(path), allow)


def import_huggingface(
    directory: str | Path, layout: Layout | None = None, *, allow: Collection[str] = ()
) -> tuple[Decoder, Mapping[str, View]]:
    """Opens a directory as `save_pretrained` makes it.

    Args:
        directory: With a `config.json` and one or more safetensors files.
        layout: Of the tree to be made; None for one of separate layers.
        allow: Keys of the config that may ask for what `models.gpt` does not compute.

    Returns:
        The numbers, and the params under our paths; nothing is read yet.

    Raises:
        RestoreError: Naming everything missing, damaged, of another shape or unknown.
    """
    decoder = read_config(directory, allow)
    tree = open_safetensors(directory)
    body = _BODY[decoder.family]
    # A model without a head, and the first GPT-2 there was, are saved without it.
    if not any(name.startswith(body) for name in tree):
        body = ""
    _check(tree, decoder, body, Path(directory))
    return decoder, from_huggingface(decoder, layout or Layout(), body=body).apply(tree)


def _check(tree: Mapping[str, View], decoder: Decoder, body: str, path: Path) -> None:
    """Compares names and shapes with what the config says."""
    advice = "Fetch the weights and config.json together."
    if decoder.num_layers > len(tree):
        problem = f"expected {decoder.num_layers} layers, found {len(tree)} tensors"
        raise refuse(path, [problem], advice)
    bad = []
    for match in _matches(decoder, body):
        layers = range(decoder.num_layers if "{i}" in match.theirs else 1)
        for name in (match.theirs.replace("{i}", str(index)) for index in layers):
            found = tree[name].shape if name in tree else "nothing"
            if found != match.their_shape:
                bad.append(f"{name}: expected {match.their_shape}, found {found}")
    if bad:
        raise refuse(path, bad, advice)


def export_huggingface(
    directory: str | Path,
    tree: Mapping[str, View],
    *,
    prefix: str = "params/",
    max_sequence_length: int | None = None,
    rope_theta: float | None = None,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    limit_bytes: int = 64 * 2**20,
) -> Decoder:
    """Writes what `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        directory: New or empty; it appears whole or not at all.
        tree: Of ours; what is not under `prefix` stays out.
        prefix: Where the params are; `ema/` for averaged ones.
        max_sequence_length: Of a Llama, whose weights do not tell.
        rope_theta: Likewise.
        config: Further keys for `config.json`, such as `eos_token_id`.
        max_shard_bytes: More than this is cut into shards.
        limit_bytes: The most that is read at once.

    Returns:
        The numbers of what was written.

    Raises:
        RestoreError: If it is neither a GPT-2 nor a Llama, or leaves do not fit.
        ConfigError: If something is not known, or the directory is in use.
    """
    layout = infer_layout(tree, prefix)
    decoder = infer_decoder(
        tree, layout, max_sequence_length=max_sequence_length, rope_theta=rope_theta
    )
    params = {name: view for name, view in tree.items() if name.startswith(prefix)}
    dtype = params[layout.path("embedding")].dtype.name
    content = encode_config(decoder, dtype) | dict(config or {})
    named = to_huggingface(decoder, layout).apply(params)
    _check(named, decoder, _BODY[decoder.family], Path(directory))
    write_safetensors(
        directory,
        named,
        # Without it `transformers` refuses the files.
        {"format": "pt"},
        max_shard_bytes=max_shard_bytes,
        limit_bytes=limit_bytes,
        files={"config.json": (json.dumps(content, indent=2) + "\n").encode()},
    )
    return decoder
