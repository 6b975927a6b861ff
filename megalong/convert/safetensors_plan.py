"""Which tensors go into which *.safetensors file, and what bytes precede them? As transformers itself would write them.

Tensors are dealt to files in the order of the model's modules; inside a file they lie sorted by name, and the header
is written as the safetensors library writes it. So a converted directory is, file by file, the bytes that
`save_pretrained` writes for the same weights and the same limit per file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megalong.convert.safetensors_dir import NAMES, SINGLE
from megalong.runtime.errors import ConfigError

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# The order in which LlamaForCausalLM defines its modules.
_MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)


@dataclass(frozen=True)
class FilePlan:
    """One file: its name and its tensors in file order."""

    name: str
    tensors: dict[str, tuple[int, ...]]
    """Name -> shape."""

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(shape) for shape in self.tensors.values()) * dtype.itemsize


def plan_files(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_size: int) -> list[FilePlan]:
    """Deal tensors to files of at most `max_shard_size` bytes; a larger tensor gets a file of its own.

    The rule is that of huggingface_hub's `split_state_dict_into_shards_factory`: an oversized tensor does not end the
    file that is being filled.
    """
    files: list[dict[str, tuple[int, ...]]] = []
    current: dict[str, tuple[int, ...]] = {}
    size = 0
    for name in sorted(shapes, key=_module_order):
        nbytes = math.prod(shapes[name]) * dtype.itemsize
        if nbytes > max_shard_size:
            files.append({name: shapes[name]})
            continue
        if size + nbytes > max_shard_size:
            files.append(current)
            current, size = {}, 0
        current[name] = shapes[name]
        size += nbytes
    if current:
        files.append(current)
    count = len(files)
    names = [SINGLE] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    return [FilePlan(name, dict(sorted(tensors.items()))) for name, tensors in zip(names, files, strict=True)]


def header(plan: FilePlan, dtype: torch.dtype) -> bytes:
    """The bytes of a file before its first tensor."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in plan.tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_json(plans: list[FilePlan], dtype: torch.dtype) -> str | None:
    """The index of a sharded directory; None for a single file."""
    if len(plans) == 1:
        return None
    values = sum(math.prod(shape) for plan in plans for shape in plan.tensors.values())
    weight_map = {name: plan.name for plan in plans for name in plan.tensors}
    metadata = {"total_parameters": values, "total_size": values * dtype.itemsize}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def parse_size(text: str) -> int:
    """Bytes that a size such as "5GB" or "200MiB" means.

    Raises:
        ConfigError: not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match.group(2).upper() not in _UNITS or float(match.group(1)) <= 0:
        raise ConfigError(f"{text!r} is no size: give a number with KB, MB, GB, KiB, MiB or GiB, such as 5GB.")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def _module_order(name: str) -> tuple[int, int, int, str]:
    match = _LAYER.fullmatch(name)
    if match is None:
        place = {"model.embed_tokens.weight": 0, "model.norm.weight": 2, "lm_head.weight": 3}[name]
        return (place, 0, 0, "")
    layer, module, kind = match.groups()
    return (1, int(layer), _MODULES.index(module), "0" if kind == "weight" else "1")
