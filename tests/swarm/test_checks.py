"""The first look at contributions: every lie that it is for, each refused by its own name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch

from tests.swarm.made import ALICE, BASE, BOB, LAYOUT, RUN, OneVector, change, contribution, method
from trainwright.recipe.swarm import CodecName
from trainwright.swarm.checks import (
    Checked,
    Refused,
    check_contribution,
    contribution_body,
    largest_norm,
    planes_digest,
)
from trainwright.swarm.layout import take
from trainwright.swarm.message import HEADER_BYTES, BadMessage, Message, read_message
from trainwright.swarm.methods.build import build_method
from trainwright.swarm.methods.method import Agreed, Method
from trainwright.swarm.settings import DEFAULTS

CODECS: tuple[CodecName, ...] = (
    *("fp32", "bf16", "int8", "e3m0", "2bit", "1bit", "top-k", "top-k-12bit"),
)


def message(data: bytes) -> Message:
    return read_message(data, run=RUN, kind="contribution", limit=10**6)


def read(data: bytes, codec: CodecName = "top-k", **changes) -> Checked | Refused:
    asked = {
        "method": method(codec),
        "base": BASE,
        "most_norm": 1e3,
        "most_tokens": 10**6,
        "earlier": {},
    }
    limit = method(codec).most_bytes(3) + HEADER_BYTES
    found = read_message(data, run=RUN, kind="contribution", limit=limit)
    return check_contribution(found, **{**asked, **changes})


def refused(data: bytes, codec: CodecName = "top-k", **changes) -> Refused:
    found = read(data, codec, **changes)
    assert isinstance(found, Refused), found
    return found


def planes_of(codec: CodecName, seed: int = 3) -> list[np.ndarray]:
    return OneVector(codec).codec.encode(change(seed))


def dense(values: torch.Tensor) -> list[np.ndarray]:
    return [values.numpy().view(np.uint8).copy()]


@pytest.mark.parametrize("codec", CODECS)
def test_honest_contributions_pass_as_they_are(codec):
    found = read(contribution(codec=codec), codec)
    assert isinstance(found, Checked), found
    planes = planes_of(codec)
    assert torch.equal(found.values, OneVector(codec).codec.decode(planes, LAYOUT.count))
    assert (found.peer, found.tokens, found.loss) == (ALICE.peer, 40_000, 5.25)


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_methods_send_passes(name):
    made = build_method(DEFAULTS[name], LAYOUT)
    state = Agreed(0, 20 * change(seed=5))
    own = made.begin(state)
    for round in range(3):
        state, part = replace(state, round=round), made.fragment(round)
        local = take(change(seed=round), part)
        if made.takes == "weights":
            local += take(state.weights, part)
        planes, own = made.outgoing(state, own, round, local, rate=1e-3)
        most = largest_norm(take(state.weights, part))
        data = contribution(round=round, planes=planes)
        found = check_contribution(
            message(data), method=made, base=BASE, most_norm=most, most_tokens=10**6, earlier={}
        )
        assert isinstance(found, Checked), found


def test_far_too_many_bytes_are_not_even_read():
    with pytest.raises(BadMessage, match="oversized"):
        read(contribution(planes=[bytes(10**6)]))


def test_another_state_is_named_but_is_no_proof():
    found = refused(contribution(base="cd" * 16))
    assert "cd" * 16 in found.reason and BASE in found.reason and not found.proof
    assert isinstance(read(contribution(base=""), base=None), Checked)  # nothing is agreed


@pytest.mark.parametrize("codec", CODECS)
def test_planes_missing_added_and_cut_are_refused(codec):
    planes = planes_of(codec)
    for wrong in (
        planes[:-1],
        [*planes, planes[0]],
        [],
        *([*planes[:at], plane[:-1], *planes[at + 1 :]] for at, plane in enumerate(planes)),
    ):
        found = refused(contribution(codec=codec, planes=wrong), codec)
        assert found.proof and found.reason


def test_values_of_another_type_or_shape_are_refused():
    for values in (change().double(), change().half(), change(count=LAYOUT.count - 1)):
        assert refused(contribution(planes=dense(values)), "fp32").proof
    # Of the right size, and of other content: what cannot be told apart is found by its effects.
    assert refused(contribution(planes=planes_of("int8")), "fp32").proof


@pytest.mark.parametrize("places", [0xFFF, 0x000])
def test_places_out_of_range_or_twice_are_refused(places):
    """The last chunk is of 64 values; 0xFFF is outside of it, and 0 twice in it."""
    planes = planes_of("top-k-12bit")
    packed = int(f"{places:03x}" * 2, 16).to_bytes(3, "little")
    planes[0] = np.frombuffer((packed * planes[0].size)[: planes[0].size], np.uint8)
    assert refused(contribution(codec="top-k-12bit", planes=planes), "top-k-12bit").proof


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(wrong):
    values = change()
    values[17] = wrong
    found = refused(contribution(planes=dense(values)), "fp32")
    assert found.proof and ("finite" in found.reason or "NaN" in found.reason)


def test_what_a_codec_lets_through_is_refused_if_it_is_not_finite():
    class Careless(OneVector):
        def decode(self, planes: Sequence, round: int) -> torch.Tensor:
            return torch.from_numpy(planes[0].view(np.float32))

    values = change()
    values[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    careless = cast(Method, Careless("fp32"))
    found = refused(contribution(planes=dense(values)), "fp32", method=careless)
    assert found == Refused("3 values are NaN or infinite", proof=True)


def test_values_whose_sum_would_overflow_are_refused():
    most = largest_norm(change())
    assert most == pytest.approx(10 * math.sqrt(LAYOUT.count))  # small weights
    assert largest_norm(100 * torch.ones(LAYOUT.count)) == pytest.approx(100 * most)
    for value in (3e38, -3e38, 1e30):
        found = refused(contribution(planes=dense(change() + value)), "fp32", most_norm=most)
        assert found.proof and "norm" in found.reason
    assert isinstance(read(contribution(planes=dense(change())), "fp32", most_norm=most), Checked)
    single = torch.zeros(LAYOUT.count)
    single[3] = most * 1.01
    assert "norm" in refused(contribution(planes=dense(single)), "fp32", most_norm=most).reason
    single[3] = most * 0.99
    assert isinstance(read(contribution(planes=dense(single)), "fp32", most_norm=most), Checked)


def test_more_bytes_than_the_codec_needs_are_refused():
    data = contribution(codec="fp32", planes=[*planes_of("fp32"), bytes(100)])
    found = refused(data, "fp32")
    assert found.proof and "the codec needs" in found.reason


def test_the_same_values_again_are_refused_whoever_sends_them():
    first = message(contribution(round=2, planes=planes_of("top-k")))
    earlier = {planes_digest(first): f"those of {ALICE.peer} in round 2"}
    for by in (ALICE, BOB):
        data = contribution(by, planes=planes_of("top-k"), tokens=41_000)
        found = refused(data, earlier=earlier)
        assert found.proof and f"those of {ALICE.peer} in round 2" in found.reason
    other = contribution(planes=planes_of("top-k", seed=4))
    assert isinstance(read(other, earlier=earlier), Checked)


def test_no_change_at_all_is_no_copy():
    """Where the learning rate is 0, all honest peers send the same nothing."""
    nothing = dense(torch.zeros(LAYOUT.count))
    earlier = {planes_digest(message(contribution(planes=nothing))): "round 2"}
    found = read(contribution(BOB, planes=nothing), "fp32", earlier=earlier)
    assert isinstance(found, Checked)


@pytest.mark.parametrize(
    "claim, reason",
    [
        ({"tokens": 10**6 + 1}, "at most 1000000"),
        ({"tokens": 0}, "stand for nothing"),
        ({"tokens": -5}, "stand for nothing"),
        ({"steps": 0}, "stand for nothing"),
        ({"tokens": 1.5}, "does not name"),
        ({"tokens": True}, "does not name"),
        ({"steps": "10"}, "does not name"),
        ({"base": None}, "does not name"),
        ({"base": ["a"]}, "does not name"),
        ({"loss": "low"}, "loss"),
        ({"loss": [1]}, "loss"),
        ({"loss": True}, "loss"),
    ],
)
def test_claims_that_cannot_be_are_refused(claim, reason):
    found = refused(contribution(**claim))
    assert found.proof and reason in found.reason


def test_a_loss_that_is_not_finite_is_not_said():
    assert contribution_body(BASE, 1, 1, math.nan)["loss"] is None
    assert contribution_body(BASE, 1, 1, math.inf)["loss"] is None
    assert contribution_body(BASE, 1, 1, 5.123456789)["loss"] == 5.12346
    found = read(contribution(loss=None))
    assert isinstance(found, Checked) and found.loss is None


def test_planes_moved_between_each_other_are_others():
    cuts = ([b"ab", b"c"], [b"a", b"bc"], [b"abc"])
    assert len({planes_digest(message(contribution(planes=planes))) for planes in cuts}) == 3
