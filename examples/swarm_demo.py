"""Four peers on this machine train one model through a folder: one is killed, and one lies.

    make swarm-demo

Three train with `trainwright swarm join`, each in processes of its own, as on three machines. The
third of them is killed in the middle (SIGKILL). The fourth claims to have trained and sends noise.
In the end the model that the others agree on is fetched and completes a line of code.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

HERE = Path(__file__).parent
NAMES = ("anna", "ben", "carl")
KILLED, KILLED_AFTER = "carl", 6  # rounds
CORES = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def trainwright(*arguments: str | Path) -> list[str]:
    """The command line, of the Python that runs this."""
    return [sys.executable, "-m", "trainwright", *map(str, arguments)]


def started(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """A process that Ctrl-C does not reach: what it started is ended with it, by `kill`."""
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            env={**os.environ, **CORES},
            start_new_session=True,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """A peer and its workers, at once and without a word."""
    if process.poll() is None:
        peer = psutil.Process(process.pid)
        for each in [peer, *peer.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


class Teller:
    """Prints what happens, each line with the seconds since the beginning."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:5.0f} s  {text}", flush=True)


def follow(run: Path, peers: dict[str, subprocess.Popen[bytes]], say: Teller) -> None:
    """Tell of every round as it is agreed, kill a peer on the way, until the others are done."""
    from trainwright.swarm.identity import Identity
    from trainwright.swarm.runs import find_run
    from trainwright.swarm.status import Watch
    from trainwright.swarm.transports.open import open_transport

    transport = open_transport(str(run), Identity.new(), run)
    manifest = find_run(transport)
    assert manifest is not None
    watch, told, named = Watch(transport, manifest), 0, set[str]()
    honest = [name for name in NAMES if name != KILLED]
    while any(peers[name].poll() is None for name in honest):
        time.sleep(0.5)
        status = watch.look()
        training = [each for each in status.peers if each.card.name in NAMES]
        for each in status.peers:
            if each.excluded and each.peer not in named:
                named.add(each.peer)
                say(f"{each.card.name} is excluded: {each.excluded}")
        round = max((each.card.round for each in training), default=0)
        if round > told:
            told = round
            losses = (
                f"{each.card.name} {each.card.loss:.2f}"
                for each in sorted(training, key=lambda each: each.card.name)
                if each.card.loss is not None and each.card.round >= round - 1
            )
            say(f"round {round} agreed; losses: {', '.join(losses)}")
        if round >= KILLED_AFTER and peers[KILLED].poll() is None:
            kill(peers[KILLED])
            say(f"{KILLED} is killed (SIGKILL); nobody told the others")
    transport.close()


def main() -> None:
    """The whole demonstration; exit code 1 if anything went another way than it should."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to keep all files; default temporary")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="swarm-demo-"))
    run, say = folder / "shared", Teller()
    recipe = HERE / "swarm.yaml"
    say(f"anna starts a run in {run}")
    command = trainwright("swarm", "start", recipe, "--run", run, "--directory", folder / "anna")
    subprocess.run(command, check=True, env={**os.environ, **CORES}, stdout=subprocess.DEVNULL)
    peers = {
        name: started(
            trainwright("swarm", "join", run, "--directory", folder / name, "--name", name),
            folder / f"{name}.log",
        )
        for name in NAMES
    }
    liar = [sys.executable, str(HERE / "swarm_liar.py"), str(run), str(folder / "mallory")]
    peers["mallory"] = started(liar, folder / "mallory.log")
    say("anna, ben and carl join; mallory joins too, and sends noise instead of training")
    try:
        follow(run, peers, say)
    finally:
        for process in peers.values():
            kill(process) if process.poll() is None else None
    failed = [name for name in NAMES if name != KILLED and peers[name].returncode != 0]
    if failed:
        print((folder / f"{failed[0]}.log").read_text()[-3000:], file=sys.stderr)
        raise SystemExit(f"{failed[0]} failed")
    say("the run is over; this is how it stands")
    subprocess.run(trainwright("swarm", "status", run), check=True)
    model = folder / "model"
    subprocess.run(trainwright("swarm", "export", run, model), check=True)
    say("what the agreed model makes of a line of code:")
    prompt = "def read_lines(path):\n"
    subprocess.run(trainwright("generate", model, prompt, "--max-new-tokens", "48"), check=True)
    say(f"done; everything is in {folder}")


if __name__ == "__main__":
    main()
