"""A peer's way through the rounds, as a pure function of what it sees and of its own clock.

`tick(state, event, now)` gives the next state and all that it calls for just now. Actions are
wants, not orders: they come again with every tick until an event says that they are done, so a
driver that fails at one needs to remember nothing, and one that is at it already lets it be. Where
there are several, the first are the more urgent.

What the driver owes in return:

- It looks at all cards, then at the shelves for contributions to `state.round`, then at the
  register that `unread` names, and at the next at once where that one was passed over. It gives
  what it found, and then a `Wake`; again and again. While it cannot reach its transport it does
  not tick: time in which nothing could be seen is nobody's silence.
- It keeps what it said has `Arrived` until `Advanced`, after which everything is checked anew.
  Contributions to other rounds are ignored; refused ones count as here, since all refuse them.
- Its own card counts too: that of a validator is not active, so nobody waits for it.
- Each report comes once. A card's sequence goes on growing over restarts.
- Under a method that agrees on nothing all peers give the same base.

Safety lies in the registers alone: whatever clocks and cards say, all peers go by what was settled
first. Cards are one peer's word each; what more than half of those say that took part in the last
agreed round, this peer included, is believed: that they are ahead, or have other weights.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from trainwright.swarm.events import (
    MOST_ENTRIES,
    Action,
    Advance,
    Advanced,
    Arrived,
    CardSeen,
    CatchUp,
    Decision,
    Event,
    Heal,
    Hurry,
    Missing,
    Offered,
    Propose,
    ReportArrived,
    Rules,
    Settled,
)
from trainwright.swarm.rounds_state import Rounds, Seen

FAR = 10
"""Rounds behind the others from which a snapshot is taken up rather than every round replayed."""


def begin(me: str, rules: Rules, advanced: Advanced, now: float) -> Rounds:
    """The state of a peer that has just got hold of the agreed weights."""
    of = advanced
    return Rounds(me, rules, of.round, of.base, of.electorate, of.excluded, now, now, now)


def tick(state: Rounds, event: Event, now: float) -> tuple[Rounds, list[Action]]:
    """The state after an event at `now` (seconds, own monotonic clock), and what it calls for."""
    state = _compared(_absorbed(_awake(state, now), event, now), now)
    return state, _wants(state, now)


def unread(state: Rounds, now: float) -> int | None:
    """Which of the round's registers to look at, by attempt; None when it is decided."""
    return state.attempt if state.decision is None or _given_up(state, now) else None


# What events change


def _awake(state: Rounds, now: float) -> Rounds:
    """Time without ticks (a process that was stopped, a transport away) did not pass: nobody fell
    silent in it, and no deadline came. It does pass where this peer has only just been asleep, so
    that a slow driver, which always comes late, still gets to things.
    """
    gap = now - state.ticked
    if gap <= state.nap or state.ticked - state.woken < state.nap:
        return replace(state, ticked=now)
    return replace(
        state,
        ticked=now,
        woken=now,
        began=state.began + gap,
        reached=None if state.reached is None else state.reached + gap,
        decided=state.decided + gap,
        behind=state.behind + gap,
        cards={peer: replace(card, fresh=card.fresh + gap) for peer, card in state.cards.items()},
    )


def _absorbed(state: Rounds, event: Event, now: float) -> Rounds:
    match event:
        case CardSeen():
            return _with_card(state, event, now)
        case Advanced():
            return _advanced(state, event, now)
        case ReportArrived(peer, digest):
            return replace(state, reports={**state.reports, (peer, digest): state.round})
        case Offered(round, digest) if round == state.round:
            return _with_contribution(state, state.me, digest, "", now)
        case Arrived(round, peer, digest, reason) if round == state.round:
            return _with_contribution(state, peer, digest, reason, now)
        case Missing(round, peer, digest) if round == state.round:
            here = {each: why for each, why in state.here.items() if each != (peer, digest)}
            return replace(state, here=here, missing=state.missing | {(peer, digest)})
        case Settled(round, attempt, decision) if round == state.round:
            return _settled(state, decision, now) if attempt == unread(state, now) else state
    return state


def _with_card(state: Rounds, card: CardSeen, now: float) -> Rounds:
    old = state.cards.get(card.peer)
    if old and card.sequence <= old.sequence:
        return state
    goes_on = old and old.active and card.active and state.fresh(old, now)
    since = old.since if old and goes_on else now
    seen = Seen(card.sequence, card.round, card.base, card.active, now, since)
    return replace(state, cards={**state.cards, card.peer: seen})


def _with_contribution(state: Rounds, peer: str, digest: str, reason: str, now: float) -> Rounds:
    state = replace(state, here={**state.here, (peer, digest): reason})
    if state.reached is None and len(state.accepted) >= state.rules.quorum:
        state = replace(state, reached=now)
    return state


