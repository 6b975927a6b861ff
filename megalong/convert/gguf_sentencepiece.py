"""Which scores make llama.cpp merge as a SentencePiece tokenizer does?

llama.cpp joins the two neighbours whose joint token has the highest score, whatever they are. A tokenizer.model has the
scores; a tokenizer.json has merges in their order instead, of which the ranks are scores as long as every way to cut a
token in two is among them, as it is in what transformers makes of a tokenizer.model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from google.protobuf.message import DecodeError

from megalong.runtime.errors import CheckpointError
from megalong.runtime.json_file import shown


def from_model(content: bytes, file: Path) -> tuple[list[bytes], list[float], list[int]]:
    """Tokens, scores and types (GGUF's numbers are SentencePiece's) of a tokenizer.model.

    Raises:
        CheckpointError: it is none of SentencePiece's BPE.
    """
    from transformers.utils import sentencepiece_model_pb2_new as sentencepiece  # half a second, for this kind alone

    model = sentencepiece.ModelProto()
    try:
        model.ParseFromString(content)
        readable = len(model.pieces) > 0
    except (DecodeError, ValueError):
        readable = False
    if not readable or model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise CheckpointError(
            f"{file} is not a BPE model of SentencePiece (Llama 3's is tiktoken's). Put the tokenizer.json of the base "
            "model beside it."
        )
    if not model.normalizer_spec.add_dummy_prefix:
        raise CheckpointError(f"{file} has no dummy prefix. Put the tokenizer.json of the base model beside it.")
    return [p.piece.encode() for p in model.pieces], [p.score for p in model.pieces], [p.type for p in model.pieces]


def from_merges(
    tokens: Sequence[str | None], merges: Sequence[Sequence[str]], added: set[str], file: Path
) -> list[float]:
    """The score of every token: minus the rank of the first merge that makes it; 0 for what is not merged.

    Raises:
        CheckpointError: llama.cpp would merge what this tokenizer does not.
    """
    known = {token for token in tokens if token is not None}
    pairs = {(a, b) for a, b in merges}
    ranks: dict[str, int] = {}
    for rank, (a, b) in enumerate(merges):
        ranks.setdefault(a + b, rank)
    for token in known - added:
        for cut in range(1, len(token)):
            a, b = token[:cut], token[cut:]
            if a in known and b in known and (a, b) not in pairs and not _is_byte(token):
                raise CheckpointError(
                    f"{file}: {shown(a)}, {shown(b)} and {shown(token)} are tokens, and the first two never merge: "
                    "these are not SentencePiece's merges, and llama.cpp would merge them. Put the tokenizer.model in "
                    "the place of the tokenizer.json."
                )
    return [float(-ranks[token]) if token in ranks else 0.0 for token in (t or "" for t in tokens)]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
