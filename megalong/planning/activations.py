"""Which tensors does one transformer layer make and keep, forward and backward, in the order of the real program?

The program is megatron-core's `TransformerLayer` with the local layer spec, our RMSNorm and our attention, run by
eager PyTorch: what an operator saves for backward stays on the tape, what a Python variable holds stays until it goes
out of scope. Against torch's own memory profile this is right to a few percent (tests/planning/test_memory.py).

Sizes: S local tokens, s = S/tp under sequence parallelism, h hidden, q and kv the widths of queries and of keys on
this rank, f the width of the MLP on this rank, e bytes per element. Batch is 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megalong.attention import memory
from megalong.planning.tape import Tape
from megalong.planning.workload import Workload

SAVED, WORKING = "saved activations", "working set"
ATTENTION = "attention buffers"


@dataclass
class Saved:
    """Handles of what a forward pass keeps for its backward pass, by part of the layer."""

    norm: list[tuple[int, int]] = field(default_factory=list)
    """Per norm: (fp32 copy of the input, normed values)."""
    norm_out: list[int] = field(default_factory=list)
    mixed_qkv: int = 0
    rotated: list[int] = field(default_factory=list)
    """Queries, keys, and the cosines and sines of both."""
    context: list[int] = field(default_factory=list)
    """Attention output and log-sum-exp."""
    fc1_out: int = 0
    gated: list[int] = field(default_factory=list)
    """silu(gate), up, and their product."""

    def handles(self) -> list[int]:
        found = [*self.norm_out, self.mixed_qkv, *self.rotated, *self.context, self.fc1_out, *self.gated]
        for pair in self.norm:
            found += pair
        return found


class LayerTape:
    """One layer of a workload on a tape."""

    def __init__(self, work: Workload, tape: Tape) -> None:
        model, tp = work.model, work.layout.tp
        self.work, self.tape = work, tape
        self.e, self.tp = work.element_bytes, tp
        self.S = work.local_tokens
        self.s = self.S // tp
        self.h = model.hidden_size
        self.q = model.num_attention_heads * model.head_dim // tp
        self.kv = model.num_key_value_heads * model.head_dim // tp
        self.f = model.intermediate_size // tp
        self.mixed = work.precision == "bf16"
        self.several_groups = model.num_key_value_heads // tp > 1

    @property
    def hidden_bytes(self) -> int:
        """The hidden state between layers, cut over tensor-parallel ranks."""
        return self.s * self.h * self.e

    def take(self, size: float, term: str = WORKING) -> int:
        return self.tape.take(term, size)

    # Forward ---------------------------------------------------------------------------------------------------

    def forward(self, hidden: int, keep: bool) -> tuple[int, Saved]:
        """One layer forward.

        Args:
            hidden: handle of the input, which stays alive (the caller drops it).
            keep: save for backward; else everything but the output is dropped.

        Returns:
            handle of the output, and what was kept.
        """
        tape, saved = self.tape, Saved()
        norm_out = self.norm_forward(keep, saved)
        attention_out = self._attention_forward(norm_out, keep, saved)
        residual = self._add(attention_out, self.work.model.attention_bias)
        norm_out = self.norm_forward(keep, saved)
        mlp_out = self._mlp_forward(norm_out, keep, saved)
        output = self._add(mlp_out, self.work.model.mlp_bias)
        if self.mixed or not keep:
            tape.drop(residual)
        else:
            saved.gated.append(residual)  # fp32: the norm saves its very input
        tape.move(SAVED, *saved.handles())
        return output, saved

    def norm_forward(self, keep: bool, saved: Saved) -> int:
        """RMSNorm; returns its output."""
        n = self.s * self.h
        wide = self.take(4 * n) if self.mixed else 0
        squares = self.take(4 * n)
        self.tape.drop(squares)
        normed = self.take(4 * n)
        narrow = self.take(2 * n) if self.mixed else normed
        out = self.take(self.e * n)
        if self.mixed:
            self.tape.drop(normed)
        if keep:
            saved.norm.append((wide, narrow))
            saved.norm_out.append(out)
        else:
            self.tape.drop(wide, narrow)
        return out

    def _attention_forward(self, norm_out: int, keep: bool, saved: Saved) -> int:
        tape, e, S = self.tape, self.e, self.S
        mixed = self._column(self.q + 2 * self.kv, self.work.model.attention_bias)
        if not keep:
            tape.drop(norm_out)
        copied = self.take(S * self.q * e) if self.several_groups else 0
        query, q_tables = self._rotary_forward(self.q)
        key, k_tables = self._rotary_forward(self.kv)
        if not keep:
            tape.drop(*q_tables, *k_tables)
        context, lse = self.attention_forward()
        again = self.work.recompute == "selective"
        if again:
            tape.drop(lse)
            lse = 0
        trades_heads = self.work.inner > 1 and self.work.layout.cp > 1
        if keep:
            if trades_heads and not again:
                # kept as other ranks' tokens of this rank's heads, packed; the tensors before the exchange are not
                packed = self.take(S * (self.q + 2 * self.kv) * e)
                saved.rotated = [packed, self.take(S * self.q * e), *q_tables, *k_tables]
                tape.drop(mixed, query, key)
            else:
                saved.mixed_qkv = mixed
                saved.rotated = [query, key, *q_tables, *k_tables]
            saved.context = [context, lse]
        projected = self._row()
        tape.drop(copied)
        if not keep:
            tape.drop(mixed, query, key, context, lse)
        return projected

    def _rotary_forward(self, width: int) -> tuple[int, list[int]]:
        tape, n = self.tape, self.S * width * self.e
        tables = [self.take(self.S * self.work.model.head_dim * self.e) for _ in range(2)]
        first = self.take(n)
        rotated = self.take(n)
        second = self.take(n)
        tape.drop(rotated)
        total = self.take(n)
        tape.drop(first, second)
        out = self.take(n)  # concatenated with the (empty) part that is not rotated
        tape.drop(total)
        return out, tables

    def attention_forward(self) -> tuple[int, int]:
        """Core attention forward with its buffers; returns output and log-sum-exp."""
        out_bytes, lse_bytes = self.S * self.q * self.e, 4 * self.S * self.work.shard.heads
        buffers = self.take(self._attention_peak.forward - out_bytes - lse_bytes, ATTENTION)
        out, lse = self.take(out_bytes), self.take(lse_bytes)
        self.tape.drop(buffers)
        return out, lse

    @property
    def _attention_peak(self) -> memory.Peak:
        work = self.work
        return memory.peak_bytes(work.cp_comm_type, work.shard, work.layout.cp, work.inner)

    def _mlp_forward(self, norm_out: int, keep: bool, saved: Saved) -> int:
        tape, n = self.tape, self.S * self.f * self.e
        fc1_out = self._column(2 * self.f, self.work.model.mlp_bias)
        if not keep:
            tape.drop(norm_out)
        gate, up = self.take(n), self.take(n)
        product = self.take(n)
        if keep:
            saved.fc1_out = fc1_out
            saved.gated += [gate, up, product]
        else:
            tape.drop(gate, up, fc1_out)
        out = self._row()
        if not keep:
            tape.drop(product)
        return out

    def _column(self, width: int, bias: bool) -> int:
        """Column-parallel linear; its gathered input lies in megatron's persistent buffer (`communication_buffer`)."""
        out = self.take(self.S * width * self.e)
        if bias:
            biased = self.take(self.S * width * self.e)
            self.tape.drop(out)
            out = biased
        return out

    def _row(self) -> int:
        """Row-parallel linear: whole output, then this rank's slice of the sum."""
        whole = self.take(self.S * self.h * self.e)
        if self.tp == 1:
            return whole
        out = self.take(self.hidden_bytes)
        self.tape.drop(whole)
        return out

    def _add(self, branch: int, bias: bool) -> int:
        biased = self.take(self.hidden_bytes) if bias else 0
        out = self.take(self.hidden_bytes)
        self.tape.drop(branch, biased)
        return out

    # Backward --------------------------------------------------------------------------------------------------

    def backward(self, grad: int, saved: Saved) -> int:
        """One layer backward; consumes `grad` (of the output) and `saved`, returns the gradient of the input."""
        grad = self._mlp_backward(grad, saved)
        return self._attention_backward(grad, saved)

    def norm_backward(self, grad: int, saved: Saved) -> int:
        """RMSNorm backward; consumes the gradient of its output, returns that of its input."""
        tape, n = self.tape, self.s * self.h
        wide, narrow = saved.norm.pop()
        products = self.take(self.e * n)
        gradient = self.take(self.e * n)
        tape.drop(products, grad, narrow)
        if self.mixed:
            gradient, old = self.take(4 * n), gradient
            tape.drop(old)
        direct = self.take(4 * n)
        products = self.take(4 * n)
        tape.drop(products, gradient)
        through_mean = [self.take(4 * n) for _ in range(4)]
        tape.drop(*through_mean, wide)
        if not self.mixed:
            return direct
        out = self.take(2 * n)
        tape.drop(direct)
        return out

    def _mlp_backward(self, grad: int, saved: Saved) -> int:
        tape, n = self.tape, self.S * self.f * self.e
        residual = saved.gated.pop() if not self.mixed else 0
        gate, up, product = saved.gated
        whole = self._gathered(grad)
        g_product = self.take(n)
        self._weight_gradient(self.h * self.f)
        tape.drop(whole, product)
        g_gate, g_up = self.take(n), self.take(n)
        tape.drop(g_product, gate, up)
        g_silu = self.take(n)
        tape.drop(g_gate, saved.fc1_out)
        g_fc1 = self.take(2 * n)
        tape.drop(g_silu, g_up)
        g_norm = self._column_backward(g_fc1, 2 * self.f, saved.norm_out.pop())
        g_input = self.norm_backward(g_norm, saved)
        tape.drop(g_input, residual)  # added to the residual's gradient in place
        return grad

    def _attention_backward(self, grad: int, saved: Saved) -> int:
        tape, e, S = self.tape, self.e, self.S
        whole = self._gathered(grad)
        g_context = self.take(S * self.q * e)
        self._weight_gradient(self.h * self.q)
        tape.drop(whole)
        if self.work.recompute == "selective":
            saved.context += self.attention_forward()
        g_query, g_key, g_value = self.attention_backward()
        tape.drop(g_context, *saved.context, *saved.rotated[:2], saved.mixed_qkv)
        g_query = self._rotary_backward(g_query, self.q)
        g_key = self._rotary_backward(g_key, self.kv)
        tape.drop(*saved.rotated[2:])
        g_mixed = self.take(S * (self.q + 2 * self.kv) * e)
        tape.drop(g_query, g_key, g_value)
        g_norm = self._column_backward(g_mixed, self.q + 2 * self.kv, saved.norm_out.pop())
        g_input = self.norm_backward(g_norm, saved)
        tape.drop(g_input)
        return grad

    def attention_backward(self) -> tuple[int, int, int]:
        """Core attention backward with its buffers; returns the gradients of queries, keys and values."""
        rows, keys = self.S * self.q * self.e, self.S * self.kv * self.e
        buffers = self.take(self._attention_peak.backward - rows - 2 * keys, ATTENTION)
        scratch = self._kernel_scratch(self.S * self.q)
        grads = self.take(rows), self.take(keys), self.take(keys)
        self.tape.drop(buffers, scratch)
        return grads

    def _kernel_scratch(self, rows: int) -> int:
        """CUDA flash attention's own: an fp32 dQ, and dK and dV of every query head before they are summed."""
        if self.work.device != "cuda":
            return 0
        repeated = 2 * rows * self.e if self.q != self.kv else 0
        return self.take(4 * rows + repeated, ATTENTION)

    def _rotary_backward(self, grad: int, width: int) -> int:
        n = self.S * width * self.e
        parts = [self.take(n), self.take(n)]
        out = self.take(n)
        self.tape.drop(*parts, grad)
        return out

    def _gathered(self, grad: int) -> int:
        """The whole gradient of a row-parallel output; 0 where nothing has to be gathered."""
        return self.take(self.S * self.h * self.e) if self.tp > 1 else 0

    def _column_backward(self, grad: int, width: int, norm_out: int) -> int:
        whole = self.take(self.S * self.h * self.e)
        own = self.take(self.hidden_bytes) if self.tp > 1 else 0
        self._weight_gradient(width * self.h)
        self.tape.drop(grad, norm_out)
        if self.tp == 1:
            return whole
        self.tape.drop(whole)
        return own

    def _weight_gradient(self, elements: int) -> None:
        """A weight's gradient until it has been added to the fp32 main gradient (through an fp32 copy on the CPU)."""
        gradient = self.take(elements * self.e)
        copy = self.take(4 * elements) if self.mixed and self.work.device == "cpu" else 0
        self.tape.drop(gradient, copy)
