"""Bytes of a contribution, as they cross a network interface: all headers included.

A peer in a namespace of its own writes real messages (method, codec, header, signature) of the 4 M
model and puts them into an S3 bucket in another namespace, then fetches them; between the two is an
emulated link, whose counters are read before and after. Changes are random numbers, with tensors
of unlike size, since places are then as hard to code as they can be.

    python benchmarks/swarm_bytes.py [--rounds 6]           (needs root, and moto's S3 server)

In the store, contributions are set against 4 bytes a parameter and outer step, without any header;
at the interface, where TCP and IP add their 4 % to all, against fp32 sent in the same way. DeMo is
set against its release, which writes an int64 and an fp32 for each of 32 coefficients of 4096.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to be run as a file, too

from benchmarks.emulated_links.s3 import serve_s3
from benchmarks.emulated_links.star import Star, missing, star
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.models.weights import new_model
from trainwright.recipe.presets import TABLE
from trainwright.swarm.identity import Identity
from trainwright.swarm.layout import Layout, take
from trainwright.swarm.message import write_message
from trainwright.swarm.methods.build import build_method
from trainwright.swarm.methods.method import Agreed
from trainwright.swarm.settings import DEFAULTS, Settings
from trainwright.swarm.transports.open import open_transport

RUN = "0" * 32
FP32 = 4.0  # bytes a parameter
DEMO_RELEASE = 32 / 4096 * 12

# Rows of the table: settings, and how many times less they are to be (0: no bar was set).
ROWS: dict[str, tuple[Settings, float]] = {
    "diloco, fp32": (replace(DEFAULTS["diloco"], codec="fp32"), 0),
    "diloco, int8": (DEFAULTS["diloco"], 3.9),
    "streaming, 4-bit E3M0": (DEFAULTS["streaming"], 0),
    "muloco, 2-bit": (DEFAULTS["muloco"], 0),
    "sparseloco, 12-bit places": (replace(DEFAULTS["sparseloco"], codec="top-k-12bit"), 0),
    "sparseloco, coded places": (DEFAULTS["sparseloco"], 200),
    "noloco, bf16": (DEFAULTS["noloco"], 0),
    "demo, bf16 coefficients": (DEFAULTS["demo"], 3.4),
    "distro, 1-bit": (DEFAULTS["distro"], 0),
}


def model_layout(size: str = "4m") -> Layout:
    """The weights of a new Llama of a preset's size, with the preset's vocabulary."""
    shape = next(row for row in TABLE if (row.family, row.size) == ("llama", size))
    config = new_hf_config("llama", shape.config, shape.vocabulary)
    model = new_model(decoder_config(config), device="meta")
    return Layout.of(dict(model.named_parameters()))


def messages(settings: Settings, layout: Layout, rounds: int) -> list[bytes]:
    """A peer's contributions to so many rounds."""
    method, identity = build_method(settings, layout), Identity.new()
    generator = torch.Generator().manual_seed(0)
    agreed = Agreed(0, torch.zeros(layout.count))
    own, written = method.begin(agreed), []
    for round in range(rounds):
        change = torch.randn(layout.count, generator=generator)
        for place in layout.slices.values():
            change[place] *= 10 ** (2 * float(torch.rand(1, generator=generator)) - 4)
        local = take(change, method.fragment(round))
        planes, own = method.outgoing(agreed, own, round, local, 1e-3)
        body = {"base": "0" * 64, "tokens": 123_456, "steps": 30, "loss": 3.14159}
        written.append(write_message("contribution", RUN, round, body, planes, identity))
    return written


def send(row: str, url: str, rounds: int) -> None:
    """In the peer's namespace: write, then put, then fetch, each when standard input says so."""
    data = messages(ROWS[row][0], model_layout(), rounds)
    with tempfile.TemporaryDirectory() as folder:
        transport = open_transport(url, Identity.new(), Path(folder))
        print(json.dumps([len(message) for message in data]), flush=True)
        for act in ("put", "get"):
            sys.stdin.readline()
            for round, message in enumerate(data):
                key = f"rounds/{round}/contribution"
                if act == "put":
                    transport.put(key, message)
                else:
                    assert transport.get(transport.me, key, len(message)) == message
            print("done", flush=True)


def measure(net: Star, row: str, url: str, rounds: int) -> tuple[int, int, int]:
    """Bytes of the messages, and of the interface while they go up and while they come down."""
    command = [sys.executable, __file__, "--send", row, "--url", url, "--rounds", str(rounds)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    child = net.run(0, command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    assert child.stdin is not None and child.stdout is not None
    sizes = json.loads(child.stdout.readline())
    counters = [net.moved(0)]
    for _ in range(2):
        child.stdin.write("go\n")
        child.stdin.flush()
        assert child.stdout.readline() == "done\n"
        counters.append(net.moved(0))
    child.wait()
    (sent, _), (sent_then, got), (_, got_then) = counters
    return sum(sizes), sent_then - sent, got_then - got


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="contributions of each row")
    parser.add_argument("--only", nargs="*", default=[], help="words that a row's name has")
    parser.add_argument("--send", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.send:
        send(options.send, options.url, options.rounds)
        return
    if why := missing():
        raise SystemExit(f"no link can be emulated here: {why}")
    count = model_layout().count
    with star(1, mbit=100, delay_ms=5) as net:
        url = serve_s3(net)
        print(f"{count:,} parameters, {options.rounds} contributions of each; {net.measured(1)}\n")
        print("| method | bytes in the store | sent | received | less | less sent | than | bar |")
        print("|---|---|---|---|---|---|---|---|")
        base = 0.0
        for row, (settings, bar) in ROWS.items():
            if base and options.only and not any(word in row for word in options.only):
                continue
            rounds = -(-options.rounds // settings.fragments) * settings.fragments
            # Of the whole model: a round of `streaming` has a fragment of it.
            values = count * rounds / settings.fragments
            size, up, down = (moved / values for moved in measure(net, row, url, rounds))
            base = base or up
            demo = settings.method == "demo"
            times = DEMO_RELEASE / size if demo else FP32 / size
            times_sent = DEMO_RELEASE / up if demo else base / up
            cells = [row, *(f"{each:.5f}" for each in (size, up, down))]
            cells += [f"{times:.1f} ×", f"{times_sent:.1f} ×", "its release" if demo else "fp32"]
            met = "met" if min(times, times_sent) >= bar else "missed"
            cells.append(f"{bar:g}: {met}" if bar else "")
            print(f"| {' | '.join(cells)} |", flush=True)
        print("\nbytes a parameter and outer step; the bar is met by both figures or missed")


if __name__ == "__main__":
    main()
