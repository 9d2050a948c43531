"""Whom to trust: a function of the decided history, so that all peers keep the same ledger.

What a peer sends is judged in three ways, from cheap to dear. Its conduct (`swarm.conduct`) shows
in the contributions themselves. What only others can have seen (who was first with two equal
contributions, who was sent nonsense) is their testimony, and counts where more than half of a
round's contributors give it. What a contribution is worth on data is their median score
(`swarm.scores`), which makes a rating (openskill's Plackett-Luce).

Low ratings lose weight. Exclusion needs proof (the values of an earlier round, bit for bit), or
offences that are established in three rounds, more or less one after the other.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from openskill.models import PlackettLuce

from trainwright.recipe.swarm import Trust
from trainwright.swarm.conduct import Finding, Sketches, examine, sketches_of
from trainwright.swarm.methods.method import Received
from trainwright.swarm.scores import Report, Score, read_report
from trainwright.swarm.standing import Past, Standing

REMEMBERED = 8  # rounds whose contributions are known again
OPEN = 2  # rounds after which the reports of a round are counted
BARRED_AT = 3.0  # strikes
FORGIVEN = 0.5  # strikes for each clean round
GOOD = 0.5  # of the best drop on other data: what ranks with the best
LEAST = 0.25  # share of its weight that a rating leaves a peer
MOST_REFUSED = 16  # that a report can name
MOST_TOKENS = 2.0  # times the median: a count of tokens is a claim

AT_ONCE = ("zero", "too large", "stale")  # what conduct alone establishes
STEADY = 0.5  # median effort of the others from which a peer's own is held against it
_RATINGS = PlackettLuce()


@dataclass(frozen=True)
class Verdict:
    """What was found of a peer. `excludes`: from this round on it is barred.

    `kind` is one of conduct's, or "twin" (one of two equal contributions, before it is known who
    copied), "refused" (most peers hold proof that it sent nonsense), "score" (its contribution
    made the loss higher, by as much as the best made it lower).
    """

    peer: str
    kind: str
    what: str  # the evidence, a sentence for people
    excludes: bool = False


@dataclass(frozen=True)
class Ledger:
    """All peers' standing; part of the agreed state and of snapshots.

    Before round 0 it is `Ledger(validators=(the starter's id,))`.
    """

    validators: tuple[str, ...] = ()  # whose scores count though they contribute nothing
    standing: Mapping[str, Standing] = field(default_factory=dict)
    past: tuple[Past, ...] = ()
    electorate: tuple[str, ...] = ()  # of the last agreed round, sorted; who was refused is not

    @property
    def excluded(self) -> frozenset[str]:
        """Who is barred."""
        return frozenset(peer for peer, each in self.standing.items() if each.excluded)

    def of(self, peer: str) -> Standing:
        """A peer's standing, a newcomer's too."""
        return self.standing.get(peer, Standing())

    def to_try(self, me: str) -> list[str]:
        """Whose contributions to the round that was judged last this peer is to try on data."""
        return self.past[-1].to_try(me) if self.past else []

    def to_json(self) -> dict[str, Any]:
        """As plain JSON; equal ledgers give equal JSON (`json.dumps(…, sort_keys=True)`)."""
        return {
            "validators": list(self.validators),
            "standing": {peer: each.to_json() for peer, each in self.standing.items()},
            "past": [each.to_json() for each in self.past],
            "electorate": list(self.electorate),
        }

    @classmethod
    def from_json(cls, written: Any) -> Ledger:
        """What `to_json` wrote. Raises ValueError for anything else."""
        try:
            return cls(
                tuple(str(each) for each in written["validators"]),
                {str(peer): Standing.from_json(x) for peer, x in written["standing"].items()},
                tuple(Past.from_json(each) for each in written["past"]),
                tuple(str(each) for each in written["electorate"]),
            )
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no ledger: {error}") from error


class Judgement(NamedTuple):
    """What `judge` gives. `weights` go into `Received.weight`; zero for the excluded."""

    ledger: Ledger
    weights: dict[str, float]
    verdicts: tuple[Verdict, ...]


def judge(
    ledger: Ledger,
    round: int,
    received: Sequence[Received],
    reports: Mapping[str, Any],
    rules: Trust,
) -> Judgement:
    """The ledger after a round's decision, what each contribution counts, and who did what.

    `received`: the decided contributions, decoded, not clipped, `weight` the tokens they claim.
    `reports`: bodies of the decided reports of scores by peer, as they are: what is no report is
    passed over. Call it for every decided round before `clip_to_median` and `Method.advance`.
    Methods that do not agree (NoLoCo) have no ledger.
    """
    book = _Book(ledger, rules)
    book.take_in(round, reports)
    tokens = {each.peer: each.weight for each in sorted(received, key=lambda each: each.peer)}
    weights = tokens
    if received:
        sketches = sketches_of(received)
        findings = book.examine(round, received, sketches)
        weights = book.weigh(tokens, findings)
        book.past.append(Past(round, len(received[0].values), tokens, sketches, findings))
    past = tuple(each for each in book.past if each.round > round - REMEMBERED)
    standing = dict(sorted(book.standing.items()))
    ledger = dataclasses.replace(ledger, standing=standing, past=past)
    return Judgement(ledger, weights, tuple(book.verdicts))


class _Book:
    """A ledger while a round is written into it."""

    def __init__(self, ledger: Ledger, rules: Trust) -> None:
        self.rules, self.validators = rules, ledger.validators
        self.standing, self.past = dict(ledger.standing), list(ledger.past)
        self.verdicts = list[Verdict]()

    # What others report of the rounds before

    def take_in(self, round: int, reports: Mapping[str, Any]) -> None:
        """File reports under their rounds, and close the rounds that have waited long enough."""
        for reporter, body in sorted(reports.items()):
            try:
                report = read_report(body)
            except ValueError:
                continue
            for at, past in enumerate(self.past):
                if past.round == report.round < round and past.is_open:
                    self.past[at] = self._filed(past, reporter, report)
        for at, past in enumerate(self.past):
            if past.is_open and past.round <= round - OPEN:
                self._close(past)
                self.past[at] = dataclasses.replace(past, is_open=False, reports={})

    def _filed(self, past: Past, reporter: str, report: Report) -> Past:
        """With a report, as far as its writer was asked and is to be heard."""
        known = reporter in past.tokens or reporter in self.validators
        if not known or self.of(reporter).excluded or reporter in past.reports:
            return past
        asked = past.to_try(reporter)
        heard = Report(
            report.round,
            {peer: score for peer, score in report.scores.items() if peer in asked},
            {peer: count for peer, count in report.arrivals.items() if peer in past.tokens},
            dict.fromkeys(sorted(report.refused)[:MOST_REFUSED], "no contribution"),
        )
        return dataclasses.replace(past, reports={**past.reports, reporter: heard})

    def _close(self, past: Past) -> None:
        useless = self._rate(past) if self.rules.scores else set()
        if not self.rules.conduct:
            return
        most = len(past.tokens) / 2
        for each in past.findings:
            if each.kind == "copy":
                later = sum(_saw_later(each, report) for report in past.reports.values())
                if later > most:
                    what = f"{each.what}, which {later} peers saw first"
                    self._strike(each.peer, past.round, "copy", what)
            elif each.peer in useless and each.kind not in AT_ONCE:
                what = f"{each.what}, and it was of no use on its own data"
                self._strike(each.peer, past.round, each.kind, what)
        accused = [peer for report in past.reports.values() for peer in report.refused]
        for peer in sorted(set(accused)):
            if accused.count(peer) > most:
                what = f"{accused.count(peer)} peers have its signature under no contribution"
                self._strike(peer, past.round, "refused", what)

    def _rate(self, past: Past) -> set[str]:
        """Ratings after a round's scores; who was tried and of no use even on its own data."""
        scores = {peer: score for peer in past.tokens if (score := _median_score(past, peer))}
        # Drops on unlike data cannot be compared, only their signs; and where nobody's contribution
        # is of use, as in a run that diverges, nobody is to blame.
        some_help = any(score.assigned > 0 for score in scores.values())
        useless = set()
        for peer, score in scores.items():
            gain = math.copysign(1.0, score.assigned - score.unassigned)
            effort = _steady(0.8 * self.of(peer).effort + 0.2 * gain)
            self._note(peer, effort=effort)
            if some_help:
                helped = score.assigned > 0
                self._note(peer, helped=helped)
                useless |= set() if helped else {peer}
        middle = statistics.median(past.tokens.values())
        per_token = {
            peer: score.unassigned * max(1.0, middle / past.tokens[peer])
            for peer, score in scores.items()
            if past.tokens[peer] > 0
        }
        best = max(per_token.values(), default=0.0)
        if best <= 0 or len(per_token) < 2:
            return useless
        ranks = [_rank(each, best) for each in per_token.values()]
        rated = _RATINGS.rate([[self._rating(peer)] for peer in per_token], ranks=ranks)
        for (peer, gain), [rating] in zip(per_token.items(), rated, strict=True):
            self._note(peer, mean=_steady(rating.mu), deviation=_steady(rating.sigma))
            if gain <= -best:
                what = f"those who tried it found the loss {-gain:.3g} higher"
                self._say(peer, past.round, "score", what)
        return useless

    # The contributions of this round

    def examine(
        self, round: int, received: Sequence[Received], sketches: Sketches
    ) -> tuple[Finding, ...]:
        """What conduct says of those that are not barred; offences and clean rounds are noted."""
        if not self.rules.conduct:
            return ()
        received = [each for each in received if not self.of(each.peer).excluded]
        peers = {each.peer for each in received}
        mine = {peer: each for peer, each in sketches.items() if peer in peers}
        counts = {len(each.values) for each in received}
        earlier = {past.round: past.sketches for past in self.past if past.count in counts}
        findings = examine(received, mine, earlier)
        for each in findings:
            if each.kind in AT_ONCE:
                proven = each.kind == "stale" and each.exact
                self._strike(each.peer, round, each.kind, each.what, proven)
            elif each.kind == "copy":
                self._say(each.peer, round, "twin", f"{each.what}; who copied is not known yet")
            elif self._is_suspect(each):
                self._say(each.peer, round, each.kind, each.what)
        for peer in peers - {each.peer for each in findings}:
            self._note(peer, strikes=max(0.0, self.of(peer).strikes - FORGIVEN))
        return tuple(findings)

    def weigh(self, tokens: Mapping[str, float], findings: Iterable[Finding]) -> dict[str, float]:
        """What each contribution counts."""
        shares = {peer: self._share(peer, tokens) for peer in tokens}
        twins = defaultdict[str, set[str]](set)
        for each in findings:
            if each.kind == "copy":
                twins[each.peer].add(each.twin)
            elif self._is_suspect(each):
                shares[each.peer] = 0.0
        for peer, others in twins.items():
            # Of equal ones those count, in equal shares, that have copied least.
            strikes = [self.of(other).strikes for other in (peer, *others)]
            shares[peer] *= 1 / strikes.count(strikes[0]) if strikes[0] == min(strikes) else 0.0
        claims = [tokens[peer] for peer, share in shares.items() if share > 0]
        most = MOST_TOKENS * statistics.median(claims) if claims else 0.0
        return {peer: min(tokens[peer], most) * share for peer, share in shares.items()}

    def _is_suspect(self, found: Finding) -> bool:
        """Not so whose direction is odd and who is known to be of use on its own data."""
        return found.kind in (*AT_ONCE, "copy") or self.of(found.peer).helped is not True

    def _share(self, peer: str, contributors: Iterable[str]) -> float:
        """What a peer's record leaves of its weight."""
        mine = self.of(peer)
        others = [self.of(other) for other in contributors if other != peer]
        others = [other for other in others if not other.excluded]
        if mine.excluded or not self.rules.scores or not others:
            return 0.0 if mine.excluded else 1.0
        mean = statistics.median(other.mean for other in others)
        deviation = statistics.median(other.deviation for other in others)
        middle = _RATINGS.create_rating([mean, deviation])
        wins = _RATINGS.predict_win([[self._rating(peer)], [middle]])[0]
        share = max(LEAST, min(1.0, 4 * wins))
        if statistics.median(other.effort for other in others) >= STEADY:
            share *= min(1.0, 1 + mine.effort)
        return _steady(share)

    # Entries

    def of(self, peer: str) -> Standing:
        return self.standing.get(peer, Standing())

    def _note(self, peer: str, **changes: Any) -> None:
        self.standing[peer] = dataclasses.replace(self.of(peer), **changes)

    def _rating(self, peer: str) -> Any:
        return _RATINGS.create_rating([self.of(peer).mean, self.of(peer).deviation])

    def _say(self, peer: str, round: int, kind: str, what: str, excludes: bool = False) -> None:
        self.verdicts.append(Verdict(peer, kind, f"round {round}: {what}", excludes))

    def _strike(self, peer: str, round: int, kind: str, what: str, proven: bool = False) -> None:
        """Note an offence, and bar the peer if it is proven or was one too many."""
        if self.of(peer).excluded:
            return
        strikes = self.of(peer).strikes + 1
        barred = proven or strikes >= BARRED_AT
        self._note(
            peer, strikes=strikes, excluded=f"{kind}, round {round}: {what}" if barred else ""
        )
        self._say(peer, round, kind, what, barred)


def _saw_later(copy: Finding, report: Report) -> bool:
    """Whether a report has the contribution arrive after the one that it equals."""
    arrivals = report.arrivals
    return arrivals.get(copy.peer, 0) > arrivals.get(copy.twin, math.inf)


def _median_score(past: Past, peer: str) -> Score | None:
    """What at least two others found of a contribution."""
    scores = [report.scores[peer] for report in past.reports.values() if peer in report.scores]
    if len(scores) < 2:
        return None
    return Score(
        statistics.median(each.assigned for each in scores),
        statistics.median(each.unassigned for each in scores),
    )


def _rank(gain: float, best: float) -> float:
    """Coarse, so that honest peers whose data differ rank alike."""
    return 0.0 if gain >= GOOD * best else 1.0 if gain > 0 else 2.0


def _steady(value: float) -> float:
    """Six digits: what exp and erf give beyond them is the C library's affair."""
    return float(f"{value:.6g}")
