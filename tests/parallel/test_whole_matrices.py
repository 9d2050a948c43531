"""Muon's updates are those of one process, however its matrices are cut."""

from __future__ import annotations

import pytest

from tests.parallel import layouts
from tests.parallel.layouts import Case, plan
from tests.workers import run_on
from trainwright.parallel.whole_matrices import WholePieces

pytestmark = pytest.mark.slow

PLANS = {
    "tensor and shards": ("llama", plan(tp=2, dp_shard=2)),
    "tensor and replicas": ("llama", plan(tp=2, dp_replicate=2)),
    "tensor, on the host": ("llama", plan(tp=2, dp_shard=2, offload="optimizer")),
    "experts": ("mixtral", plan(dp_shard=4, ep=2)),
    "experts and tensor": ("mixtral", plan(dp_shard=2, ep=2, tp=2)),
}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return {
        family: layouts.reference(tmp_path_factory.mktemp(family), Case(family, "muon"))
        for family in ("llama", "mixtral")
    }


@pytest.mark.parametrize("name", PLANS)
def test_the_same_as_one_process(name, references):
    family, spread = PLANS[name]
    for outcome in run_on(4, layouts.outcome, references[family], Case(family, "muon"), spread):
        assert outcome.passed, outcome


def piece_by_piece(folder: str, case: Case, spread) -> object:
    """As if each worker's piece were a matrix by itself."""
    honest = WholePieces._cuts
    WholePieces._cuts = lambda whole, parameter: []
    try:
        return layouts.outcome(folder, case, spread)
    finally:
        WholePieces._cuts = honest


def test_pieces_orthogonalised_by_themselves_are_caught(references):
    family, spread = PLANS["tensor and replicas"]
    case = Case(family, "muon")
    assert not run_on(4, piece_by_piece, references[family], case, spread)[0].passed
