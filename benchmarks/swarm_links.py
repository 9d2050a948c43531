"""How much of their time peers compute, on slow links: the swarm's methods against DDP.

Each peer has a network namespace and an emulated link of its own; an S3 bucket is at the hub. Real
peers (`swarm.peer`) exchange the 4 M model's weights. Only the training is played: a step is a
sleep of `--step-seconds`, as long as a step takes elsewhere (four peers that really trained on one
machine's cores would measure each other), and weights change by noise. What is `auto` is chosen by
the starter from its measured link. DDP's row is gloo's all-reduce of the same fp32 vector between
the same peers after every step; a perfect overlap with the step is reckoned beside it.

    python benchmarks/swarm_links.py [--mbit 10 100] [--delay-ms 40] [--rounds 4]

Needs root, and moto's S3 server. Seconds count from the first outcome to the last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to be run as a file, too

from benchmarks.emulated_links.s3 import serve_s3
from benchmarks.emulated_links.star import DEVICE, Star, missing, star
from benchmarks.swarm_bytes import model_layout
from trainwright.recipe.schema import Optimizer
from trainwright.recipe.swarm import Swarm
from trainwright.swarm.adapting import adapt
from trainwright.swarm.events import Rules
from trainwright.swarm.identity import Identity
from trainwright.swarm.layout import Layout, take
from trainwright.swarm.link import measure_link
from trainwright.swarm.manifest import Manifest
from trainwright.swarm.methods.build import build_method
from trainwright.swarm.methods.method import Agreed
from trainwright.swarm.peer import Peer
from trainwright.swarm.runs import find_run, genesis_hash, start_run
from trainwright.swarm.transports.open import open_transport
from trainwright.swarm.transports.transport import Transport

METHODS: dict[str, dict[str, object]] = {
    "sparseloco": {},
    "streaming": {},
    "streaming, delay 4": {"delay": 4},
    "diloco, int8, 30 steps": {"inner_steps": 30},
}
BARRED, SHARE = ("sparseloco", "streaming"), 0.9  # of the time that these are to compute
# Noise is no training: nobody is to be judged by it.
TRUST = {"conduct": False, "scores": False}
DDP_STEPS = 5


def recipe_of(name: str, peers: int) -> Swarm:
    """The recipe's section for a row."""
    keys = {"method": name.split(",")[0], "quorum": peers, "silence": 120, "trust": TRUST}
    return Swarm.model_validate({**keys, **METHODS[name]})


def begin(transport: Transport, identity: Identity, name: str, layout: Layout, options) -> None:
    """Start the run, with what is `auto` chosen for the link that is measured now."""
    swarm = recipe_of(name, options.peers)
    adapted = adapt(
        swarm,
        Optimizer(),
        layout,
        link=measure_link(transport),
        step_seconds=options.step_seconds,
        peers=options.peers,
    )
    print("\n".join(adapted.lines), file=sys.stderr)
    agreed = Agreed(0, torch.zeros(layout.count))
    rules = Rules(swarm.quorum, swarm.grace, swarm.deadline, swarm.silence)
    hashed = genesis_hash(agreed, identity.peer)
    manifest = Manifest(identity.peer, {}, layout.shapes, adapted.settings, rules, hashed)
    start_run(transport, identity, manifest, agreed)


def take_part(options) -> None:
    """A peer: train and exchange so many rounds, then print what it took."""
    with tempfile.TemporaryDirectory() as folder:
        identity = Identity.new()
        transport = open_transport(options.url, identity, Path(folder))
        if options.peer == 0:
            begin(transport, identity, options.method, model_layout(), options)
        while (manifest := find_run(transport)) is None:
            time.sleep(0.5)
        method = build_method(manifest.settings, manifest.layout)
        peer = Peer(
            transport,
            identity,
            manifest,
            method,
            recipe_of(options.method, options.peers),
            Path(folder) / "own",
            rate=lambda round: 1e-3,
            most_tokens=10**6,
            say=lambda line: print(line, file=sys.stderr),
        )
        agreed = peer.start()
        assert agreed is not None
        while sum(card.active for card in peer.status.cards.values()) < options.peers:
            time.sleep(0.2)
        print(json.dumps(train(peer, method, agreed.weights.clone(), options)))
        peer.leave()
        peer.close()


