"""A Hugging Face config.json becomes a `ModelConfig`, and is written back for every reader.

Reading is strict: what this model would compute differently from `LlamaForCausalLM` is refused by name. Keys that
`LlamaForCausalLM` itself does not read change nothing there; they are carried through unchanged.

Two spellings of the rotary embedding are in use. transformers 5 writes `rope_parameters` (type, theta and the rest in
one dict) and nothing else; transformers 4, vLLM and llama.cpp read a top-level `rope_theta` and a `rope_scaling` dict,
and fall back to theta 10000 without a word where they find none. Both are understood, and both are always written.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalong.config.schema import ModelConfig
from megalong.rope.frequencies import check_scaling, is_number, rope_type, rotary_frequencies
from megalong.runtime.errors import CheckpointError, ThetaError
from megalong.runtime.json_file import read_json, shown

ARCHITECTURE = "LlamaForCausalLM"

# Llama 1 and 2 configs of 2023 have neither spelling; 10000 is what they were trained with (arXiv 2302.13971).
_THETA_OF_PLAIN_OLD_CONFIGS = 10000.0

# Largest value of each size. A file may claim any number, and tables are made by these numbers before a tensor is read;
# ten times and more of what the largest Llama has.
_LIMITS = {
    "vocab_size": 2**27,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 2**14,
    "max_position_embeddings": 2**31 - 1,
}

# Rope types whose original window transformers also accepts at the top level of the config.
_TYPES_WITH_ORIGINAL_WINDOW = ("llama3", "yarn", "longrope")


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face directory.

    Raises:
        CheckpointError: missing or not a JSON object.
    """
    return read_json(folder / "config.json", CheckpointError, "Download or convert it again.")


