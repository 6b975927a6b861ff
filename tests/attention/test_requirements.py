"""What cannot run is refused before any process group exists, and the text names what can."""

import pytest

from megalong.attention import check
from megalong.config.schema import AttentionConfig
from megalong.runtime.errors import ConfigError, LayoutError


@pytest.mark.parametrize(
    ("algorithm", "sizes", "kv_heads", "cp"),
    [
        ("p2p", None, 1, 512),
        ("all_gather", None, 1, 8),
        ("a2a", None, 8, 8),
        ("a2a", None, 8, 4),
        ("a2a+p2p", [8, 4], 8, 32),
        ("a2a+p2p", [2, 4], 2, 8),
    ],
)
def test_what_fits_passes(algorithm: str, sizes: list[int] | None, kv_heads: int, cp: int) -> None:
    check(AttentionConfig(cp_comm_type=algorithm, hierarchical_context_parallel_sizes=sizes), kv_heads, cp)


@pytest.mark.parametrize(
    ("algorithm", "sizes", "kv_heads", "cp", "said"),
    [
        ("a2a", None, 2, 8, r"2 key-value heads.*a2a\+p2p .*=\[2,4\]"),
        ("a2a", None, 1, 4, r"cp_comm_type=p2p\.$"),
        ("a2a", None, 8, 3, "p2p"),
        ("a2a+p2p", None, 8, 16, r"for example \[8,2\]"),
        ("a2a+p2p", [2, 2], 8, 16, "a\\*r = cp = 16"),
        ("a2a+p2p", [4, 2], 2, 8, r"=\[2,4\]"),
        ("a2a+p2p", [2, 2, 2], 8, 8, r"\[a,r\]"),
    ],
)
def test_heads_or_ranks_that_do_not_fit_are_refused_with_an_alternative(
    algorithm: str, sizes: list[int] | None, kv_heads: int, cp: int, said: str
) -> None:
    with pytest.raises(LayoutError, match=said):
        check(AttentionConfig(cp_comm_type=algorithm, hierarchical_context_parallel_sizes=sizes), kv_heads, cp)


@pytest.mark.parametrize(
    "wrong", [{"cp_comm_type": "ring"}, {"document_mask": "all"}, {"grad_wire_dtype": "bf16"}, {"kernel": "flash3"}]
)
def test_unknown_words_are_refused_with_the_known_ones(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="choose one of"):
        check(AttentionConfig(**wrong), 8, 1)  # type: ignore[arg-type]
