"""One call for many tensors."""

from __future__ import annotations

from typing import Any


def multi_tensor_applier(op: Any, noop_flag_buffer: Any, tensor_lists: Any, *args: Any) -> Any:
    """The operator on all tensors."""
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)
