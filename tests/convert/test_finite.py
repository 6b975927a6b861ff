"""Every value of a block is looked at, whatever its dtype."""

from __future__ import annotations

import pytest
import torch

from megalong.convert import finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_value_of_a_block_is_looked_at(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_PIECE", 7)
    info = torch.finfo(dtype)
    values = torch.tensor([0.0, -0.0, info.max, info.min, info.tiny, -1.0] * 5, dtype=dtype)
    data = values.view(torch.uint8).numpy()
    assert finite.all_finite(data, dtype)
    for place in range(len(values)):
        for wrong in (float("nan"), float("inf"), float("-inf")):
            good, values[place] = values[place].clone(), wrong
            assert not finite.all_finite(data, dtype)
            values[place] = good
    assert finite.all_finite(data[:0], dtype)
