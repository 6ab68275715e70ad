"""The `config.json` of Hugging Face, for GPT-2 and Llama.

Owns what of it decides the function a model computes. Invariant: a config that asks for
anything that `models.gpt` computes differently is refused, unless that was allowed by
name; what has no bearing on the weights is neither read nor written.
"""

from collections.abc import Collection, Mapping
from typing import Any

from shardkit.checkpoint.families import Decoder
from shardkit.errors import ConfigError, RestoreError

__all__ = ["decode_config", "encode_config"]

_EPSILON = 1e-5
_ADVICE = (
    "models.gpt computes something else. Allow a key by name to load the weights "
    "nonetheless."
)


def decode_config(
    config: Mapping[str, Any], where: str, allow: Collection[str] = ()
) -> Decoder:
    """Reads the numbers of a decoder from a config.

    Args:
        config: The content of a `config.json`.
        where: Its name, for errors.
        allow: Keys that may ask for what `models.gpt` does not do.

    Raises:
        RestoreError: Naming every key with a value that cannot be used.
    """
    decoders = {"gpt2": _decode_gpt2, "llama": _decode_llama}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in decoders:
        raise RestoreError(
            f"{where}: model_type: expected {' or '.join(decoders)}, found {kind!r}"
        )
    keys = _Keys(config, allow)
    decoder = decoders[kind](keys)
    if keys.bad:
        lines = "\n".join(f"  {line}" for line in keys.bad)
        raise RestoreError(f"{where}: {kind}\n{lines}\n{_ADVICE}")
    return decoder


