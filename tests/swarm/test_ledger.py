"""Whom peers come to trust: from planted contributions and reports, and from small real runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from openskill.models import PlackettLuce
from torch import Tensor

from benchmarks.swarm_liars import LIES
from tests.swarm.small_peers import PYTHON, TABLES, rehearse
from trainwright.recipe.swarm import Trust
from trainwright.swarm.ledger import Judgement, Ledger, judge
from trainwright.swarm.methods.method import Received
from trainwright.swarm.scores import Report, Score, write_report

SIZE = 5000
PEERS = ("ann", "ben", "cal", "dan")
RULES = Trust()


class Story:
    """Rounds of honest contributions, changed by hand, and the ledger that comes of them."""

    def __init__(self, ledger: Ledger | None = None, rules: Trust = RULES) -> None:
        self.ledger, self.rules, self.round = ledger or Ledger(), rules, 0
        self.draws = torch.Generator().manual_seed(0)
        self.said = list[tuple[int, str, str, bool]]()

    def noise(self) -> Tensor:
        return torch.randn(SIZE, generator=self.draws)

    def honest(self) -> dict[str, Tensor]:
        common = self.noise()
        return {peer: common + self.noise() for peer in PEERS}

    def judge(
        self,
        values: Mapping[str, Tensor] | None = None,
        reports: Mapping[str, Any] | None = None,
        tokens: Mapping[str, float] | None = None,
    ) -> Judgement:
        received = [
            Received(peer, each, (tokens or {}).get(peer, 100.0))
            for peer, each in (values or self.honest()).items()
        ]
        found = judge(self.ledger, self.round, received, reports or {}, self.rules)
        self.said += [(self.round, each.peer, each.kind, each.excludes) for each in found.verdicts]
        self.ledger, self.round = found.ledger, self.round + 1
        return found

    def scores(self, drops: Mapping[str, tuple[float, float]], **more: Any) -> dict[str, Any]:
        """Everybody's report of the last round: of those they were to try, these drops."""
        return {
            me: write_report(
                Report(
                    self.round - 1,
                    {peer: Score(*drops[peer]) for peer in self.ledger.to_try(me)},
                    **more,
                )
            )
            for me in PEERS
        }


FINE = dict.fromkeys(PEERS, (0.2, 0.1))


def test_honest_peers_keep_their_weight() -> None:
    story = Story()
    for _ in range(12):
        found = story.judge(reports=story.scores(FINE) if story.round else {})
        assert found.weights == dict.fromkeys(PEERS, 100.0)
    assert story.said == []
    assert story.ledger.excluded == frozenset()
    assert len(story.ledger.past) == 8


def test_the_ledger_goes_through_json_bit_for_bit() -> None:
    story = Story(Ledger(validators=("zoe",)))
    for number in range(6):
        values = story.honest()
        values["dan"] = -values["dan"] if number % 2 else values["ann"].clone()
        reports = story.scores(FINE | {"dan": (-0.1, -0.2)}) if number else {}
        if number:  # a stranger's numbers may be longer than those that we write
            reports["ann"]["scores"] = {"ben": [1 / 3, 2 / 3], "cal": [1 / 7, 1 / 9]}
        story.judge(values, reports)
        text = json.dumps(story.ledger.to_json(), sort_keys=True)
        back = Ledger.from_json(json.loads(text))
        assert back == story.ledger
        assert json.dumps(back.to_json(), sort_keys=True) == text


@pytest.mark.parametrize(
    "written",
    [
        None,
        [],
        {},
        {"validators": [], "standing": {}, "past": [{}]},
        {"validators": [], "standing": {"a": [1, 2, 3]}, "past": []},
        {"validators": [], "standing": {"a": [1, 2, 3, 4, "yes", ""]}, "past": []},
        {"validators": 5, "standing": {}, "past": []},
    ],
)
def test_what_is_no_ledger_is_refused(written: Any) -> None:
    with pytest.raises(ValueError, match="no ledger"):
        Ledger.from_json(written)


def test_the_order_in_which_things_came_changes_nothing() -> None:
    one, other = Story(), Story()
    for number in range(5):
        values = one.honest()
        values["dan"] = -values["dan"]
        reports = one.scores(FINE | {"dan": (-0.1, -0.1)}) if number else {}
        found = one.judge(values, reports)
        turned = other.judge(dict(reversed(values.items())), dict(reversed(reports.items())))
        assert turned == found


def test_a_count_of_tokens_is_a_claim() -> None:
    found = Story().judge(tokens={"dan": 1e12, "ann": 50.0})
    assert found.weights == {"ann": 50.0, "ben": 100.0, "cal": 100.0, "dan": 200.0}


def test_zeros_count_nothing_and_bar_after_three_rounds() -> None:
    story = Story()
    for number in range(4):
        found = story.judge(story.honest() | {"dan": torch.zeros(SIZE)})
        assert found.weights["dan"] == 0
        assert ("dan" in found.ledger.excluded) == (number >= 2)
    assert story.said == [(n, "dan", "zero", n == 2) for n in range(3)]
    assert "its norm is 0" in story.ledger.of("dan").excluded


