"""`parallel: auto`: the plan that is predicted to be best on the machine at hand, and why that one.

Where the recipe gives a layout, or the model's shape is not known, `planner.make` derives the plan
as ever. The search takes the place of its choices only where that is worth while.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from trainwright.errors import Mistake, UserError
from trainwright.models.families import DecoderConfig
from trainwright.planner.beside import Beside
from trainwright.planner.cluster.calibration import Calibration, read_calibration
from trainwright.planner.cluster.describe import Cluster
from trainwright.planner.cluster.load import load_cluster
from trainwright.planner.cluster.this_machine import this_machine
from trainwright.planner.cost.memory import memory_timeline
from trainwright.planner.cost.prediction import Prediction
from trainwright.planner.cost.step import predict
from trainwright.planner.job import Job
from trainwright.planner.known_model import known_config
from trainwright.planner.make import finished_plan, make_plan, workers_of
from trainwright.planner.plan import Machine, Origin, Plan
from trainwright.planner.plan_record import Memory, PlanRecord, lasting_facts
from trainwright.planner.search.asked import Asked, asked_of, machines_here
from trainwright.planner.search.devices import launched_ranks
from trainwright.planner.search.frontier import Ranked
from trainwright.planner.search.ranking import rank
from trainwright.planner.step_slices import step_timeline
from trainwright.recipe.schema import Recipe

# A plan that is predicted to be so many times as fast as the simplest is taken instead of it:
# nearer ones cannot be told apart, and the simplest is the one that is understood best.
WORTHWHILE = 1.03
_LOOKED_AT = 3  # plans that are asked for where nobody says how many


@dataclass(frozen=True)
class Choice:
    """A plan with the reason for it, and what is foretold of it, where the model is known.

    `ranked` are the search's best, best first; () where nothing was searched.
    """

    plan: Plan
    origin: Origin
    reason: str
    question: Question | None = None
    prediction: Prediction | None = None
    ranked: tuple[Prediction, ...] = ()

    def record(self, machine: Machine) -> PlanRecord:
        """What a run on `machine` keeps of it."""
        memory: Memory = ()
        if self.prediction is not None and self.question is not None:
            job, here = self.question.job, self.question.here(self.plan.world_size)
            timeline = step_timeline(self.prediction)
            memory = tuple(map(tuple, memory_timeline(job, self.plan, timeline, here)))
        facts = lasting_facts(machine)
        return PlanRecord(self.plan, self.origin, self.reason, facts, self.prediction, memory)


def choose_plan(
    recipe: Recipe,
    machine: Machine,
    config: DecoderConfig | None = None,
    steps: int | None = None,
    native: bool | None = None,
    beside: Beside | None = None,
    *,
    top: int = 0,
    visible_share: float = 1.0,
) -> Choice:
    """The plan of `recipe` on `machine`; the first six arguments are those of `make_plan`.

    `visible_share` is what packed documents leave of attention's work (`planner.job`). `top` plans
    are wanted to be tried, so they are searched for even where nothing has been
    measured. Raises `UserError` for what cannot run, or where plans are wanted and there is nothing
    to search.
    """
    config = config or known_config(recipe.model, recipe.tokenizer, recipe.objective)
    obstacle = _obstacle(recipe, config, native)
    if top and obstacle:
        what = f"there are no plans to choose from: {obstacle}"
        fix = "leave `--tune` out, or write `parallel: auto`"
        raise UserError(Mistake(what, fix, key="parallel"))
    if config is None or native is False:
        plan = make_plan(recipe, machine, config, steps, native, beside)
        return Choice(plan, "derived", obstacle)
    question = Question(recipe, machine, config, steps, beside, visible_share)
    if obstacle:
        return question.choice(question.predict(question.simplest), "derived", obstacle)
    return question.answer(top)


def _obstacle(recipe: Recipe, config: DecoderConfig | None, native: bool | None) -> str:
    """Why nothing is searched; "" where something is."""
    if not recipe.parallel.is_searched:
        return "the recipe gives the layout"
    if native is False:
        return "what a model of transformers' own class costs is not known"
    return "" if config is not None else "the model's shape is not known here"


@dataclass
class Question:
    """A recipe whose model is known, on a machine."""

    recipe: Recipe
    machine: Machine
    config: DecoderConfig
    steps: int | None
    beside: Beside | None
    visible_share: float = 1.0

    @cached_property
    def asked(self) -> Asked:
        """What the recipe fixes, and what it leaves open."""
        return asked_of(
            self.recipe,
            self.config,
            self.here(),
            beside=self.beside,
            has_compiler=self.machine.can_compile,
        )

    @cached_property
    def job(self) -> Job:
        """What is trained."""
        return replace(self.asked.job, visible_share=self.visible_share)

    @cached_property
    def calibration(self) -> Calibration | None:
        """What has been measured of this machine."""
        return read_calibration(self.machine)

    @cached_property
    def simplest(self) -> Plan:
        """The plan without a search. Raises `UserError` where that cannot run."""
        return make_plan(self.recipe, self.machine, self.config, self.steps, True, self.beside)

    @cached_property
    def described(self) -> Cluster | None:
        """The recipe's `cluster`, where a launcher has started the workers on it."""
        if self.recipe.cluster is None or not self.machine.launched:
            return None
        cluster, workers = load_cluster(self.recipe.cluster), self.machine.launched
        if cluster.devices != workers:
            what = f"it describes {cluster.devices:,} devices, and {workers:,} workers were started"
            fix = "describe the machines that take part, and no others"
            raise UserError(Mistake(what, fix, key="cluster"))
        return cluster

    def here(self, workers: int | None = None) -> Cluster:
        """What so many workers run on: as the recipe describes it, or this machine."""
        return self.described or this_machine(self.machine, self.calibration, workers=workers)

    def predict(self, plan: Plan) -> Prediction:
        """What a plan costs here."""
        return predict(self.job, plan, self.here(plan.world_size))

    def choice(
        self, found: Prediction, origin: Origin, reason: str, ranked: tuple[Prediction, ...] = ()
    ) -> Choice:
        """The choice of a plan."""
        return Choice(found.plan, origin, reason, self, found, ranked)

    def answer(self, top: int) -> Choice:
        """The best plan, or the simplest where none is much better."""
        try:
            simplest = self.predict(self.simplest)
        except UserError:
            ranked = self.ranked(max(top, _LOOKED_AT))
            if not ranked:
                raise
            reason = "searched: the simplest plan is not possible"
            return self.choice(ranked[0], "searched", reason, ranked)
        measured = self.calibration is not None or self.described is not None
        if self.machine.device_kind == "cpu" and not measured:
            # What a CPU reaches differs too much for a guess to move anybody off one process.
            reason = "the simplest: `trainwright doctor --calibrate` has not measured this machine"
            ranked = self.ranked(top) if top else ()
            return self.choice(simplest, "derived", reason, ranked)
        ranked = self.ranked(max(top, _LOOKED_AT))
        fits = simplest.memory.fits
        gain = simplest.step_seconds.value / ranked[0].step_seconds.value if ranked else 0.0
        if not ranked or (fits and gain < WORTHWHILE):
            reason = "searched: nothing is predicted to be 3% faster than the simplest"
            return self.choice(simplest, "searched", reason, ranked)
        reason = f"searched: predicted to take {1 / gain:.0%} of the simplest plan's time"
        if not fits:
            reason = "searched: the simplest plan is not predicted to fit into the memory"
        return self.choice(ranked[0], "searched", reason, ranked)

    def ranked(self, top: int) -> tuple[Prediction, ...]:
        """The `top` best plans, best first; none where no plan is legal and fits."""
        workers, fixed = workers_of(self.recipe, self.machine), dict(self.asked.fixed)
        if self.recipe.training.recompute == "auto":
            fixed.pop("recompute", None)
        clusters = machines_here(self.machine, self.calibration)
        if self.machine.launched or self.recipe.parallel.workers != "auto":
            fixed["world_size"] = workers
            clusters = [self.here(workers)]
        try:
            found = rank(self.job, clusters, like=self.asked.like, fixed=fixed, top=top).best
        except UserError:  # nothing is legal
            return ()
        return tuple(map(self._finished, found))

    def _finished(self, found: Ranked) -> Prediction:
        """A plan that the search has found, as it would be run here."""
        plan = finished_plan(self.recipe, found.plan, self.machine, self.config, self.steps)
        if self.described is None:
            return self.predict(plan)
        # The launcher has numbered the workers as the pools are described.
        plan = replace(plan, ranks=launched_ranks(self.described, found.cluster))
        return predict(self.job, plan, found.cluster)
