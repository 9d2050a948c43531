"""SparseLoCo (Sarfi et al. 2025, arXiv 2508.15706): DiLoCo with few values and a memory for them.

    e ← β e + Δ;  q = Q(top-k of e in chunks);  e ← e − q;  θ ← θ − α mean_i(q_i)

Error feedback takes the place of the outer momentum. Defaults: 64 values of each chunk of 4096, in
2 bits, β 0.95, α 1. The mean is over all peers, as in the paper's formula: what one peer alone has
sent counts for one peer's share (the released code divides by the peers that chose a value).
"""

from __future__ import annotations

from trainwright.swarm.methods.diloco import DiLoCo


class SparseLoCo(DiLoCo):
    """DiLoCo's exchange; codec, feedback and a momentum of 0 are its settings."""