def _settled(state: Rounds, decision: Decision | None, now: float) -> Rounds:
    """A register more is known. Whose decision was given up gets no second one in the round."""
    state = replace(state, attempt=state.attempt + 1)
    if decision is None or decision.proposer in state.proposers:
        return state
    proposers = state.proposers | {decision.proposer}
    return replace(state, decision=decision, decided=now, proposers=proposers)


def _advanced(state: Rounds, event: Advanced, now: float) -> Rounds:
    """The next round. Reports are proposed in two rounds at most: later they may be gone, and a
    decision that names what nobody has holds all up.
    """
    took_in = state.decision.reports if state.decision else ()
    return replace(
        begin(state.me, state.rules, event, now),
        started=state.started,
        woken=state.woken,
        cards=state.cards,
        reports={
            each: came
            for each, came in state.reports.items()
            if each not in took_in and came >= event.round - 1
        },
        healed=state.round if event.round <= state.round else state.healed,
    )


def _compared(state: Rounds, now: float) -> Rounds:
    """What the others' cards say of this peer: that it is behind, or that its weights are wrong.

    The latter is found once in a round: who took up other weights in it does not change them again.
    """
    voters = state.voters(now)
    front = state.ahead(voters, len(voters) // 2 + 1)
    if front != state.front:
        state = replace(state, front=front, behind=state.behind if state.front else now)
    if state.astray or state.healed == state.round:
        return state
    votes = Counter(base for round, base in voters.values() if round == state.round)
    for base, count in votes.most_common(1):
        if base != state.base and 2 * count > len(voters):
            return replace(state, astray=base)
    return state


# What a state calls for


def _wants(state: Rounds, now: float) -> list[Action]:
    if state.astray and state.front:
        return [state.front]
    if state.astray and (holders := state.holders(now)):
        return [Heal(state.round, state.astray, holders)]
    # Astray with nobody left to heal from, a peer goes on with what it has.
    wants: list[Action] = [*_catch_up(state, now)]
    if state.decision and not state.lacking:
        return [*wants, Advance(state.decision)]
    wants += state.lacking
    if state.front is None and unread(state, now) is not None:
        wants += _hurry(state, now)
        wants += _proposal(state, now)
    return wants


def _hurry(state: Rounds, now: float) -> list[Action]:
    half_over = state.past(state.began + state.rules.deadline / 2, now)
    hurries = state.awaits_itself and (state.reached is not None or half_over)
    return [Hurry(state.round)] if hurries else []


def _proposal(state: Rounds, now: float) -> list[Action]:
    """To be settled: when all that can be waited for are in, grace seconds after the quorum was
    complete, or at the deadline, then with nothing if the quorum is not.
    """
    rules, entries = state.rules, state.accepted
    due = state.past(state.began + rules.deadline, now)
    if len(entries) < rules.quorum:
        entries, reports = {}, {}
    else:
        reports = {peer: digest for peer, digest in state.reports if peer not in state.excluded}
        waited = state.reached is not None and state.past(state.reached + rules.grace, now)
        due = due or waited or not state.awaits_anybody(now)
    if not due or state.me in state.excluded | state.proposers:
        return []
    chosen = _most(state, entries), _most(state, reports)
    return [Propose(state.attempt, Decision(state.round, state.me, *chosen))]


def _most(state: Rounds, found: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """As many as a decision can name, those of who took part in the last agreed round first."""
    known = sorted(found.items(), key=lambda each: (each[0] not in state.electorate, each))
    return tuple(sorted(known[:MOST_ENTRIES]))


def _catch_up(state: Rounds, now: float) -> list[CatchUp]:
    """A peer that is behind goes through the rounds one by one, unless it cannot: what was decided
    is gone, and those who went on are enough to; or the front is far, or no register says how to
    get there.
    """
    front, lacking = state.front, state.lacking
    if lacking and (others := state.went_on(now)):
        gone = any((each.peer, each.digest) in state.missing for each in lacking)
        if gone or state.past(state.decided + state.rules.deadline, now):
            return [others]
    if front is None:
        return []
    unknown = state.decision is None and state.past(state.behind + state.rules.silence, now)
    return [front] if unknown or front.to >= state.round + FAR else []


def _given_up(state: Rounds, now: float) -> bool:
    """Whether what was decided cannot be had: its owner lied, or took it away with it.

    Who has it is ahead. If those are too few to go on after a whole deadline, the others settle the
    round anew in its next register; but never one alone that could make no round, and would only
    part from the others. Who went on with the old decision finds itself astray.
    """
    if not state.lacking or not state.past(state.decided + state.rules.deadline, now):
        return False
    voters = state.voters(now)
    fellows = sum(round == state.round for round, _ in voters.values())
    enough = fellows >= state.rules.quorum or (fellows > 1 and 2 * fellows > len(voters))
    return enough and not state.went_on(now)
