"""Which documents are held out: decided by each document's own text, never by its neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainwright.errors import Mistake, UserError


def held_out_below(hashes: Sequence[NDArray[np.uint64]], share: float) -> int:
    """The threshold under which a document's text hash holds it out; 0 holds out nothing.

    A document falls on the same side whichever others come or go, and equal texts fall on the same
    side, so that none is both trained on and held out. Only where a side would be empty does the
    threshold move, just far enough for one text. Raises UserError where there is one text only.
    """
    if share == 0:
        return 0
    everything = np.concatenate(hashes)
    lowest, highest = int(everything.min()), int(everything.max())
    if lowest == highest:
        raise UserError(
            Mistake(
                f"all {len(everything)} documents are equal: none can be held out"
                if len(everything) > 1
                else "there is only one document: none can be held out for validation",
                "write `validation: 0`, or name held-out files: `validation: [FILE]`; a long text "
                "may also be cut into several files",
                key="data.validation",
            )
        )
    threshold = int(share * 2.0**64)
    return min(max(threshold, lowest + 1), highest)
