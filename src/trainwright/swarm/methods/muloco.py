"""MuLoCo (Thérien et al. 2025, arXiv 2505.23725): DiLoCo whose peers train with Muon.

Muon's updates are of full rank and of one size, so that their sum bears coarser codecs: 2 bits with
error feedback of 0.9 are near-lossless. Nesterov's SGD outside, η 0.8, μ 0.9.
"""

from __future__ import annotations

from trainwright.swarm.methods.diloco import DiLoCo


class MuLoCo(DiLoCo):
    """DiLoCo's exchange; what is inside is the recipe's `optimizer: muon`."""
