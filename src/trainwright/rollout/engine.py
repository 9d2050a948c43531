"""Generation: prompts in, texts out, batched or streamed, with a key-value cache.

A prompt's continuation is the same whichever prompts stand beside it: rows are padded on the left,
out of sight of attention, and each draws from its own generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from trainwright.errors import Mistake, UserError
from trainwright.models.cache_rows import put_rows
from trainwright.models.fallback import FallbackModel
from trainwright.models.output_head import OutputHead
from trainwright.rollout.sampling import SamplingParams, choose
from trainwright.rollout.text import Detokenizer, StopScanner

Prompt = str | Sequence[int]
PADDING = -1
_RESERVED = 256  # new tokens that a cache has room for from the start, at most


class Model(Protocol):
    """What generates: a `Decoder`, a `FallbackModel`, or a pipeline called like one."""

    pads_left: bool
    max_positions: int | None
    stop_token_ids: tuple[int, ...]

    @property
    def refill_lengths(self) -> frozenset[int]:
        """Lengths past which a cache is void."""

    def new_cache(self, capacity: int = 256) -> Any:
        """An empty key-value cache."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights, which say on which device they are."""

    def __call__(self, input_ids: Tensor, **options: Any) -> Any:
        """As `Decoder.forward`."""


@dataclass(frozen=True)
class Completion:
    """A continuation. `token_ids` are all tokens generated, the one that ended the text included.

    `text` has no special tokens and no stop string. `finish_reason` is "stop" where the model or a
    stop string ended it, "length" where there was no more room.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


def generate(
    model: Model,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    params: SamplingParams | None = None,
    *,
    batch_rows: int = 32,
    device: torch.device | None = None,
    agree: Callable[[list[int]], list[int]] | None = None,
) -> list[Completion]:
    """Continue every prompt (a text, or token ids as they are), in the order given.

    `batch_rows` prompts go through the model at once; prompts of like length go together. The same
    seed gives the same completions. `device` is where the model computes, if not where its weights
    rest; `agree` makes workers that generate together go on with the same tokens. Raises UserError
    for an empty prompt to a tokenizer without a BOS, and for a prompt that leaves no room in the
    model's context.
    """
    params = params or SamplingParams()
    rows = [Row(model, tokenizer, prompt, params, number) for number, prompt in enumerate(prompts)]
    for batch in _batches(rows, batch_rows, mixed=model.pads_left):
        generation = Generation(model, batch, device, agree)
        while not generation.finished:
            generation.step()
    return [row.completion() for row in rows]


def stream(
    model: Model, tokenizer: Any, prompt: Prompt, params: SamplingParams | None = None
) -> Iterator[str]:
    """The continuation of one prompt in pieces of whole characters, as they come.

    Joined, they are `generate`'s text; raises as it does.
    """
    params = params or SamplingParams()
    row = Row(model, tokenizer, prompt, params, 0)
    generation = Generation(model, [row])
    while not generation.finished:
        (piece,) = generation.step()
        if piece:
            yield piece


class Row:
    """One prompt on its way: its tokens, its text, its randomness.

    Rows of the same prompt and seed are told apart by their `number`. Raises UserError for an empty
    prompt to a tokenizer without a BOS, and where the model's context has no room for an answer.
    """

    def __init__(
        self, model: Model, tokenizer: Any, prompt: Prompt, params: SamplingParams, number: int
    ) -> None:
        self.prompt, self.params = encode(tokenizer, prompt), params
        self.room = params.max_new_tokens
        limit = model.max_positions
        if limit is not None:
            self.room = min(self.room, limit - len(self.prompt))
            if self.room < 1:
                what = f"a prompt has {len(self.prompt)} tokens, the model's context only {limit}"
                raise UserError(what, "shorten the prompt")
        self.ends = {*model.stop_token_ids, tokenizer.eos_token_id}
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.reason: Literal["stop", "length"] | None = None
        self.detokenizer = Detokenizer(tokenizer, self.prompt)
        self.scanner = StopScanner(params.stop)
        self.generator = torch.Generator().manual_seed((params.seed * 1_000_003 + number) % 2**63)

    def add(self, token: int) -> str:
        """Take the next token; the text that it settles."""
        self.tokens.append(token)
        ended = token in self.ends
        text = self.detokenizer.flush() if ended else self.detokenizer.add(token)
        full = not ended and len(self.tokens) == self.room
        if full:
            text += self.detokenizer.flush()
        shown, stopped = self.scanner.add(text)
        if stopped or ended:
            self.reason = "stop"
        elif full:
            self.reason = "length"
        if self.reason is not None and not stopped:
            shown += self.scanner.flush()
        self.pieces.append(shown)
        return shown

    def completion(self) -> Completion:
        assert self.reason is not None
        return Completion("".join(self.pieces), tuple(self.tokens), self.reason)


class Generation:
    """A batch of rows going through the model, one token a step; others may join on their way."""

    def __init__(
        self,
        model: Model,
        rows: Sequence[Row],
        device: torch.device | None = None,
        agree: Callable[[list[int]], list[int]] | None = None,
    ) -> None:
        self.model, self.rows = model, list(rows)
        self.device = device or next(model.parameters()).device
        self.agree = agree
        self.sequences = [list(row.prompt) for row in rows]
        self.cache: Any = None
        # Rows with padding say at every step which tokens are theirs; others go the faster way.
        self.padded = any(self.pads)

    @property
    def finished(self) -> bool:
        return all(row.reason is not None for row in self.rows)

    @property
    def pads(self) -> list[int]:
        """How many tokens of padding stand before each row's own."""
        longest = max(map(len, self.sequences))
        return [longest - len(sequence) for sequence in self.sequences]

    def keep(self, chosen: Sequence[int], newcomers: Sequence[Generation] = ()) -> None:
        """Go on with these rows alone, by their numbers, and with all rows of the newcomers.

        All generations are of one model that `pads_left`, and have made a step at least.
        """
        parts = [(self, list(chosen)), *((other, range(len(other.rows))) for other in newcomers)]
        rows = [part.rows[i] for part, numbers in parts for i in numbers]
        sequences = [part.sequences[i] for part, numbers in parts for i in numbers]
        held = [len(sequence) - 1 for sequence in sequences]  # the newest is not in the cache yet
        cache = self._new_cache(sequences, rows)
        put_rows(cache, [(part.cache, numbers) for part, numbers in parts], held)
        self.rows, self.sequences, self.cache, self.padded = rows, sequences, cache, True

    @torch.no_grad()
    def step(self) -> list[str]:
        """One more token for every row; the text that each row's token settled.

        Rows that are finished go along, unread, until all are.
        """
        # Compiled blocks would be compiled anew for every length.
        with torch.compiler.set_stance("force_eager"):
            logits = self._logits()
        pieces = []
        newest = self._choose(logits)
        if self.agree is not None:
            newest = self.agree(newest)
        for row, sequence, token in zip(self.rows, self.sequences, newest, strict=True):
            sequence.append(token)
            pieces.append(row.add(token) if row.reason is None else "")
        return pieces

    def _choose(self, logits: Tensor) -> list[int]:
        """The next token of each row; at once where all are sampled alike."""
        first = self.rows[0].params
        if all(row.params == first for row in self.rows):
            return choose(logits, first, [row.generator for row in self.rows])
        single = zip(logits.split(1), self.rows, strict=True)
        return [choose(own, row.params, [row.generator])[0] for own, row in single]

    def _new_cache(self, sequences: list[list[int]], rows: Sequence[Row]) -> Any:
        most = min(_RESERVED, max(row.room - len(row.tokens) for row in rows))
        return self.model.new_cache(max(map(len, sequences)) + most)

    def _logits(self) -> Tensor:
        """Logits [rows, vocabulary] after the sequences, all but the first time from the cache."""
        new, pads = 1, self.pads
        if self.cache is None or any(
            len(sequence) - 1 in self.model.refill_lengths for sequence in self.sequences
        ):
            self.cache = self._new_cache(self.sequences, self.rows)
            new, self.padded = pads[0] + len(self.sequences[0]), any(pads)
        parts = [sequence[-new:] for sequence in self.sequences]
        columns = [[0] * (new - len(part)) + part for part in parts]
        input_ids = torch.tensor(columns, device=self.device)
        if isinstance(self.model, FallbackModel):
            return self.model(input_ids, cache=self.cache)[:, -1]
        positions = segments = None
        if self.padded:
            ends = torch.tensor([len(sequence) for sequence in self.sequences], device=self.device)
            positions = ends[:, None] + torch.arange(-new, 0, device=self.device)
            segments = torch.where(positions < 0, PADDING, 0)
            positions = positions.clamp(min=0)
        return self.model(
            input_ids,
            position_ids=positions,
            segment_ids=segments,
            cache=self.cache,
            head=_last_logits,
        )


def _last_logits(hidden: Tensor, head: OutputHead) -> Tensor:
    return head.logits(hidden[:, -1])


def encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """A prompt's tokens; an empty text is begun by the tokenizer's BOS."""
    tokens = list(tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
    if not tokens and tokenizer.bos_token_id is not None:
        tokens = [tokenizer.bos_token_id]
    if not tokens:
        fix = "give it at least one character: the tokenizer has no token to begin a text with"
        raise UserError(Mistake("a prompt is empty", fix))
    return tokens


def _batches(rows: Sequence[Row], size: int, *, mixed: bool) -> Iterator[list[Row]]:
    """The rows in batches of at most `size`, of like lengths, or of one length if not `mixed`."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row.prompt)):
        other = bool(batch) and not mixed and len(batch[0].prompt) != len(row.prompt)
        if len(batch) == size or other:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
