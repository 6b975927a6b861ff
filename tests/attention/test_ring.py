"""The steps of a ring are few tiles, and share the work."""

from megalong.attention import ring


def test_without_documents_every_step_is_one_tile() -> None:
    for size in (1, 2, 8):
        assert all(len(tiles) == 1 for r in range(size) for tiles in ring.plan(64, size, r, None))
