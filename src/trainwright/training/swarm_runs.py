"""The verbs of `trainwright swarm` as functions: start, join, watch, validate, export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainwright.checkpoint.state import model_state
from trainwright.checkpoint.store import CheckpointStore
from trainwright.data.prepare import open_data
from trainwright.errors import Mistake, UserError
from trainwright.files import write_atomically, write_json
from trainwright.parallel.world import World, join_world
from trainwright.planner.check import recipe_checks
from trainwright.planner.known_model import known_config
from trainwright.planner.plan import Plan
from trainwright.recipe.load import dump_recipe, load_recipe
from trainwright.recipe.schema import Recipe
from trainwright.recipe.swarm import Swarm
from trainwright.swarm.adapting import adapt
from trainwright.swarm.events import Rules
from trainwright.swarm.link import measure_link
from trainwright.swarm.manifest import Manifest
from trainwright.swarm.methods.method import Agreed
from trainwright.swarm.peer import Peer
from trainwright.swarm.peer_card import LONGEST
from trainwright.swarm.runs import genesis_hash, start_run
from trainwright.swarm.scores import Score
from trainwright.swarm.settings import refuse_too_few_bytes
from trainwright.swarm.transports.open import open_transport
from trainwright.training.api import RunResult, finish_run
from trainwright.training.assemble import build_model, what_is_optimised
from trainwright.training.exporting import export_run
from trainwright.training.gathering import Gathering
from trainwright.training.launch import launch_workers
from trainwright.training.machine import usable_cores
from trainwright.training.prepare import prepare_run, total_steps
from trainwright.training.run_directory import RunDirectory, locked, open_run
from trainwright.training.swarm_file import Joined, own_directory
from trainwright.training.swarm_peer import build_peer, method_of, orders, own_identity
from trainwright.training.swarm_place import reach, require_free
from trainwright.training.swarm_tokenizer import (
    CONFIG,
    TOKENIZER,
    packed,
    tokenizer_files,
)
from trainwright.training.swarming import Losses

if TYPE_CHECKING:
    from trainwright.planner.choose import Choice

Say = Callable[[str], None]

_SAY_SECONDS = 5.0


def start(
    recipe: str | Path,
    url: str,
    overrides: Sequence[str] = (),
    *,
    peers: int = 4,
    directory: Path | None = None,
    say: Say = print,
) -> Manifest:
    """Create a run at `url`: its rules, first weights and tokenizer. Nobody trains yet.

    `peers` are how many are expected; `auto` settings are chosen for that. `directory` is this
    machine's run directory, from which it can join as the same peer. Raises UserError.
    """
    path = Path(recipe)
    directory = apart(url, directory or default_directory(url))
    read = load_recipe(path, (*overrides, f"run_directory={directory}"), recipe_checks)
    refuse_unfit(read)
    run = open_run(read)
    if run.has_trained or Joined.read(run) is not None:
        what = "this directory has trained already"
        raise UserError(Mistake(what, "give another --directory", where=str(run.path)))
    with locked(run):
        identity = own_identity(run.path)
        transport = open_transport(url, identity, own_directory(run.path), create=True)
        try:
            require_free(transport, url)
            choice = prepare_run(run, read, path.read_text(), say)
            files = tokenizer_files(run)
            read = with_steps(read, total_steps(read, open_data(run.path).train))
            agreed, gathering = first_weights(run, read)
            section = read.swarm or Swarm()
            adapted = adapt(
                section,
                read.optimizer,
                gathering.layout,
                link=measure_link(transport) if _is_open(section) else None,
                step_seconds=_step_seconds(choice),
                peers=peers,
            )
            if _is_open(section):
                for line in adapted.lines:
                    say(line)
            method = method_of(adapted.settings, read, gathering.layout)
            refuse_too_few_bytes(section, method, adapted.settings.fragments)
            rules = Rules(section.quorum, section.grace, section.deadline, section.silence)
            manifest = Manifest.of(
                read,
                gathering.layout,
                adapted.settings,
                rules,
                genesis_hash(agreed, identity.peer),
                identity.peer,
            )
            transport.put(TOKENIZER, packed(files, manifest.run, identity))
            start_run(transport, identity, manifest, agreed)
        finally:
            transport.close()
    return manifest


def apart(url: str, directory: Path) -> Path:
    """`directory`, which is no part of the run's own folder: a key and weights of one's own do not
    belong into what others read. Raises UserError.
    """
    if "://" not in url.removeprefix("file://"):
        shared, own = Path(url.removeprefix("file://")).resolve(), directory.resolve()
        if shared == own or shared in own.parents or own in shared.parents:
            what = "the run's folder, which all peers read, and this machine's own are not apart"
            raise UserError(Mistake(what, "give another --directory", where=str(directory)))
    return directory


def refuse_unfit(recipe: Recipe) -> None:
    """Raise UserError for what peers cannot train together."""
    mistakes = []
    if recipe.objective.needs_reference:
        what = f"{recipe.objective.kind} asks a second model, which peers' trials do not have"
        mistakes.append(
            Mistake(what, "train an objective without one: sft, orpo, simpo", "objective")
        )
    config = known_config(recipe.model, recipe.tokenizer, recipe.objective)
    moves = recipe.training.router_bias_rate != 0
    if config is not None and config.experts is not None and config.experts.corrected and moves:
        what = "the routers' biases of this model move on each machine alone"
        fix = "write `training.router_bias_rate: 0`"
        mistakes.append(Mistake(what, fix, "training.router_bias_rate"))
    if mistakes:
        raise UserError(mistakes)


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with its length in steps, which peers' own data would make differ otherwise."""
    changes = {"steps": steps, "tokens": None, "epochs": None}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})


