"""Two partial attentions over disjoint keys become one by their log-sum-exps.

With out_i = softmax(s_i) v_i and lse_i = log sum exp s_i, the attention over both key sets is

    out = out_a + sigmoid(lse_b - lse_a) * (out_b - out_a)        lse = lse_a - logsigmoid(lse_a - lse_b)

which never exponentiates a score and so cannot overflow (a form that does: EasyContext issue 14). It is computed
in fp32 (fp64 for fp64 inputs), in place in the running accumulator, whatever dtype the kernel returns.
"""

from __future__ import annotations

import torch

from megalong.runtime.fused import fused


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of running outputs and gradients for inputs of `dtype`: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@fused
def merge_(out: torch.Tensor, lse: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> None:
    """Add the partial attention (out_b, lse_b) to the running (out, lse), in place.

    Args:
        out: running output [B, H, S, D], accumulation dtype.
        lse: running log-sum-exp [B, H, S], accumulation dtype, finite: a query always sees its own key first.
        out_b: partial output [B, H, S, D], any dtype.
        lse_b: its log-sum-exp [B, H, S].
    """
    lse_b = lse_b.to(lse.dtype)
    out.lerp_(out_b.to(out.dtype), torch.sigmoid(lse_b - lse).unsqueeze(-1))
    lse.sub_(torch.nn.functional.logsigmoid(lse - lse_b))