def model_from_hf(source: Path | Mapping[str, Any], where: str | None = None) -> ModelConfig:
    """The model shape that a Hugging Face config describes.

    Args:
        source: a Hugging Face directory, or its parsed config.json.
        where: the file, as error messages should call it.

    Raises:
        CheckpointError: not a Llama, a field missing or of a wrong type, or one that this model cannot honour.
        ThetaError: the rotary embedding is incomplete or turns nothing, or its two spellings contradict each other.
    """
    hf = source if isinstance(source, Mapping) else read_hf_config(source)
    where = where or (str(source / "config.json") if isinstance(source, Path) else "config.json")
    _check_architecture(hf, where)
    hidden, heads = _positive(hf, "hidden_size", where), _positive(hf, "num_attention_heads", where)
    kv_heads = heads if hf.get("num_key_value_heads") is None else _positive(hf, "num_key_value_heads", where)
    if hf.get("head_dim") is not None:
        head_dim = _positive(hf, "head_dim", where)
    else:
        if hidden % heads:
            raise CheckpointError(
                f"{where}: hidden_size={hidden} is not a multiple of num_attention_heads={heads}, and there is no "
                "head_dim."
            )
        head_dim = hidden // heads
    if heads % kv_heads:
        raise CheckpointError(
            f"{where}: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}."
        )
    theta, scaling = rope_of(hf, head_dim, where)
    window = _positive(hf, "max_position_embeddings", where)
    try:
        rotary_frequencies(theta, head_dim, scaling, max_position_embeddings=window)
    except ThetaError as error:
        raise ThetaError(f"{where}: {error}") from None
    name = hf.get("_name_or_path")
    return ModelConfig(
        name=name if isinstance(name, str) and name else "llama",
        vocab_size=_positive(hf, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=_positive(hf, "intermediate_size", where),
        num_hidden_layers=_positive(hf, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_fraction(hf, "rms_norm_eps", 1e-6, where),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=window,
        tie_word_embeddings=_flag(hf, "tie_word_embeddings", where),
        attention_bias=_flag(hf, "attention_bias", where),
        mlp_bias=_flag(hf, "mlp_bias", where),
        initializer_range=_fraction(hf, "initializer_range", 0.02, where),
        bos_token_id=_token(hf, "bos_token_id", 1, where),
        eos_token_id=_token(hf, "eos_token_id", 2, where),
    )


def model_to_hf(
    model: ModelConfig,
    *,
    theta: float | None = None,
    window: int | None = None,
    dtype: str = "bfloat16",
    carried: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A complete config.json for a model, with the rotary embedding in both spellings.

    Args:
        model: shape of the model.
        theta: rotary base of the stage. None: the model's.
        window: tokens of the stage. None: the model's.
        dtype: dtype of the weights: float32, bfloat16 or float16.
        carried: the config that the weights came from; keys that the model does not define are taken over from it.
    """
    hf = copy.deepcopy(dict(carried or {}))
    hf.setdefault("use_cache", True)
    hf |= {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        "attention_bias": model.attention_bias,
        "mlp_bias": model.mlp_bias,
        "initializer_range": model.initializer_range,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
    }
    theta = model.rope_theta if theta is None else theta
    window = model.max_position_embeddings if window is None else window
    return with_rope(with_dtype(hf, dtype), theta, window, model.rope_scaling)


def with_dtype(hf: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config with another dtype of weights, under both names that readers know."""
    return {**hf, "dtype": dtype, "torch_dtype": dtype}


def with_rope(
    hf: Mapping[str, Any], theta: float, window: int, scaling: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The config with another theta, window and rope dict, in both spellings.

    Args:
        hf: a complete config.
        theta: rotary base.
        window: max_position_embeddings, tokens.
        scaling: Hugging Face rope dict without theta ({rope_type, ...}); None: plain rotary embedding.
    """
    kind = rope_type(scaling)
    fields = {k: v for k, v in (scaling or {}).items() if k not in ("rope_theta", "type", "rope_type")}
    hf = {k: v for k, v in hf.items() if k != "original_max_position_embeddings"}
    return {
        **hf,
        "max_position_embeddings": window,
        "rope_theta": float(theta),
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **fields},
        "rope_parameters": {"rope_type": kind, "rope_theta": float(theta), **fields},
    }


def rope_of(hf: Mapping[str, Any], head_dim: int, where: str = "config.json") -> tuple[float, dict[str, Any] | None]:
    """Theta and rope dict (without theta; None if plain) of a config in either spelling.

    Raises:
        ThetaError: incomplete, unsupported, or the spellings contradict each other.
    """
    new, old = hf.get("rope_parameters"), hf.get("rope_scaling")
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, Mapping):
            raise ThetaError(f"{where}: {name} must be a dict or null, not {shown(value)}.")
        if any(isinstance(v, Mapping) for v in (value or {}).values()):
            raise ThetaError(f"{where}: {name} differs between layer types: not a Llama.")
    thetas = {
        "rope_parameters.rope_theta": (new or {}).get("rope_theta"),
        "rope_theta": hf.get("rope_theta"),
        "rope_scaling.rope_theta": (old or {}).get("rope_theta"),
    }
    given = {name: value for name, value in thetas.items() if value is not None}
    for name, value in given.items():
        if not is_number(value):
            raise ThetaError(f"{where}: {name}={shown(value)}: a rotary base is a number.")
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ThetaError(f"{where} gives several rotary bases: {listed}. Remove the wrong one.")
    theta = next(iter(given.values()), None)
    if theta is None and not new and not old:
        theta = _THETA_OF_PLAIN_OLD_CONFIGS
    try:
        scaling = _one_scaling(hf, new, old, where)
        check_scaling(theta, head_dim, scaling)
    except ThetaError as error:
        if str(error).startswith(where):
            raise
        raise ThetaError(f"{where}: {error}") from None
    assert theta is not None
    return float(theta), None if rope_type(scaling) == "default" else scaling


def _one_scaling(
    hf: Mapping[str, Any], new: Mapping[str, Any] | None, old: Mapping[str, Any] | None, where: str
) -> dict[str, Any] | None:
    found = [_without_theta(hf, scaling, where) for scaling in (new, old) if scaling]
    if len(found) == 2 and found[0] != found[1]:
        raise ThetaError(
            f"{where}: rope_parameters={dict(new or {})} and rope_scaling={dict(old or {})} contradict each other. "
            "Remove the wrong one."
        )
    partial = hf.get("partial_rotary_factor")
    if partial is not None and partial != 1.0:
        raise ThetaError(f"{where}: partial_rotary_factor={partial}: only rotary embeddings over the whole head.")
    return found[0] if found else None


def _without_theta(hf: Mapping[str, Any], scaling: Mapping[str, Any], where: str) -> dict[str, Any]:
    if scaling.get("rope_type") is None and scaling.get("type") is None:
        scaling = {"rope_type": "default", **scaling} if set(scaling) <= {"rope_theta"} else scaling
    kind = rope_type(scaling)
    # a null means that the field is not there, except for truncate: transformers reads null as false, absent as true
    empty = {k for k, v in scaling.items() if v is None and k != "truncate"}
    fields = {k: v for k, v in scaling.items() if k not in ("rope_theta", "type", "rope_type") and k not in empty}
    outside = hf.get("original_max_position_embeddings")
    if outside is not None and kind in _TYPES_WITH_ORIGINAL_WINDOW:
        inside = fields.setdefault("original_max_position_embeddings", outside)
        if inside != outside:
            raise ThetaError(
                f"{where}: original_max_position_embeddings is {outside} at the top level and {inside} in the rope "
                "dict. Remove the wrong one."
            )
    return {"rope_type": kind, **fields}


def _check_architecture(hf: Mapping[str, Any], where: str) -> None:
    architectures, model_type = hf.get("architectures"), hf.get("model_type")
    if (architectures and architectures != [ARCHITECTURE]) or model_type not in ("llama", None):
        raise CheckpointError(
            f"{where} describes model_type={shown(model_type)}, architectures={shown(architectures)}: only "
            f"[{ARCHITECTURE!r}] is supported."
        )
    if not architectures and model_type is None:
        raise CheckpointError(f"{where} names neither architectures nor model_type: it must say {ARCHITECTURE}.")
    refused = {
        "hidden_act": hf.get("hidden_act", "silu") not in ("silu", "swish"),
        "attention_dropout": bool(hf.get("attention_dropout")),
        "quantization_config": hf.get("quantization_config") is not None,
        "auto_map": hf.get("auto_map") is not None,
    }
    for key, is_refused in refused.items():
        if is_refused:
            raise CheckpointError(
                f"{where}: {key}={shown(hf[key])} is not supported. This Llama has silu, no dropout, plain weights "
                "(not quantized) and no custom code."
            )


def _positive(hf: Mapping[str, Any], key: str, where: str) -> int:
    value = hf.get(key)
    if type(value) is not int or not 1 <= value <= _LIMITS[key]:  # not isinstance: a bool is no number here
        raise CheckpointError(f"{where}: {key}={shown(value)} must be a positive integer of at most {_LIMITS[key]:,}.")
    return value


def _fraction(hf: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = hf.get(key, default)
    if not is_number(value) or not 0 < value < 1:
        raise CheckpointError(f"{where}: {key}={shown(value)} must be a number between 0 and 1.")
    return float(value)


def _flag(hf: Mapping[str, Any], key: str, where: str) -> bool:
    value = hf.get(key)
    if value is not None and not isinstance(value, bool):  # "false" is a text, and true
        raise CheckpointError(f"{where}: {key}={shown(value)} must be true or false, without quotes.")
    return bool(value)


def _token(hf: Mapping[str, Any], key: str, default: int, where: str) -> Any:
    value = hf.get(key, default)
    several = isinstance(value, list) and bool(value) and key == "eos_token_id"
    if value is not None and not all(type(v) is int and 0 <= v < 2**31 for v in (value if several else [value])):
        raise CheckpointError(f"{where}: {key}={shown(value)} must be a token id (eos_token_id: or a list of them).")
    return value