def _is_open(section: Swarm) -> bool:
    """Whether anything is left to be chosen by the link."""
    return "auto" in (section.inner_steps, section.codec, section.density)


def _step_seconds(choice: Choice) -> float:
    """Seconds of a step on this machine, as foretold; a second where nothing is."""
    return choice.prediction.step_seconds.value if choice.prediction is not None else 1.0


def first_weights(run: RunDirectory, recipe: Recipe) -> tuple[Agreed, Gathering]:
    """The trained weights that a run begins with, made on the CPU, and what gathers them."""
    plan = Plan.alone("cpu")
    spread = build_model(run, recipe, plan, World(0, 1, torch.device("cpu")))
    gathering = Gathering(spread)
    weights = gathering.weights()
    assert weights is not None
    return Agreed(0, weights), gathering


def join(
    url: str,
    overrides: Sequence[str] = (),
    *,
    directory: Path | None = None,
    name: str = "",
    wait: float = 0.0,
    verbose: bool = False,
    say: Say = print,
) -> RunResult:
    """Take part in the run at `url` until it ends, with all devices of this machine.

    What is kept of it is in `directory`; called again with it, the same peer goes on. `overrides`
    are of what each machine says for itself, as `parallel.tp=2`. A run that is not there yet is
    waited for, up to `wait` seconds. Raises UserError, RunInterrupted or WorkerFailed.
    """
    if not name.isprintable() or len(name) > LONGEST:
        fix = f"give at most {LONGEST} printable characters"
        raise UserError(Mistake(f"{name!r} is no name for a peer", fix, key="--name"))
    directory = apart(url, directory or default_directory(url))
    identity = own_identity(directory)
    manifest, tokenizer = reach(url, identity, own_directory(directory), wait=wait, say=say)
    recipe = own_recipe(manifest, tokenizer, directory, overrides)
    joined = Joined(url, manifest.run, name, manifest.settings)
    joined.require(RunDirectory(directory))
    run = open_run(recipe)
    with locked(run):
        prepare_run(run, recipe, dump_recipe(recipe), say)
        joined.write(run)
        launch_workers(run.path, run.read_plan(), verbose=verbose)
        return finish_run(run)


def own_recipe(
    manifest: Manifest, tokenizer: Path, directory: Path, overrides: Sequence[str] = ()
) -> Recipe:
    """The run's recipe on this machine."""
    own = [f"run_directory={directory}", f"tokenizer.path={tokenizer}"]
    return manifest.recipe((*own, *overrides))


def export(
    url: str, directory: Path, overrides: Sequence[str] = (), *, say: Say = print
) -> tuple[int, Path]:
    """The newest agreed model as a Hugging Face directory; the rounds that it was trained.

    `overrides` say where files are that the recipe names. Raises UserError where there is no run.
    """
    with TemporaryDirectory(prefix="trainwright-swarm-") as folder:
        run, recipe, manifest = _visit(url, Path(folder), overrides)
        plan = Plan.alone("cpu")
        spread = build_model(run, recipe, plan, World(0, 1, torch.device("cpu")))
        gathering = Gathering(spread)
        joined = Joined(url, manifest.run, "", manifest.settings)
        method = method_of(manifest.settings, recipe, gathering.layout)
        peer, transport = build_peer(joined, recipe, method, steps_of(recipe), run.path, say)
        try:
            agreed = caught_up(peer, say)
        finally:
            peer.leave()
            peer.close()
            transport.close()
        gathering.put_back(agreed.weights)
        with CheckpointStore(run.checkpoints) as store:
            store.claim()
            step = max(1, agreed.round * method.inner_steps)
            store.save(step, model_state(spread.parts, spread.pieces), {"step": step})
            store.wait()
        return agreed.round, export_run(run, directory)


