"""What a model can do with a long window: loss by position, and its plots."""

from megalong.evaluation.position import LossByPosition, bucket_edges, bucket_sums
from megalong.evaluation.results import StageEvaluation, read_evaluation

__all__ = ["LossByPosition", "StageEvaluation", "bucket_edges", "bucket_sums", "read_evaluation"]
