"""Attention where tp cuts no heads: each worker's own tokens over all that they see.

The stream's cut gives each worker a run of the micro-batch's tokens, counted row by row. Its
queries are those of the run. Where runs are whole rows nothing is sent; elsewhere keys and values
are gathered first (Li et al. 2021, arXiv:2105.13120, without the ring), and each row that the run
touches is attended to by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainwright.comm.collectives import gather
from trainwright.kernels.attention import Mask, attention, attention_mask
from trainwright.models.decoder import Decoder
from trainwright.parallel.tensor import CutStream


class Stretch(NamedTuple):
    """A part of a run: columns `first` … `last` - 1 of rows `row` … `row + rows` - 1."""

    row: int
    rows: int
    first: int
    last: int


def stretches(start: int, tokens: int, columns: int) -> Iterator[Stretch]:
    """The run of `tokens` from token `start`, in rows of `columns`; whole rows stay together."""
    end = start + tokens
    while start < end:
        row, first = divmod(start, columns)
        whole = (end - start) // columns if first == 0 else 0
        last = columns if whole else min(columns, first + end - start)
        yield Stretch(row, max(1, whole), first, last)
        start += max(1, whole) * (last - first)


@dataclass(frozen=True)
class RunMask:
    """What the stretches of a run see; `gathers` says that keys are other workers' as well."""

    columns: int
    gathers: bool
    start: int  # the run's first token
    parts: tuple[tuple[Stretch, Mask | None], ...]


class OwnQueries:
    """Attention of the tokens that `stream` gives this worker."""

    def __init__(self, stream: CutStream) -> None:
        self.stream = stream

    def own(self, table: Tensor, rows: int) -> Tensor:
        """This worker's part of what [rows or 1, sequence, …] has for every token."""
        return self.stream.own(table.expand(rows, *table.shape[1:]))

    def mask(
        self,
        segments: Tensor | None,
        *,
        rows: int,
        sequence: int,
        window: int | None,
        softcap: float | None,
        device: torch.device,
    ) -> RunMask:
        """What `attend` is given; arguments as `attention_mask`'s, of whole rows."""
        workers = self.stream.workers
        tokens = rows * sequence // workers
        start = self.stream.index * tokens
        parts = []
        for part in stretches(start, tokens, sequence):
            seen = None if segments is None else segments[part.row : part.row + part.rows]
            sight = attention_mask(
                None if seen is None else seen[:, : part.last],
                queries=part.last - part.first,
                keys=part.last,
                window=window,
                softcap=softcap,
                device=device,
            )
            parts.append((part, sight))
        return RunMask(sequence, rows % workers != 0, start, tuple(parts))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: RunMask | Mask | None = None,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        """`kernels.attention.attention` of this worker's tokens. Collective where `mask` gathers.

        With a mask that is not from `mask` it is that function itself: while generating, every
        worker has all tokens.
        """
        if not isinstance(mask, RunMask):
            return attention(q, k, v, mask=mask, scale=scale, softcap=softcap)
        rows, _, columns, dim = q.shape
        # [tokens of the run, heads, channels]
        q, k, v = (x.to(v.dtype).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        offset = mask.start
        if mask.gathers:
            k, v = gather(torch.cat([k, v], -1), 0, self.stream.group).split([dim, v.shape[-1]], -1)
            offset = 0
        mixed, taken = [], 0
        for part, sight in mask.parts:
            count = part.rows * (part.last - part.first)
            first = part.row * mask.columns - offset  # the row's first key
            keys = slice(first, first + (part.rows - 1) * mask.columns + part.last)
            own = (q[taken : taken + count], k[keys], v[keys])
            heads = (x.unflatten(0, (part.rows, -1)).transpose(1, 2) for x in own)
            made = attention(*heads, mask=sight, scale=scale, softcap=softcap)
            mixed.append(made.transpose(1, 2).flatten(0, 1))
            taken += count
        return torch.cat(mixed).unflatten(0, (rows, columns)).transpose(1, 2)


def install(part: Decoder, stream: CutStream) -> None:
    """Make every attention of `part`, whose heads are not cut, work on this worker's tokens."""
    part.model.own_queries = queries = OwnQueries(stream)
    for module in part.modules():
        if hasattr(module, "attend"):
            module.attend = queries.attend  # type: ignore[assignment]
