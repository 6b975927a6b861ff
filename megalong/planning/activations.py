"""The tensors that one transformer layer makes and keeps, forward and backward, in the order of the real program.

The program is megatron-core's `TransformerLayer` with the local layer spec, our RMSNorm and our attention, run by
eager PyTorch: what an operator saves for backward stays on the tape, what a Python variable holds stays until it goes
out of scope. Against torch's own memory profile this is right to a few percent (tests/planning/test_memory.py).

Sizes: S local tokens, s = S/tp under sequence parallelism, h hidden, q and kv the widths of queries and of keys on
this rank, f the width of the MLP on this rank, e bytes per element. Batch is 1.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from megalong.attention import memory
from megalong.planning.workload import Workload

SAVED, WORKING = "saved activations", "working set"
ATTENTION = "attention buffers"
DOCUMENT = 2048  # tokens of a document, where they are told apart: a judgement


class Tape:
    """Plays allocations in the order in which a program makes them, and remembers the highest point.

    Bytes are booked under a term (what a report calls them), so that the highest point can be taken apart.
    """

    def __init__(self) -> None:
        self.live = 0
        """Bytes held now."""
        self.peak = 0
        """Most bytes held so far."""
        self.at_peak: dict[str, int] = {}
        """Bytes by term when the peak was reached."""
        self._terms: dict[str, int] = defaultdict(int)
        self._tensors: dict[int, tuple[str, int]] = {}
        self._next = 0

    def take(self, term: str, size: float) -> int:
        """Allocate `size` bytes; returns a handle for `drop`."""
        size = int(size)
        self._next += 1
        self._tensors[self._next] = (term, size)
        self._terms[term] += size
        self.live += size
        if self.live > self.peak:
            self.peak = self.live
            self.at_peak = {name: held for name, held in self._terms.items() if held}
        return self._next

    def drop(self, *handles: int) -> None:
        """Release what `take` gave; 0 stands for nothing."""
        for handle in handles:
            if handle:
                term, size = self._tensors.pop(handle)
                self._terms[term] -= size
                self.live -= size

    def move(self, term: str, *handles: int) -> None:
        """Book tensors under another term: working memory that turned out to be kept."""
        for handle in handles:
            if handle:
                old, size = self._tensors[handle]
                self._terms[old] -= size
                self._terms[term] += size
                self._tensors[handle] = (term, size)


@dataclass
class Saved:
    """Handles of what a forward pass keeps for its backward pass, by part of the layer."""

    norms: list[tuple[int, int, int]] = field(default_factory=list)
    """Per norm: (fp32 copy of the input, normed values, output)."""
    mixed_qkv: int = 0
    rotated: list[int] = field(default_factory=list)
    """Queries, keys, and the cosines and sines of both."""
    context: list[int] = field(default_factory=list)
    """Attention output and log-sum-exp."""
    fc1_out: int = 0
    gated: list[int] = field(default_factory=list)
    """silu(gate), up, and their product."""
    residual: int = 0
    """Input of the norm before the MLP."""

    def handles(self) -> list[int]:
        norms = [handle for norm in self.norms for handle in norm]
        return [*norms, self.mixed_qkv, *self.rotated, *self.context, self.fc1_out, *self.gated, self.residual]


class LayerTape:
    """One layer of a workload on a tape."""

    def __init__(self, work: Workload, tape: Tape) -> None:
        self.work, self.tape = work, tape
        self.e, self.tp = work.element_bytes, work.layout.tp
        self.S, self.s = work.local_tokens, work.local_tokens // self.tp
        self.h, self.q, self.kv, self.f = work.model.hidden_size, work.q_width, work.kv_width, work.mlp_width
        self.mixed = work.precision == "bf16"
        self.tile = min(work.mlp_tile or self.S, self.S)
        self.hidden_bytes = self.s * self.h * self.e
        """The hidden state between layers, cut over tensor-parallel ranks."""
        self._attention_peak = memory.peak_bytes(work.cp_comm_type, work.shard, work.layout.cp, work.inner)

    def take(self, size: float, term: str = WORKING) -> int:
        return self.tape.take(term, size)

    def forward(self, keep: bool, context: list[int] | None = None) -> tuple[int, Saved]:
        """One layer forward: handle of the output, and what was kept; the input stays alive.

        Args:
            keep: save for backward; else everything but the output is dropped (and the attention's output and
                log-sum-exp, where the policy keeps them).
            context: the kept output and log-sum-exp of the attention; None: it runs.
        """
        tape, saved = self.tape, Saved(context=context or [])
        norm_out = self.norm_forward(keep, saved)
        attention_out = self._attention_forward(norm_out, keep, saved)
        residual = self._add(attention_out, self.work.model.attention_bias)
        mlp_out = self._tiled_mlp_forward(keep) if self.work.mlp_tile else self._mlp_forward(keep, saved)
        output = self._add(mlp_out, self.work.model.mlp_bias)
        if keep and (self.work.mlp_tile or not self.mixed):
            saved.residual = residual  # fp32: the norm saves its very input; in tiles nothing else is saved
        else:
            tape.drop(residual)
        tape.move(SAVED, *saved.handles())
        return output, saved

    def norm_forward(self, keep: bool, saved: Saved, rows: int | None = None) -> int:
        """RMSNorm of all local rows, or of so many; returns its output."""
        n = (rows or self.s) * self.h
        wide = self.take(4 * n) if self.mixed else 0
        self._briefly(4 * n)
        normed = self.take(4 * n)
        narrow = self.take(2 * n) if self.mixed else normed
        out = self.take(self.e * n)
        if self.mixed:
            self.tape.drop(normed)
        if keep:
            saved.norms.append((wide, narrow, out))
        else:
            self.tape.drop(wide, narrow)
        return out

    def _attention_forward(self, norm_out: int, keep: bool, saved: Saved) -> int:
        tape, e, S = self.tape, self.e, self.S
        mixed = self._column(self.q + 2 * self.kv, self.work.model.attention_bias)
        if not keep:
            tape.drop(norm_out)
        copied = self.take(S * self.q * e) if self.work.shard.kv_heads > 1 else 0
        query, q_tables = self._rotary_forward(self.q)
        key, k_tables = self._rotary_forward(self.kv)
        if not keep:
            tape.drop(*q_tables, *k_tables)
        context, lse = saved.context or self.attention_forward()
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
            tape.drop(mixed, query, key)
            if self.work.keeps_attention:
                saved.context = [context, lse]
            else:
                tape.drop(context, lse)
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

    def _mlp_forward(self, keep: bool, saved: Saved) -> int:
        tape, n = self.tape, self.S * self.f * self.e
        norm_out = self.norm_forward(keep, saved)
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

    def _tiled_mlp_forward(self, again: bool) -> int:
        """`megalong.model.mlp`: nothing but its input is saved; computed again, its output is not."""
        tape, tile = self.tape, self.tile * self.f * self.e
        if again:
            return self.take(self.hidden_bytes)
        normed = self._normed_in_tiles()
        out = self.take(self.S * self.h * self.e)
        self._briefly(2 * tile, tile)
        self._briefly(tile, self.tile * self.h * self.e)
        tape.drop(normed)
        if self.tp == 1:
            return out
        mine = self.take(self.hidden_bytes)
        tape.drop(out)
        return mine

    def _tiled_mlp_backward(self, grad: int, saved: Saved) -> int:
        tape, tile = self.tape, self.tile * self.f * self.e
        whole = self._gathered(grad)
        normed = self._normed_in_tiles()
        through = self.take(self.S * self.h * self.e)
        wide, product = self.take(2 * tile), self.take(tile)
        self._weight_gradient(self.h * self.f)
        tape.drop(product)
        g_product, g_wide = self.take(tile), self.take(2 * tile)
        self._briefly(tile, tile)
        tape.drop(wide, g_product)
        self._weight_gradient(2 * self.f * self.h)
        self._briefly(self.tile * self.h * self.e)
        tape.drop(g_wide, normed)
        mine = self.take(self.hidden_bytes) if self.tp > 1 else 0
        tape.drop(through if mine else 0)
        norm, rows = Saved(), min(self.tile, self.s)
        out = self.norm_forward(True, norm, rows)
        wide, narrow, _ = norm.norms.pop()
        tape.drop(self.norm_backward(out, wide, narrow, rows))
        tape.drop(mine or through, whole, saved.residual)  # added to the residual's gradient in place
        return grad

    def _normed_in_tiles(self) -> int:
        self.tape.drop(self.norm_forward(False, Saved(), min(self.tile, self.s)))
        return self.take(self.hidden_bytes)

    def _briefly(self, *sizes: float) -> None:
        """Tensors that are made one after the other and let go of together."""
        self.tape.drop(*[self.take(size) for size in sizes])

    def _column(self, width: int, bias: bool) -> int:
        """Column-parallel linear; its gathered input lies in megatron's persistent buffer (`communication_buffer`)."""
        out = self.take(self.S * width * self.e)
        if not bias:
            return out
        biased = self.take(self.S * width * self.e)
        self.tape.drop(out)
        return biased

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

    def backward(self, grad: int, saved: Saved) -> int:
        """One layer backward; consumes `grad` (of the output) and `saved`, returns the gradient of the input."""
        mlp = self._tiled_mlp_backward if self.work.mlp_tile else self._mlp_backward
        grad = mlp(grad, saved)
        return self._attention_backward(grad, saved)

    def norm_backward(self, grad: int, wide: int, narrow: int, rows: int | None = None) -> int:
        """RMSNorm backward; consumes the gradient of its output and what it kept, returns that of its input."""
        tape, n = self.tape, (rows or self.s) * self.h
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
        g_input = self._column_backward(g_fc1, 2 * self.f, saved)
        tape.drop(g_input, saved.residual)  # added to the residual's gradient in place
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
        tape.drop(self._column_backward(g_mixed, self.q + 2 * self.kv, saved))
        return grad

    def attention_backward(self) -> tuple[int, int, int]:
        """Core attention backward with its buffers; returns the gradients of queries, keys and values."""
        rows, keys = self.S * self.q * self.e, self.S * self.kv * self.e
        buffers = self.take(self._attention_peak.backward - rows - 2 * keys, ATTENTION)
        scratch = self.take(self._flash_scratch(), ATTENTION)
        grads = self.take(rows), self.take(keys), self.take(keys)
        self.tape.drop(buffers, scratch)
        return grads

    def _flash_scratch(self) -> int:
        work, cp = self.work, self.work.layout.cp
        if work.device == "cpu":
            if cp > work.inner:
                return 0  # a ring's buffers are an upper bound that holds it
            # scores of one thread's block, fp32 and, in bf16 runs, once more
            return min(256, self.S) * min(1024, self.S) * (6 if self.mixed else 4)
        return memory.flash_scratch(
            work.shard,
            keys=self.S * cp // 2 if work.cp_comm_type == "all_gather" and cp > 1 else self.S,
            documents=self.S // DOCUMENT if work.document_mask == "intra" else 1,
            copies=-(-work.multiprocessors // work.shard.heads) if work.deterministic else 1,
        )

    def _rotary_backward(self, grad: int, width: int) -> int:
        n = self.S * width * self.e
        parts = [self.take(n), self.take(n)]
        out = self.take(n)
        self.tape.drop(*parts, grad)
        return out

    def _gathered(self, grad: int) -> int:
        """The whole gradient of a row-parallel output; 0 where nothing has to be gathered."""
        return self.take(self.S * self.h * self.e) if self.tp > 1 else 0

    def _column_backward(self, grad: int, width: int, saved: Saved) -> int:
        """A column-parallel linear and the norm before it; consumes `grad`, returns that of the norm's input."""
        wide, narrow, norm_out = saved.norms.pop()
        whole = self.take(self.S * self.h * self.e)
        own = self.take(self.hidden_bytes) if self.tp > 1 else 0
        self._weight_gradient(width * self.h)
        self.tape.drop(grad, norm_out, whole if own else 0)
        return self.norm_backward(own or whole, wide, narrow)

    def _weight_gradient(self, elements: int) -> None:
        """A weight's gradient until it has been added to the fp32 main gradient (through an fp32 copy on the CPU)."""
        copy = 4 * elements if self.mixed and self.work.device == "cpu" else 0
        self._briefly(elements * self.e, copy)