def validate(
    url: str,
    overrides: Sequence[str] = (),
    *,
    directory: Path | None = None,
    rounds: int | None = None,
    say: Say = print,
) -> None:
    """Try all contributions of the run at `url` on data, and publish what they are worth.

    Trains nothing. Goes on for `rounds` rounds, or until interrupted. Raises UserError.
    """
    default = default_directory(url)
    directory = apart(url, directory or default.with_name(f"{default.name}-validator"))
    run, recipe, manifest = _visit(url, directory, overrides)
    if manifest.settings.method == "noloco" or not (recipe.swarm or Swarm()).trust.scores:
        what = "nobody tries contributions in this run"
        fix = "its method is one without agreement, or its recipe says `trust.scores: false`"
        raise UserError(Mistake(what, fix, where=url))
    joined = Joined(url, manifest.run, "validator", manifest.settings)
    joined.write(run)
    prepare_run(run, recipe, dump_recipe(recipe), say)
    world = join_world()
    micro_batch = max(n for n in range(1, 9) if recipe.batch_sequences % n == 0)
    plan = replace(
        Plan.alone("cuda" if world.device.type == "cuda" else "cpu"),
        micro_batch=micro_batch,
        accumulation=recipe.batch_sequences // micro_batch,
        sequence_length=recipe.data.sequence_length,
        precision=recipe.training.precision,
        threads=usable_cores(),
    )
    spread = build_model(run, recipe, plan, world)
    gathering = Gathering(spread)
    objective, _ = what_is_optimised(run, recipe, plan, world, spread)
    method = method_of(manifest.settings, recipe, gathering.layout)
    losses = Losses(spread, objective, orders(run, recipe), method.inner_steps)
    steps = steps_of(recipe)
    peer, transport = build_peer(joined, recipe, method, steps, run.path, say)

    def loss(round: int, weights: Tensor, who: str | None) -> float:
        gathering.put_back(weights)
        return losses(who, round)

    try:
        first, last = caught_up(peer, say).round, -(-steps // method.inner_steps)
        if first >= last:
            what = "the run is over: all of its rounds are agreed"
            raise UserError(Mistake(what, "there is nothing to be tried", where=url))
        say(f"watching from round {first}")
        if peer.me != manifest.starter:
            say("only those who train, or started the run, are heard: this is for you to read")
        while peer.round < (last if rounds is None else min(last, first + rounds)):
            peer.outcome(wait=1.0)
            if (round := peer.trial_round) is not None:
                for line in score_lines(round, peer.score(partial(loss, round))):
                    say(line)
    finally:
        peer.leave()
        peer.close()
        transport.close()


def score_lines(round: int, scores: Mapping[str, Score]) -> Iterator[str]:
    """What a validator says of each contribution that it tried."""
    for peer, score in sorted(scores.items()):
        yield (
            f"round {round}: {peer[:6]} lowers the loss by {score.assigned:+.4f} on its own data, "
            f"by {score.unassigned:+.4f} on other data"
        )


def caught_up(peer: Peer, say: Say) -> Agreed:
    """What a peer that does not train finds to be agreed; it waits for somebody who has it."""
    agreed, told = None, False
    while agreed is None:
        agreed = peer.start(active=False, wait=_SAY_SECONDS)
        if agreed is None and not told:
            say("waiting for a peer that has the newest weights")
            told = True
    return agreed


def _visit(
    url: str, directory: Path, overrides: Sequence[str] = ()
) -> tuple[RunDirectory, Recipe, Manifest]:
    """A run directory for somebody who does not train, with what is needed to build the model."""
    own = own_directory(directory)
    manifest, tokenizer = reach(url, own_identity(directory), own, visit=True)
    recipe = own_recipe(manifest, tokenizer, directory, overrides)
    run = open_run(recipe)
    write_atomically(run.resolved, dump_recipe(recipe))
    shutil.copytree(tokenizer, run.tokenizer, dirs_exist_ok=True)
    config = json.loads((tokenizer.parent / CONFIG).read_text())
    write_json(run.model_config, config)
    return run, recipe, manifest


def steps_of(recipe: Recipe) -> int:
    """Steps of each peer, which whoever started the run has fixed."""
    assert recipe.training.steps is not None
    return recipe.training.steps


def default_directory(url: str) -> Path:
    """`runs/` and the last part of the run's URL, without a ring's secret."""
    last = url.partition("?")[0].rstrip("/").rpartition("/")[2].rpartition("@")[2]
    return Path("runs") / (last.replace(":", "-") if last.strip(".") else "swarm")