def train(peer: Peer, method, weights: torch.Tensor, options) -> dict[str, float]:
    """Steps and exchanges, counted from the first outcome on."""
    noise = torch.randn(len(weights), generator=torch.Generator().manual_seed(options.peer))
    sent, steps, counted, included = None, 0, 0, 0
    begun = moved = None
    while peer.round <= options.rounds:
        time.sleep(options.step_seconds)
        steps, counted = steps + 1, counted + 1
        while (what := peer.wanted(steps)) != "go on":
            if what == "contribute":
                part = method.fragment(peer.round)
                local = take(weights, part).add(take(noise.roll(peer.round), part).mul(1e-3))
                if peer.offer(local, tokens=steps, steps=steps, loss=1.0):
                    steps, sent = 0, local
                continue
            outcome = peer.outcome()
            assert outcome is not None
            weights, sent = outcome.merged(method, weights, sent), None
            included += outcome.included
            if begun is None:
                begun, moved, counted, included = time.monotonic(), interface(), 0, 0
    assert begun is not None and moved is not None
    up, down = (now - before for now, before in zip(interface(), moved, strict=True))
    seconds = time.monotonic() - begun
    computing = counted * options.step_seconds
    found = {"computing": computing, "seconds": seconds, "up": up, "down": down}
    return {**found, "included": included, "steps": counted}


def reduce(options) -> None:
    """A rank of DDP: all-reduce the gradient after every step."""
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=options.peer, world_size=options.peers)
    gradient = torch.zeros(model_layout().count)
    dist.all_reduce(gradient[:1])
    moved, begun = interface(), time.monotonic()
    for _ in range(DDP_STEPS):
        time.sleep(options.step_seconds)
        dist.all_reduce(gradient)
    seconds = time.monotonic() - begun
    up, down = (now - before for now, before in zip(interface(), moved, strict=True))
    computing = DDP_STEPS * options.step_seconds
    found = {"computing": computing, "seconds": seconds, "up": up, "down": down}
    print(json.dumps({**found, "included": DDP_STEPS, "steps": DDP_STEPS}))
    dist.destroy_process_group()


def interface() -> tuple[int, int]:
    """Bytes that this namespace's link has sent and received."""
    folder = Path(f"/sys/class/net/{DEVICE}/statistics")
    return int((folder / "tx_bytes").read_text()), int((folder / "rx_bytes").read_text())


def play(net: Star, name: str, url: str, options) -> list[dict[str, float]]:
    """All peers of a row at once."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": net.address(0),
        "MASTER_PORT": "29511",
        "GLOO_SOCKET_IFNAME": DEVICE,
    }
    flags = ["--method", name, "--url", url, "--peers", str(options.peers)]
    flags += ["--rounds", str(options.rounds), "--step-seconds", str(options.step_seconds)]
    children = [
        net.run(
            peer,
            [sys.executable, __file__, *flags, "--peer", str(peer)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for peer in range(options.peers)
    ]
    found = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"{name}: a peer failed")
    return [json.loads(lines.splitlines()[-1]) for lines in found]


def row(name: str, rows: list[dict[str, float]], step_seconds: float) -> str:
    """A line of the table: the peers' mean."""
    mean = {key: sum(each[key] for each in rows) / len(rows) for key in rows[0]}
    share = mean["computing"] / mean["seconds"]
    exchange = mean["seconds"] / mean["steps"] - step_seconds
    verdict = ""
    if name in BARRED:
        verdict = f"{SHARE:.0%}: {'met' if share >= SHARE else 'missed'}"
    elif name == "ddp":
        verdict = f"{min(1.0, step_seconds / max(exchange, 1e-9)):.0%} if wholly overlapped"
    up, down = (mean[way] / mean["steps"] / 1e6 for way in ("up", "down"))
    seconds = f"{mean['seconds'] / mean['steps']:.2f} s"
    return f"| {name} | {share:.1%} | {seconds} | {up:.3f} | {down:.3f} | {verdict} |"


def main() -> None:
    """Print a table for each rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mbit", type=float, nargs="*", default=[10, 100])
    parser.add_argument("--delay-ms", type=float, default=40, help="each way")
    parser.add_argument("--loss", type=float, default=0.0, help="share of packets, each way")
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4, help="counted, after a first one")
    parser.add_argument("--step-seconds", type=float, default=0.5)
    parser.add_argument("--only", nargs="*", default=[], help="words that a row's name has")
    for hidden in ("--method", "--url"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--peer", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.method:
        (reduce if options.method == "ddp" else take_part)(options)
        return
    if why := missing():
        raise SystemExit(f"no link can be emulated here: {why}")
    for mbit in options.mbit:
        with star(options.peers, mbit, options.delay_ms, options.loss) as net:
            print(f"\n{net.measured()}\na step takes {options.step_seconds:g} s\n")
            print("| method | time computing | a step and its waiting | MB up | MB down | bar |")
            print("|---|---|---|---|---|---|")
            url = serve_s3(net)
            for number, name in enumerate(("ddp", *METHODS)):
                if not options.only or any(word in name for word in options.only):
                    place = url.replace("/run?", f"/run{number}?")
                    found = play(net, name, place, options)
                    print(row(name, found, options.step_seconds), flush=True)
            print("\nMB up and down: of a peer's interface for each step, headers included")


if __name__ == "__main__":
    main()
