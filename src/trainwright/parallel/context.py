"""Context parallelism: a row's tokens lie on several workers, and attention brings them together.

Everything else in a decoder treats tokens one by one, so attention is all that has to know. Three
ways: `ring` (keys and values travel while others are worked on), `all_gather` (they are gathered
first) and `ulysses` (tokens are exchanged for heads, so that each worker has whole rows of some
heads). The first two order a row's chunks head-tail, see `parallel.ring`; Ulysses cuts it in a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.comm.collectives import exchange, gather
from trainwright.kernels.attention import Mask, attention, attention_mask, slotted_block_mask
from trainwright.kernels.partial_attention import slotted_attention
from trainwright.models.decoder import Decoder
from trainwright.parallel.ring import head_tail_slots, register, ring_attention

METHODS = ("ring", "all_gather", "ulysses")


@dataclass(frozen=True)
class RowMask:
    """What tokens of rows that lie on several workers see of each other."""

    sequence: int
    segments: Tensor | None  # [batch, sequence], whole rows
    window: int | None
    # For Ulysses what `attention` takes with whole rows; on CUDA a flex mask by slots.
    inner: Mask | None = None


class ContextParallel:
    """Rows cut over the workers of a group: who has which columns, and attention over all."""

    def __init__(self, method: str, group: dist.ProcessGroup) -> None:
        if method not in METHODS:
            raise ValueError(f"{method!r} is none of {', '.join(METHODS)}")
        self.method, self.group, self.name = method, group, register(group)
        self.workers, self.worker = dist.get_world_size(group), dist.get_rank(group)

    def slots(self, sequence: int, device: torch.device) -> Tensor:
        """The columns of a row, int64 [sequence / workers], that this worker has, in its order.

        Raises ValueError where `sequence` cannot be cut evenly.
        """
        return self._slots_of(self.worker, sequence, device)

    def mask(
        self,
        segments: Tensor | None,
        *,
        sequence: int,
        window: int | None,
        softcap: float | None,
        device: torch.device,
    ) -> RowMask:
        """What `attend` is given as its mask; arguments as `attention_mask`'s, of whole rows."""
        if window is not None and window >= sequence:
            window = None
        inner = None
        if self.method == "ulysses":
            inner = attention_mask(
                segments,
                queries=sequence,
                keys=sequence,
                window=window,
                softcap=softcap,
                device=device,
            )
        elif device.type == "cuda":
            # Flash kernels know no documents, windows or soft caps; flex attention does.
            plain = segments is None and window is None and softcap is None
            if self.method == "all_gather" or not plain:
                at, behind = self.slots(sequence, device), self._all_slots(sequence, device)
                inner = slotted_block_mask(at, behind, segments, window)
        return RowMask(sequence, segments, window, inner)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: RowMask | Mask | None = None,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        """`kernels.attention.attention` of this worker's columns over whole rows. Collective.

        With a mask that is not from `mask` it is that function itself: generation has whole rows.
        """
        if not isinstance(mask, RowMask):
            return attention(q, k, v, mask=mask, scale=scale, softcap=softcap)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if self.method == "ulysses":
            return self._by_heads(q, k, v, mask, scale, softcap)
        if self.method == "all_gather" or mask.inner is not None:
            return self._gathered(q, k, v, mask, scale, softcap)
        return ring_attention(
            q,
            k,
            v,
            segments=mask.segments,
            window=mask.window,
            scale=scale,
            softcap=softcap,
            group=self.name,
        )

    def _gathered(
        self, q: Tensor, k: Tensor, v: Tensor, mask: RowMask, scale: float, softcap: float | None
    ) -> Tensor:
        """Own queries over gathered keys and values (Llama 3, arXiv:2407.21783, section 3.3.2)."""
        both = gather(torch.cat([k, v], -1), 2, self.group)
        k, v = both.split([k.shape[3], v.shape[3]], -1)
        if mask.inner is not None:
            return attention(q, k, v, mask=mask.inner, scale=scale, softcap=softcap)
        at = self.slots(mask.sequence, q.device)
        behind = self._all_slots(mask.sequence, q.device)
        segments = mask.segments
        return slotted_attention(
            q,
            k,
            v,
            query_slots=at,
            key_slots=behind,
            query_segments=None if segments is None else segments[:, at],
            key_segments=None if segments is None else segments[:, behind],
            window=mask.window,
            scale=scale,
            softcap=softcap,
        )

    def _by_heads(
        self, q: Tensor, k: Tensor, v: Tensor, mask: RowMask, scale: float, softcap: float | None
    ) -> Tensor:
        """Whole rows of some heads (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509).

        Where key-value heads do not divide by the workers, each is repeated until they do, with
        the query heads that it serves shared out among its copies.
        """
        workers, one_each = self.workers, [1] * self.workers
        copies = math.lcm(k.shape[1], workers) // k.shape[1]
        if copies > 1:
            k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        # To each worker its heads of all three, in one message.
        cut = [x.unflatten(1, (workers, -1)).movedim(1, 0) for x in (q, k, v)]
        sent = torch.cat([x.flatten(1) for x in cut], 1)
        received = exchange(sent, one_each, one_each, self.group)
        parts = received.split([x[0].numel() for x in cut], 1)
        q, k, v = (
            # [worker, batch, heads, tokens, channels] to whole rows
            part.view(x.shape).permute(1, 2, 0, 3, 4).flatten(2, 3)
            for part, x in zip(parts, cut, strict=True)
        )
        mixed = attention(q, k, v, mask=mask.inner, scale=scale, softcap=softcap)
        back = exchange(
            mixed.unflatten(2, (workers, -1)).movedim(2, 0), one_each, one_each, self.group
        )
        return back.movedim(0, 1).flatten(1, 2)

    def _slots_of(self, worker: int, sequence: int, device: torch.device) -> Tensor:
        pieces = self.workers if self.method == "ulysses" else 2 * self.workers
        if sequence % pieces:
            raise ValueError(f"rows of {sequence} tokens cannot be cut into {pieces} equal parts")
        tokens = sequence // self.workers
        if self.method == "ulysses":
            return torch.arange(worker * tokens, (worker + 1) * tokens, device=device)
        return head_tail_slots(worker, self.workers, tokens, device)

    def _all_slots(self, sequence: int, device: torch.device) -> Tensor:
        """Of all workers in turn: the order of what is gathered."""
        every = [self._slots_of(worker, sequence, device) for worker in range(self.workers)]
        return torch.cat(every)


def install(part: Decoder, method: str, group: dist.ProcessGroup) -> None:
    """Make `part` take this worker's columns of rows that are cut over `group`.

    With a cache, as in generation, it takes whole rows as before.
    """
    context = ContextParallel(method, group)
    part.model.context = context
    for module in part.modules():
        if hasattr(module, "attend"):
            module.attend = context.attend  # type: ignore[assignment]


@contextmanager
def suspended(parts: Iterable[Decoder]) -> Iterator[None]:
    """Within it `parts` take whole rows, on every worker for itself."""
    contexts = [(part.model, part.model.context) for part in parts]
    try:
        for trunk, _ in contexts:
            trunk.context = None
        yield
    finally:
        for trunk, context in contexts:
            trunk.context = context
