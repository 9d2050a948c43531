"""What is to be trained, as far as its cost depends on it. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from trainwright.models.families import DecoderConfig
from trainwright.planner.beside import Beside
from trainwright.planner.stacks import TRAINWRIGHT, Stack
from trainwright.recipe.schema import Adapter


@dataclass(frozen=True)
class Job:
    """A model and what is done with it, apart from how it is spread.

    `visible_share` is what documents packed into a row leave of its causal square: the sum of
    squared lengths over the square of the row's, 1 for one document a row. `own_passes` are further
    forward passes of the model a step, as its own reference (`planner.beside`). `imbalance` is how
    much more than its share the fullest expert worker gets.
    """

    config: DecoderConfig
    sequence_length: int
    batch_sequences: int
    optimizer: str = "adamw"
    adapter: Adapter | None = None
    beside: Beside | None = None
    own_passes: int = 0
    visible_share: float = 1.0
    imbalance: float = 1.1
    stack: Stack = TRAINWRIGHT

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_sequences * self.sequence_length
