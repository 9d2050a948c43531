"""DisTrO, as Psyche runs it: DeMo with signs alone on the wire, and training goes on meanwhile.

Of each chunk's 4096 coefficients 4 are sent, in 1 bit each with the mean size of those beside them;
β is 0.995. The exchange of a step takes place during the next one (a `delay` of 1), whose gradient
is then of the weights before; what was sent leaves the momentum once the round has taken it in.
"""

from __future__ import annotations

from trainwright.swarm.methods.demo import DeMo


class DisTrO(DeMo):
    """DeMo's exchange; density, bits and delay are its settings."""