def test_clean_rounds_are_forgiven() -> None:
    story = Story()
    for number in range(30):
        zero = {"dan": torch.zeros(SIZE)} if number % 3 == 0 else {}
        story.judge(story.honest() | zero)
    assert story.ledger.excluded == frozenset()
    assert story.ledger.of("dan").strikes <= 1


def test_the_same_values_again_are_proof() -> None:
    story = Story()
    first = story.honest()
    story.judge(first)
    found = story.judge(story.honest() | {"dan": first["ben"]})
    assert found.weights["dan"] == 0
    assert found.ledger.excluded == {"dan"}
    assert story.said == [(1, "dan", "stale", True)]
    assert "that of ben of round 0" in found.ledger.of("dan").excluded


def reports_of(round: int, **reports: dict[str, Any]) -> dict[str, Any]:
    return {peer: write_report(Report(round, **each)) for peer, each in reports.items()}


def test_of_two_equals_the_one_that_most_saw_later_is_the_copy() -> None:
    story = Story()
    seen, turned = {"arrivals": {"ann": 4, "dan": 5}}, {"arrivals": {"ann": 5, "dan": 4}}
    for number in range(5):
        values = story.honest()
        if "dan" not in story.ledger.excluded:
            values["dan"] = values["ann"].clone()
        reports = reports_of(number - 1, ann=seen, ben=seen, cal=seen, dan=turned) if number else {}
        found = story.judge(values, reports)
        if number == 0:  # nobody knows who copied: they share one weight
            assert found.weights == {"ann": 50.0, "ben": 100.0, "cal": 100.0, "dan": 50.0}
        if number == 2:  # the first round's testimony is in
            assert found.weights["ann"] == 100.0
            assert found.weights["dan"] == 0
    assert story.ledger.excluded == {"dan"}
    assert story.ledger.of("ann").strikes == 0
    assert [each for each in story.said if each[2] == "copy"] == [
        (n, "dan", "copy", n == 4) for n in (2, 3, 4)
    ]


def test_half_of_the_peers_are_not_enough_to_blame_anybody() -> None:
    story = Story()
    turned = {"arrivals": {"ann": 5, "dan": 4}}
    for number in range(8):
        values = story.honest()
        values["dan"] = values["ann"].clone()
        reports = reports_of(number - 1, dan=turned, cal=turned, zoe=turned) if number else {}
        story.judge(values, reports)
    assert story.ledger.excluded == frozenset()
    assert all(story.ledger.of(peer).strikes == 0 for peer in PEERS)


def test_what_most_were_sent_is_refused_to_its_sender() -> None:
    story = Story()
    three = {peer: each for peer, each in story.honest().items() if peer != "dan"}
    accused = {"refused": {"dan": "NaN"}}
    for number in range(5):
        reports = reports_of(number - 1, ann=accused, ben=accused) if number else {}
        reports |= reports_of(number - 1, cal={"refused": {"ann": "I say so"}}) if number else {}
        story.judge({peer: each + story.noise() for peer, each in three.items()}, reports)
    assert story.ledger.excluded == {"dan"}
    assert story.ledger.of("ann").strikes == 0


def test_reversed_contributions_bar_only_with_the_scores() -> None:
    for drops, barred in (((-0.2, -0.3), {"dan"}), ((0.3, -0.3), set[str]())):
        story = Story()
        for number in range(8):
            values = story.honest()
            values["dan"] = -values["dan"]
            reports = story.scores(FINE | {"dan": drops}) if number else {}
            found = story.judge(values, reports)
            # Odd is not wrong: who is of use on its own data goes on counting.
            helps = number >= 2 and not barred
            assert (found.weights["dan"] > 0) == helps, number
        assert story.ledger.excluded == barred
    quiet = Story(rules=Trust(scores=False))
    for _ in range(8):
        values = quiet.honest()
        assert quiet.judge(values | {"dan": -values["dan"]}).weights["dan"] == 0
    assert quiet.ledger.excluded == frozenset()


def test_low_scores_lose_weight_and_no_more() -> None:
    story = Story()
    shares = []
    for number in range(30):
        reports = story.scores(FINE | {"dan": (0.1, -0.3)}) if number else {}
        shares.append(story.judge(reports=reports).weights["dan"] / 100)
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == 0.25
    assert story.ledger.excluded == frozenset()
    assert min(story.judge().weights[peer] for peer in PEERS[:3]) == 100.0
    assert {each[2] for each in story.said} == {"score"}


def test_ratings_are_openskills() -> None:
    story = Story()
    story.judge()
    drops = {"ann": (0.2, 0.1), "ben": (0.2, 0.09), "cal": (0.2, 0.02), "dan": (0.2, -0.3)}
    tried = sorted({each for me in PEERS for each in story.ledger.to_try(me)})
    story.judge(reports=story.scores(drops))
    story.judge()
    best = max(drops[peer][1] for peer in tried)
    ranks = [
        0.0 if (gain := drops[peer][1]) >= best / 2 else 1.0 if gain > 0 else 2.0 for peer in tried
    ]
    model = PlackettLuce()
    expected = model.rate([[model.rating()] for _ in tried], ranks=ranks)
    for peer, [rating] in zip(tried, expected, strict=True):
        assert story.ledger.of(peer).mean == pytest.approx(rating.mu, rel=1e-5)
        assert story.ledger.of(peer).deviation == pytest.approx(rating.sigma, rel=1e-5)


