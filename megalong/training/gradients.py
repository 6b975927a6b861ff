"""The gradient of every parameter under its Hugging Face name, whatever the layout.

After a backward pass each data- and context-parallel rank holds the reduced gradient of its own shard only, cut once
more by tensor and pipeline parallelism. This puts them together, for proofs that a layout computes what one rank does.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megalong.convert.parameters import entry_of_parameter
from megalong.convert.table import merge_shards, to_hf
from megalong.run import Run


def full_gradients(run: Run, model: list[DistributedDataParallel]) -> dict[str, Tensor]:
    """Whole gradients [HF shapes] fp32 on the CPU, by Hugging Face name; every rank calls this.

    Returns:
        all of them on rank 0, an empty dict elsewhere.
    """
    _gather_shards(model)
    llama = run.model
    per_stage = llama.num_hidden_layers // run.layout.pp
    first_layer = parallel_state.get_pipeline_model_parallel_rank() * per_stage
    tp_group = parallel_state.get_tensor_model_parallel_group()
    found: dict[str, Tensor] = {}
    for name, parameter in model[0].module.named_parameters():
        entry = entry_of_parameter(llama, name, first_layer)
        assert entry is not None, name
        grad = parameter.main_grad.float().contiguous()  # type: ignore[attr-defined]
        shards = [torch.empty_like(grad) for _ in range(tp_group.size())]
        dist.all_gather(shards, grad, group=tp_group)
        found |= {k: v.cpu() for k, v in to_hf(entry, merge_shards(entry, shards)).items()}
    return _gather_pipeline(found)


def _gather_shards(model: list[DistributedDataParallel]) -> None:
    """Undo the reduce-scatter: every rank of a data- and context-parallel group gets the whole buffer."""
    for chunk in model:
        for group in chunk.bucket_groups:
            ranks, rank = (
                group.intra_distributed_optimizer_instance_size,
                group.intra_distributed_optimizer_instance_rank,
            )
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(ranks)[rank].clone()
                dist.all_gather_into_tensor(
                    bucket.grad_data, shard, group=group.intra_distributed_optimizer_instance_group
                )


def _gather_pipeline(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    group = parallel_state.get_pipeline_model_parallel_group()
    parts: list[dict[str, Tensor]] = [{} for _ in range(group.size())]
    dist.all_gather_object(parts, mine, group=group)
    merged = {name: grad for part in parts for name, grad in part.items()}
    return merged if dist.get_rank() == 0 else {}
