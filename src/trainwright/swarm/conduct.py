"""What the contributions of a round give away about those who sent them, without any data.

Deterministic tests on what was decided, equal bit for bit on all peers:

- "zero", "too large": a length far from the median one.
- "stale": equal, or all but equal, to a contribution of an earlier round.
- "copy": two of one round equal each other, or all but. Who copied whom cannot be seen here.
- "random": no correlation with the others beyond chance, while these agree among themselves.
- "reversed": as strong a correlation as theirs, but negative.

The threshold of chance: if the signs of a vector v say nothing of u, then z = Σvu / √(Σv²u²) is
over 4 with probability below exp(-4²/2) = 0.03 %, whatever the two look like (Hoeffding 1963). u is
the sum of the others' directions.

"Random" and "reversed" are no proof: near its end a run is a balance of peers whose data pulls in
different directions, and then an honest peer with data unlike the others' looks just so. The ledger
counts these only where the contribution was also of no use on its own data.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from trainwright.swarm.methods.method import Received
from trainwright.swarm.sums import dot, fold, norm, total

NEAR = 0.01  # of the common distance of directions: what is closer is a copy
CHANCE = 4.0  # z of a vector that says something of the others
AGREED = 2 * CHANCE  # z of the others among themselves, for a test of one against them
REVERSED = -0.5  # correlation, in parts of that among the others
TOO_LARGE = 100.0  # times the median length
ZERO = 1e-4  # times the median length
_FEWEST = 32  # values from which closeness says something

Sketch = tuple[float, ...]  # 128 values, fp32 each, of unit length in all
Sketches = Mapping[str, Sketch]


@dataclass(frozen=True)
class Finding:
    """What a contribution gave away: its `kind` above, and a sentence for people.

    `twin` is the peer that it equals, of round `of`; `exact` if bit for bit.
    """

    peer: str
    kind: str
    what: str
    twin: str = ""
    of: int = -1
    exact: bool = False


def sketches_of(received: Sequence[Received]) -> dict[str, Sketch]:
    """128 values by peer, for comparing directions after the contributions are gone.

    Sums of the values with random signs: distances and angles stay what they were, give or take an
    eighth (Johnson-Lindenstrauss). Contributions that are zero have none.
    """
    if not received:
        return {}
    signs = _signs(len(received[0].values))
    found = {}
    for each in received:
        sums = fold(lambda values, sign: values * sign, each.values, signs)
        length = math.sqrt(math.fsum(sums.square().tolist()))
        if length > 0:
            found[each.peer] = tuple(sums.div(length).float().tolist())
    return found


def examine(
    received: Sequence[Received], sketches: Sketches, earlier: Mapping[int, Sketches]
) -> list[Finding]:
    """Everything found of a round's contributions, at most one finding of a peer but for copies.

    `sketches` are those of this round, `earlier` those of rounds before it, of the same fragment.
    """
    received = sorted(received, key=lambda each: each.peer)
    lengths = {each.peer: norm(each.values) for each in received}
    findings = wrong_lengths(lengths)
    apart = {each.peer for each in findings}
    if received and len(received[0].values) >= _FEWEST:
        findings += stale(_without(sketches, apart), earlier)
        apart = {each.peer for each in findings}
        findings += copies(_without(sketches, apart))
    copied = {each.peer for each in findings if each.kind == "copy" and each.peer > each.twin}
    vectors = {
        each.peer: each.values
        for each in received
        if each.peer not in apart | copied and lengths[each.peer] > 0
    }
    return findings + against_the_others(vectors, lengths)


def wrong_lengths(lengths: Mapping[str, float]) -> list[Finding]:
    """Contributions that are zero, or far longer than the median one."""
    middle = statistics.median(lengths.values()) if lengths else 0.0
    findings = []
    for peer, length in lengths.items():
        if length < ZERO * middle:
            what = f"its norm is {length:.3g}, the median {middle:.3g}: it changes nothing"
            findings.append(Finding(peer, "zero", what))
        elif middle > 0 and length > TOO_LARGE * middle:
            what = f"its norm is {length:.3g}, {length / middle:.0f} times the median"
            findings.append(Finding(peer, "too large", what))
    return findings


def stale(sketches: Sketches, earlier: Mapping[int, Sketches]) -> list[Finding]:
    """Contributions that are those of an earlier round again, their own or another's.

    The measure of how close is too close: how far the others are from that contribution or, where
    it is the peer's own, how far they are from their own of that round.
    """
    findings = []
    for peer, mine in sketches.items():
        for round, past in sorted(earlier.items(), reverse=True):
            hits = []
            for author, theirs in sorted(past.items()):
                others = [
                    _apart(each, past[other] if author == peer else theirs)
                    for other, each in sketches.items()
                    if other not in (peer, author) and (author != peer or other in past)
                ]
                if _too_close(mine, theirs, others):
                    hits.append((author, mine == theirs))
            if hits:
                author, exact = max(hits, key=lambda hit: (hit[1], hit[0] == peer))
                whose = "its own" if author == peer else f"that of {author}"
                how = "equal to" if exact else "all but equal to"
                what = f"it is {how} {whose} of round {round}"
                findings.append(Finding(peer, "stale", what, author, round, exact))
                break
    return findings


def copies(sketches: Sketches) -> list[Finding]:
    """Pairs that are equal or all but: a finding of each of the two."""
    distances = {pair: _apart(sketches[pair[0]], sketches[pair[1]]) for pair in _pairs(sketches)}
    findings = []
    for (one, other), distance in distances.items():
        rest = [each for pair, each in distances.items() if pair != (one, other)]
        if _too_close(sketches[one], sketches[other], rest):
            exact = distance == 0
            how = "equal to" if exact else f"all but equal to (correlation {1 - distance:.6f})"
            for peer, twin in ((one, other), (other, one)):
                findings.append(
                    Finding(peer, "copy", f"it is {how} that of {twin}", twin, -1, exact)
                )
    return findings


def against_the_others(
    vectors: Mapping[str, Tensor], lengths: Mapping[str, float]
) -> list[Finding]:
    """Those whose direction has nothing of the others', or is opposite to it.

    The farthest out is tried first, then taken out before the next: a liar's vector spoils the sum
    that the honest are held against. With fewer than three there are no others that agree.
    """
    findings, left = list[Finding](), dict(vectors)
    while len(left) > 2:
        scores = _agreement(left, lengths)
        suspect = min(scores, key=lambda peer: (scores[peer], peer))
        z, correlation = scores[suspect]
        if z >= CHANCE:
            break
        del left[suspect]
        among = _agreement(left, lengths).values()
        common = statistics.median(each for _, each in among)
        if statistics.median(each for each, _ in among) < AGREED:
            break
        if z > -CHANCE:
            what = f"its correlation with the others is {correlation:.4f}, no more than chance"
            findings.append(Finding(suspect, "random", f"{what}; theirs is {common:.4f}"))
        elif correlation <= REVERSED * common:
            what = f"its correlation with the others is {correlation:.4f}"
            findings.append(Finding(suspect, "reversed", f"{what}; theirs is {common:.4f}"))
    return findings


def _agreement(
    vectors: Mapping[str, Tensor], lengths: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """By peer z, and the correlation, of its vector with the sum of the others' directions."""
    whole = torch.zeros_like(next(iter(vectors.values())))
    for peer, values in vectors.items():
        whole.add_(values.mul(1 / lengths[peer]))
    found = {}
    for peer, values in vectors.items():
        others = whole.sub(values.mul(1 / lengths[peer]))
        along = dot(values, others)
        by_chance = math.sqrt(total(fold(lambda a, b: (a * b).square(), values, others)))
        correlation = along / (lengths[peer] * norm(others)) if by_chance else 0.0
        found[peer] = (along / by_chance if by_chance else 0.0, correlation)
    return found


def _too_close(one: Sketch, other: Sketch, distances: Sequence[float]) -> bool:
    """Whether two are closer than any chance, by the distances common among others."""
    limit = NEAR * statistics.median(distances) if distances else 0.0
    return one == other or _apart(one, other) < limit


def _apart(one: Sketch, other: Sketch) -> float:
    """One less the correlation, from the difference, which keeps it exact where it is small."""
    return math.fsum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / 2


def _pairs(sketches: Sketches) -> list[tuple[str, str]]:
    return list(combinations(sorted(sketches), 2))


def _without(sketches: Sketches, peers: set[str]) -> dict[str, Sketch]:
    return {peer: each for peer, each in sorted(sketches.items()) if peer not in peers}


@lru_cache(maxsize=2)
def _signs(count: int) -> Tensor:
    """Signs for so many values, the same everywhere: numpy keeps the bits of PCG64."""
    words = np.random.PCG64(count).random_raw(-(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=count)
    return torch.from_numpy(bits.astype(np.int8)).mul_(2).sub_(1)