def test_few_tokens_with_a_fair_gain_are_no_low_score() -> None:
    story = Story()
    for number in range(20):
        reports = story.scores(FINE | {"dan": (0.02, 0.01)}) if number else {}
        found = story.judge(reports=reports, tokens={"dan": 10.0})
    assert found.weights["dan"] == 10.0


def test_one_liar_among_the_reporters_decides_nothing() -> None:
    honest, lied = Story(), Story()
    for number in range(10):
        reports = honest.scores(FINE) if number else {}
        lies = dict(reports)
        if number:
            praise = {
                peer: Score(5.0, 5.0 if peer == "dan" else -5.0)
                for peer in lied.ledger.to_try("dan")
            }
            praise["dan"] = Score(9.0, 9.0)  # of itself, which counts nowhere
            lies["dan"] = write_report(Report(number - 1, praise))
        values = honest.honest()
        honest.judge(values, reports)
        lied.judge(values, lies)
    assert lied.ledger.standing == honest.ledger.standing


def test_reports_of_strangers_of_others_rounds_and_nonsense_are_passed_over() -> None:
    story, plain = Story(), Story()
    accused = {"scores": {"ann": Score(-9.0, -9.0)}, "refused": {"ann": "NaN"}}
    for number in range(6):
        values = plain.honest()
        late = reports_of(number - 3, ann=accused, ben=accused, cal=accused) if number > 2 else {}
        strangers = (
            reports_of(number - 1, **dict.fromkeys(map(str, range(9)), accused)) if number else {}
        )
        early = reports_of(number, ann=accused, ben=accused, cal=accused) if number % 2 else late
        nonsense = {"eve": None, "fay": {"round": math.inf}, "gil": [[]], "hal": {"round": {}}}
        story.judge(
            values, {**strangers, **nonsense, **(early if number != 5 else {})} if number else {}
        )
        plain.judge(values)
    assert story.ledger.standing == plain.ledger.standing


def test_a_validators_scores_count() -> None:
    for validators, counted in (((), False), (("zoe", "yan"), True)):
        story = Story(Ledger(validators))
        story.judge()
        drops = {peer: Score(0.1, 0.1) for peer in story.ledger.to_try("zoe")}
        said = write_report(Report(0, drops))
        story.judge(reports={"zoe": said, "yan": said})
        story.judge()
        assert (
            any(each.effort != 1 or each.helped for each in story.ledger.standing.values())
            == counted
        )


def test_switched_off_it_only_counts_tokens() -> None:
    story = Story(rules=Trust(conduct=False, scores=False))
    for number in range(6):
        values = story.honest() | {"dan": torch.zeros(SIZE)}
        reports = story.scores(FINE | {"dan": (-1.0, -1.0)}) if number else {}
        assert story.judge(values, reports).weights == dict.fromkeys(PEERS, 100.0)
    assert story.said == []


def test_rounds_of_few_and_of_none() -> None:
    story = Story()
    assert story.judge({"ann": torch.ones(SIZE)}).weights == {"ann": 100.0}
    nothing = judge(story.ledger, 1, [], {}, RULES)
    assert nothing.weights == {}
    found = judge(nothing.ledger, 2, [Received("ben", torch.ones(3), 1.0)], {}, RULES)
    assert found.weights == {"ben": 1.0}
    assert found.verdicts == ()


# Small real runs


@pytest.mark.parametrize("lie", LIES)
def test_a_liar_is_named_within_three_rounds(lie: str) -> None:
    told = rehearse([PYTHON] * 4, 6, lie=lie, inner_steps=5)
    liar = told.names[-1]
    round, why = told.court.named[liar]
    assert round < 3, why
    assert set(told.court.named) == {liar}
    assert set(told.court.barred) <= {liar}
    assert told.court.struck <= {liar}
    assert (liar in told.court.barred) == (lie != "wrong hash")  # which may be a mishap


def test_a_peer_with_data_unlike_the_others_is_not_taken_for_a_liar() -> None:
    told = rehearse([PYTHON, PYTHON, PYTHON, TABLES], 22)
    assert told.court.struck == set()
    kinds = {each.kind for past in told.court.ledger.past for each in past.findings}
    assert kinds & {"random", "reversed"}  # its conduct alone would have it so


def test_scores_that_nobody_asked_for_are_passed_over() -> None:
    story = Story()
    story.judge()
    tried = {peer for me in PEERS for peer in story.ledger.to_try(me)}
    blamed = dict.fromkeys(set(PEERS) - tried, Score(9.0, 20.0))
    assert blamed
    story.judge(reports=reports_of(0, **{me: {"scores": blamed} for me in PEERS}))
    story.judge()
    assert all(story.ledger.of(peer).helped is None for peer in PEERS)
