"""The same run of real peers through a folder, a bucket and a ring, by the command line."""

# ruff: noqa: F811 (a fixture of another file)

from __future__ import annotations

import re
import signal
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.swarm.test_ring import until
from tests.swarm.test_store import s3_server  # noqa: F401
from tests.swarm.toy_peer import begin_run, open_run, settings
from trainwright.errors import UserError
from trainwright.swarm.identity import Identity
from trainwright.training import swarm_runs
from trainwright.training.launch import INTERRUPTED
from trainwright.training.swarm_place import reach
from trainwright.training.swarm_tokenizer import packed

from .test_swarm import (
    call,
    ended,
    environment,
    join,
    rounds,
    same_peers,
    start,
    trainwright,
    weights,
)

INNER, ROUNDS = 3, 10


def trained(folder: Path, keys: Path, urls: tuple[str, str], *more: str) -> tuple[str, str]:
    """Two peers, each at its own URL of the run. One is stopped on the way, and while the other
    waits for it the model is looked at and fetched: what `start` and then `status` said.
    """
    folder.mkdir(exist_ok=True)
    same_peers(folder, keys)
    lengths = f"training.steps={INNER * ROUNDS}", f"swarm.inner_steps={INNER}"
    started = start(folder, *lengths, "swarm.deadline=300", *more, url=urls[0])
    with ExitStack() as stack:

        def joined(peer: int, *more: str) -> subprocess.Popen[bytes]:
            process = join(folder, peer, *more, url=urls[peer])
            stack.callback(process.terminate)  # where the test fails
            return process

        anna = joined(0, "--name", "anna")
        until(lambda: "waits for others" in (folder / "p0.log").read_text(), 120)
        other, logs = joined(1), [folder / f"p{peer}" / "swarm" / "swarm.jsonl" for peer in (0, 1)]
        until(lambda: all(log.exists() for log in logs), 120)  # both have a round
        other.send_signal(signal.SIGINT)
        assert other.wait(timeout=120) == INTERRUPTED
        status = call(folder, "status", urls[0])
        told = call(folder, "export", urls[0], "on-the-way")
        assert 1 <= int(re.search(r"after (\d+) rounds", told)[1]) < ROUNDS
        ended(folder, anna, joined(1))
    return started, status


def refused(folder: Path, *words: str) -> str:
    """What a command says that the user is to put right."""
    command, variables = trainwright(folder, *words), environment(folder)
    done = subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.mark.prove
@pytest.mark.parametrize("method", ["sparseloco", "diloco"])
def test_one_run_through_a_folder_a_bucket_and_a_ring(tmp_path, s3_server, method):
    """The same two peers end with the same weights, bit for bit. What is fetched on the way and
    afterwards is what they have; of a ring nothing is left to be fetched once all have gone.
    """
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            ports.append(sock.getsockname()[1])
    bucket = s3_server.replace("/run?", f"/{method}?")
    ring = f"ring://secret@127.0.0.1:{ports[0]}"
    places = {
        "folder": ("shared", "shared"),
        "bucket": (bucket, bucket),
        "ring": (ring, f"{ring}?listen=127.0.0.1:{ports[1]}"),
    }
    found = []
    for name, urls in places.items():
        folder = tmp_path / name
        # Scores count when they are there in time, which is not alike in two runs.
        more = f"swarm.method={method}", "swarm.snapshot_every=4", "swarm.trust.scores=false"
        started, status = trained(folder, tmp_path, urls, *more)
        assert f"  trainwright swarm join {urls[0]} --directory p0\n" in started.replace("'", "")
        assert re.search(r"anna \(\w{6}\)\s+training", status), status
        assert re.search(r"\w{6}\s+left", status), status
        names = ["p0/export", "p1/export"]
        for peer in (0, 1):
            lines = rounds(folder, peer)
            assert [line["round"] for line in lines] == list(range(ROUNDS))
            assert all(len(line["peers"]) == 2 for line in lines)
        if name == "ring":
            assert "nobody answers" in refused(folder, "status", urls[0])
            assert ring.partition("@")[2] in refused(folder, "export", urls[0])
        else:
            over = refused(folder, "join", urls[0], "--directory", "p0")
            assert "the run is over" in over and f"{folder / 'p0' / 'export'}" in over
            assert "the run is over" in refused(folder, "validate", urls[0])
            assert f"after {ROUNDS} rounds" in call(folder, "export", urls[0], "model")
            names.append("model")
        found += [weights(folder, each) for each in names]
    for other in found[1:]:
        assert all(torch.equal(values, other[name]) for name, values in found[0].items())


def test_where_no_run_can_be_started_nothing_is_made(tmp_path, monkeypatch):
    """A place that is taken or cannot be reached is found out before tokenizer and data are."""
    monkeypatch.setattr(swarm_runs, "prepare_run", lambda *given: pytest.fail("it was begun"))
    monkeypatch.setattr("trainwright.swarm.transports.ring.PATIENCE", 0.1)
    other = Identity.new()
    begin_run(open_run(tmp_path / "taken", other.peer), other, settings())
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    places = {
        str(tmp_path / "taken"): "another run was started at this place",
        f"ring://127.0.0.1:{port}?listen={port + 1}": "machine that the URL names first",
    }
    for url, says in places.items():
        recipe = REPOSITORY / "examples" / "swarm.yaml"
        with pytest.raises(UserError, match=says):
            swarm_runs.start(recipe, url, directory=tmp_path / "own")


def test_a_run_that_is_not_there_yet_is_waited_for(tmp_path):
    """Nor its folder. Without waiting, and after it, the place is refused."""
    url, own, starter = str(tmp_path / "run"), tmp_path / "own", Identity.new()
    said: list[str] = []

    def begin(what: str) -> None:
        said.append(what)
        transport = open_run(tmp_path / "run", starter.peer)
        run = begin_run(transport, starter, settings()).run
        files = {"model.json": b"{}", "tokenizer.json": b"[1]"}
        transport.put("tokenizer", packed(files, run, starter))

    for wait in (0.0, 0.2):
        with pytest.raises(UserError, match="no such folder"):
            reach(url, Identity.new(), own, wait=wait, say=lambda what: None)
    with pytest.raises(UserError, match="a run cannot be at"):  # and never will
        reach("http://host/run", Identity.new(), own, wait=60, say=pytest.fail)
    manifest, tokenizer = reach(url, Identity.new(), own, wait=60, say=begin)
    assert manifest.starter == starter.peer
    assert (tokenizer / "tokenizer.json").read_bytes() == b"[1]"
    assert len(said) == 1 and "no such folder" in said[0] and "up to 60 s" in said[0]
