"""How good is the model at each position of the window? Loss by position bucket on held-out sequences."""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megalong.attention.zigzag import local_positions
from megalong.config.schema import Config
from megalong.data.dataset import SequenceDataset
from megalong.data.loader import evaluation_batches
from megalong.evaluation.position import LossByPosition, bucket_edges, bucket_sums
from megalong.runtime import device
from megalong.training.step import losses_of


def evaluate(config: Config, model: list[DistributedDataParallel], data: SequenceDataset) -> LossByPosition:
    """Mean loss per position bucket; every rank calls this and gets the same."""
    length, cp, dp = config.stage.seq_length, config.topology.cp or 1, config.topology.dp or 1
    cp_rank = parallel_state.get_context_parallel_rank()
    edges = bucket_edges(length)
    positions = local_positions(length, cp, cp_rank).to(device.device())

    def reduce(losses_BS: Tensor, mask_BS: Tensor) -> Tensor:
        return bucket_sums(losses_BS, mask_BS, positions, edges)

    batches = evaluation_batches(
        data,
        sequences=config.data.eval_sequences,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=dp,
        cp_rank=cp_rank,
        cp_size=cp,
        document_mask=config.attention.document_mask,
    )
    rounds = -(-config.data.eval_sequences // dp)
    sums = losses_of(config, model, batches, rounds, reduce, (2, len(edges) - 1))
    return LossByPosition.from_sums(sums.cpu(), edges)
