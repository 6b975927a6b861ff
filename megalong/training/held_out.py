"""What is the loss along the window on held-out sequences, in the layout of training, each sequence by itself?"""

from __future__ import annotations

import itertools

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megalong.attention.zigzag import local_positions
from megalong.data.loader import evaluation_batches
from megalong.data.windows import Part
from megalong.evaluation.position import LossByPosition, bucket_edges, bucket_sums
from megalong.run import Run
from megalong.runtime import device
from megalong.training.forward import losses_of


def evaluate(run: Run, model: list[DistributedDataParallel], part: Part) -> LossByPosition:
    """Mean loss per position bucket of the part's window; every rank calls this and gets the same."""
    layout, samples = run.layout, run.config.data.eval_sequences
    cp_rank = parallel_state.get_context_parallel_rank()
    edges = bucket_edges(part.window)
    positions = local_positions(run.seq_length, layout.cp, cp_rank).to(device.device()) % part.window
    dp_rank, turns = parallel_state.get_data_parallel_rank(), itertools.count()
    rounds = -(-min(samples * part.rows, len(part.dataset)) // (part.rows * layout.dp))

    def reduce(losses_BS: Tensor, mask_BS: Tensor) -> Tensor:
        sums = losses_BS.new_zeros((rounds * layout.dp, 2, len(edges) - 1), dtype=torch.float64)
        sums[next(turns) * layout.dp + dp_rank] = bucket_sums(losses_BS, mask_BS, positions, edges)
        return sums

    batches = evaluation_batches(
        part,
        samples=samples,
        dp_rank=dp_rank,
        dp_size=layout.dp,
        cp_rank=cp_rank,
        cp_size=layout.cp,
        document_mask=run.config.attention.document_mask,
    )
    sums = losses_of(run.seq_length, model, batches, rounds, reduce, (rounds * layout.dp, 2, len(edges) - 1))
    return LossByPosition.from_sums(sums.cpu(), edges)
