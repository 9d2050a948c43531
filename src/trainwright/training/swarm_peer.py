"""What makes a run directory's trainer a peer of the run that its `swarm.json` names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainwright.checkpoint.store import CheckpointStore
from trainwright.data.batches import Batches
from trainwright.data.prepare import open_data
from trainwright.errors import Mistake, UserError
from trainwright.optim.held import HeldGradients
from trainwright.optim.schedules import learning_rate
from trainwright.parallel.world import World
from trainwright.recipe.schema import Recipe
from trainwright.recipe.swarm import Swarm
from trainwright.swarm.aggregation import combine
from trainwright.swarm.identity import Identity
from trainwright.swarm.layout import Layout
from trainwright.swarm.methods.build import build_method
from trainwright.swarm.methods.method import Method
from trainwright.swarm.peer import Peer
from trainwright.swarm.runs import find_run
from trainwright.swarm.settings import Settings
from trainwright.swarm.transports.open import open_transport
from trainwright.swarm.transports.transport import Transport, TransportError
from trainwright.training.loop import Trainer
from trainwright.training.metrics import MetricsWriter
from trainwright.training.progress import Progress
from trainwright.training.run_directory import RunDirectory
from trainwright.training.step import TrainStep
from trainwright.training.swarm_file import Joined, own_directory
from trainwright.training.swarm_place import away
from trainwright.training.swarming import Place, SwarmHook, Work, data_seed

_CACHED_ORDERS = 8
_SENT = "swarm.sent"  # in checkpoints


def own_identity(run: Path) -> Identity:
    """The peer that this run directory is, from now on."""
    return Identity.kept_at(own_directory(run) / "key.pem")


def method_of(settings: Settings, recipe: Recipe, layout: Layout) -> Method:
    """The method, with the recipe's way of making one of all contributions."""
    trust = (recipe.swarm or Swarm()).trust
    merged = partial(combine, average=settings.average, aggregation=trust.aggregation)
    return build_method(settings, layout, merged)


def build_peer(
    joined: Joined,
    recipe: Recipe,
    method: Method,
    total_steps: int,
    directory: Path,
    say: Callable[[str], None],
) -> tuple[Peer, Transport]:
    """The peer of a run directory, not begun yet, and its transport, which is to be closed last.

    Raises UserError where the run is not what was joined, or where its model is another.
    """
    identity = own_identity(directory)
    try:
        transport = open_transport(joined.url, identity, own_directory(directory))
        manifest = find_run(transport)
    except TransportError as error:
        raise away(error, joined.url) from error
    if manifest is None or manifest.run != joined.run:
        there = f"run {manifest.run}" if manifest is not None else "no run"
        what = f"this directory joined run {joined.run}, and there is {there}"
        raise UserError(Mistake(what, "join the new one in another directory"))
    if manifest.layout != method.layout:
        what = "the model of this run is not the one that this recipe makes here"
        raise UserError(Mistake(what, "say `model.path=` for the same model"))

    peer = Peer(
        transport,
        identity,
        manifest,
        method,
        recipe.swarm or Swarm(),
        own_directory(directory),
        **terms_of(recipe, joined.settings, method, total_steps),
        say=say,
        name=joined.name,
    )
    return peer, transport


def terms_of(
    recipe: Recipe, settings: Settings, method: Method, total_steps: int
) -> dict[str, Any]:
    """What all peers must understand alike besides, as arguments of `Peer`."""

    def rate(round: int) -> float:
        index = round * method.inner_steps
        return learning_rate(index, total_steps, recipe.optimizer.learning_rate, recipe.schedule)

    rows = recipe.batch_sequences * recipe.data.sequence_length
    return {"rate": rate, "most_tokens": rows * settings.inner_steps, "seed": recipe.seed}


class PeerTrainer:
    """The swarm's part of an assembled trainer: the hook, and what is saved with checkpoints."""

    def __init__(
        self,
        run: RunDirectory,
        joined: Joined,
        recipe: Recipe,
        step: TrainStep,
        trainer: Trainer,
        held: HeldGradients | None,
        writer: MetricsWriter | None,
        progress: Progress | None,
    ) -> None:
        self.transport: Transport | None = None
        say = progress.say if progress is not None else print
        world: World = step.spread.mesh.world
        self.me, self.exported = own_identity(run.path).peer, run.export
        self.hook = SwarmHook(
            trainer,
            step.spread,
            step.objective,
            lambda layout: method_of(joined.settings, recipe, layout),
            held=held,
            data_of=orders(run, recipe),
            quorum=(recipe.swarm or Swarm()).quorum,
            writer=writer,
            say=say,
        )
        trainer.data = orders(run, recipe)(self.me)
        if world.is_first:
            peer, self.transport = build_peer(
                joined, recipe, self.hook.method, trainer.total_steps, run.path, say
            )
            self.hook.peer = peer

    def begin(self, store: CheckpointStore, step: int, meta: dict | None) -> int:
        """Catch up with the others; the step to begin with. `meta` is of the checkpoint at `step`.

        Collective. Raises UserError where the run is over.
        """
        saved, sent, offered = None, None, None
        if meta is not None and "swarm" in meta:
            values = meta["swarm"]
            saved = Place(values["round"], values["steps"], Work(**values["work"]))
            if values["sent"]:
                offered = Work(**values["offered"])
                sent = torch.empty(values["sent"]) if self.hook.peer is not None else None
                store.load(step, {} if sent is None else {_SENT: sent})
        first = self.hook.begin(saved, sent, offered, step)
        if first >= self.hook.trainer.total_steps:
            what = "the run is over: all of its rounds are agreed"
            fix = "fetch the model: trainwright swarm export URL"
            if self.exported.is_dir():
                fix = f"its model is in {self.exported}"
            raise UserError(Mistake(what, fix))
        if first < step:
            store.rewind(first)  # those steps come again, from what was agreed
        return first

    def saved(self) -> tuple[dict[str, Tensor], dict]:
        """What a checkpoint keeps of a round under way; what the peer has is made durable besides:
        error feedback, agreed weights, the outer optimizer.
        """
        hook = self.hook
        if hook.peer is not None:
            hook.peer.save()
        sent, offered = hook.sent, hook.offered or Work()
        # All workers write the same of it, and only the first one has it.
        (count,) = hook.world.first_workers([0 if sent is None else len(sent)])
        meta = {**asdict(hook.place), "sent": count, "offered": asdict(offered)}
        return {} if sent is None else {_SENT: sent}, {"swarm": meta}

    def close(self) -> None:
        """End the peer."""
        if self.hook.peer is not None:
            self.hook.peer.close()
        if self.transport is not None:
            self.transport.close()


def orders(run: RunDirectory, recipe: Recipe) -> Callable[[str | None], Batches]:
    """The training data in the order of a peer, or of nobody."""

    @lru_cache(maxsize=_CACHED_ORDERS)
    def order(peer: str | None) -> Batches:
        return open_data(run.path, data_seed(recipe.seed, peer)).train

    return order