class _Keys:
    """A config that collects what is wrong with what is read from it."""

    def __init__(self, config: Mapping[str, Any], allow: Collection[str]):
        self.config, self.allow, self.bad = config, allow, []

    def count(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if type(value) is int and 0 < value < 2**31:
            return value
        self.bad.append(f"{key}: expected a count, found {str(value)[:80]!r}")
        return 1

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            self.bad.append(f"{key}: expected true or false, found {str(value)[:80]!r}")
        return bool(value)

    def fixed(self, key: str, default: Any, *wanted: Any) -> None:
        self.found(key, self.config.get(key, default), *wanted)

    def found(self, key: str, value: Any, *wanted: Any) -> None:
        if value not in wanted and key not in self.allow:
            texts = " or ".join(map(repr, wanted))
            self.bad.append(f"{key}: expected {texts}, found {str(value)[:80]}")


def _decode_gpt2(keys: _Keys) -> Decoder:
    keys.fixed("activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
    keys.fixed("layer_norm_epsilon", _EPSILON, _EPSILON)
    keys.fixed("scale_attn_weights", True, True)
    keys.fixed("scale_attn_by_inverse_layer_idx", False, False)
    keys.fixed("add_cross_attention", False, False)
    embed_dim, num_heads = keys.count("n_embd", 768), keys.count("n_head", 12)
    if embed_dim % num_heads:
        keys.bad.append(f"n_embd: expected a multiple of n_head, found {embed_dim}")
    return Decoder(
        family="gpt2",
        num_layers=keys.count("n_layer", 12),
        num_heads=num_heads,
        kv_heads=num_heads,
        head_dim=embed_dim // num_heads,
        embed_dim=embed_dim,
        mlp_dim=keys.count("n_inner", 4 * embed_dim),
        vocab_size=keys.count("vocab_size", 50_257),
        max_sequence_length=keys.count("n_positions", 1024),
        tied=keys.flag("tie_word_embeddings", True),
        use_bias=True,
    )


def _decode_llama(keys: _Keys) -> Decoder:
    keys.fixed("hidden_act", "silu", "silu")
    keys.fixed("rms_norm_eps", 1e-6, _EPSILON)
    use_bias = keys.flag("attention_bias", False)
    keys.fixed("mlp_bias", False, use_bias)
    embed_dim = keys.count("hidden_size", 4096)
    num_heads = keys.count("num_attention_heads", 32)
    kv_heads = keys.count("num_key_value_heads", num_heads)
    if num_heads % kv_heads:
        divisor = f"expected a divisor of num_attention_heads = {num_heads}"
        keys.bad.append(f"num_key_value_heads: {divisor}, found {kv_heads}")
    return Decoder(
        family="llama",
        num_layers=keys.count("num_hidden_layers", 32),
        num_heads=num_heads,
        kv_heads=kv_heads,
        head_dim=keys.count("head_dim", max(1, embed_dim // num_heads)),
        embed_dim=embed_dim,
        mlp_dim=keys.count("intermediate_size", 11_008),
        vocab_size=keys.count("vocab_size", 32_000),
        max_sequence_length=keys.count("max_position_embeddings", 2048),
        rope_theta=_rope_theta(keys),
        tied=keys.flag("tie_word_embeddings", False),
        use_bias=use_bias,
    )


def _rope_theta(keys: _Keys) -> float:
    # Since transformers 5 all of RoPE is in one place.
    place = "rope_parameters" if keys.config.get("rope_parameters") else "rope_scaling"
    rope = keys.config.get(place) or {}
    if not isinstance(rope, dict):
        keys.bad.append(f"{place}: expected an object, found {str(rope)[:80]!r}")
        return 1.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    keys.found(place, kind, "default")
    keys.found(place, rope.get("partial_rotary_factor", 1.0), 1.0)
    theta = rope.get("rope_theta", keys.config.get("rope_theta", 10_000.0))
    if type(theta) in (int, float) and 0 < theta < 1e18:
        return float(theta)
    keys.bad.append(
        f"rope_theta: expected a positive number, found {str(theta)[:80]!r}"
    )
    return 1.0


def encode_config(decoder: Decoder, dtype: str) -> dict[str, Any]:
    """Makes the config with which `transformers` computes what `models.gpt` does.

    Args:
        decoder: The numbers.
        dtype: Of the weights, such as `"float32"`.

    Raises:
        ConfigError: If a number is not known, or there is no such model.
    """
    encode = {"gpt2": _encode_gpt2, "llama": _encode_llama}[decoder.family]
    common = {
        "dtype": dtype,
        # Its name before transformers 4.56.
        "torch_dtype": dtype,
        "vocab_size": decoder.vocab_size,
        "tie_word_embeddings": decoder.tied,
        # Or else they would be tokens of the vocabularies of the first of their kind.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return encode(decoder) | common


def _encode_llama(decoder: Decoder) -> dict[str, Any]:
    unknown = {
        "max_sequence_length": decoder.max_sequence_length,
        "rope_theta": decoder.rope_theta,
    }
    missing = [name for name, value in unknown.items() if value is None]
    if missing:
        raise ConfigError(
            f"a Llama's config: expected {' and '.join(missing)}, which its weights do "
            "not tell; pass what the model was made with"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": decoder.embed_dim,
        "intermediate_size": decoder.mlp_dim,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "max_position_embeddings": decoder.max_sequence_length,
        "hidden_act": "silu",
        "rms_norm_eps": _EPSILON,
        "rope_theta": decoder.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": decoder.rope_theta},
        "attention_bias": decoder.use_bias,
        "mlp_bias": decoder.use_bias,
    }


def _encode_gpt2(decoder: Decoder) -> dict[str, Any]:
    if decoder.kv_heads != decoder.num_heads or not decoder.use_bias:
        raise ConfigError(
            "a GPT-2 of Hugging Face has as many key/value heads as query heads, and "
            f"biases; found {decoder.kv_heads} and {decoder.num_heads} heads, use_bias "
            f"= {decoder.use_bias}"
        )
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": decoder.max_sequence_length,
        "n_embd": decoder.embed_dim,
        "n_layer": decoder.num_layers,
        "n_head": decoder.num_heads,
        "n_inner": decoder.mlp_dim,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": _EPSILON,
    }
