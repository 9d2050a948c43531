"""What happens after a step: metrics and progress, evaluation and samples, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from trainwright.checkpoint.state import State
from trainwright.checkpoint.store import CheckpointStore
from trainwright.comm.meter import Meter
from trainwright.data.batches import Batches
from trainwright.objectives.objective import Objective
from trainwright.parallel.spread import SpreadModel, force_eager
from trainwright.recipe.schema import Recipe
from trainwright.resilience.out_of_memory import peak_bytes
from trainwright.rollout.engine import Prompt, generate
from trainwright.rollout.prompts import chat_prompt
from trainwright.rollout.sampling import SamplingParams
from trainwright.training.evaluate import HeldOutLoss, held_out_loss
from trainwright.training.metrics import MetricsWriter
from trainwright.training.progress import Progress
from trainwright.training.reference import Reference
from trainwright.training.run_directory import RunDirectory
from trainwright.training.step import StepStats
from trainwright.training.tasks import Examiner, save_details


class Every:
    """Tells when a count has come to a multiple of `every`, or past one where it skips some."""

    def __init__(self, every: int) -> None:
        self.every, self.before = every, -1

    def passed(self, done: int) -> bool:
        """Whether it has since the last call; to be called with every count."""
        before = done - 1 if self.before < 0 else self.before
        self.before = done
        return done // self.every > before // self.every


class MetricsHook:
    """Writes a record of each step and moves the progress line; only the first worker has one."""

    def __init__(
        self,
        writer: MetricsWriter,
        progress: Progress,
        *,
        log_every: int,
        tokens_per_step: int,
        mfu_tokens_per_second: float | None,
        device: torch.device,
    ) -> None:
        self.writer, self.progress = writer, progress
        self.log_every, self.tokens_per_step = log_every, tokens_per_step
        self.mfu_tokens_per_second, self.device = mfu_tokens_per_second, device
        self.meter: Meter | None = None  # set where there are other workers to talk to

    def after_step(self, done: int, stats: StepStats, seconds: float, last: bool) -> None:
        rate = self.tokens_per_step / seconds
        record = {
            "kind": "step",
            "step": done,
            "loss": stats.loss,
            "learning_rate": stats.learning_rate,
            "gradient_norm": stats.gradient_norm,
            "tokens": self.tokens_per_step,
            "tokens_total": done * self.tokens_per_step,
            "seconds": seconds,
            "tokens_per_second": rate,
            "mfu": rate / self.mfu_tokens_per_second if self.mfu_tokens_per_second else None,
            "memory_bytes": peak_bytes(self.device.type),
            "batch_hash": stats.batch_hash,
            "time": time.time(),
        }
        record.update(stats.router)
        record.update(stats.figures)
        if self.meter is not None:
            moved = self.meter.step()
            record["traffic"] = {name: traffic.record() for name, traffic in moved.items()}
        if stats.skipped:
            record["skipped"] = True
        if done % self.log_every == 0 or last:
            self.writer.write(record)
        self.progress.step(record)


class ForgetTrafficHook:
    """Comes last: what evaluation and checkpoints moved is not the next step's traffic."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def after_step(self, done: int, stats: StepStats, seconds: float, last: bool) -> None:
        self.meter.step()


class EvaluationHook:
    """Scores held-out data, asks tasks' questions and writes samples every so often, and after the
    last step.
    """

    def __init__(
        self,
        run: RunDirectory,
        recipe: Recipe,
        every: int,
        total_steps: int,
        validation: dict[str, Batches],
        spread: SpreadModel,
        objective: Objective,
        reference: Reference | None,
        tokenizer: Callable[[], Any],
        writer: MetricsWriter | None,
        progress: Progress | None,
    ) -> None:
        self.run, self.recipe = run, recipe
        self.every, self.total_steps = Every(every), total_steps
        self.validation, self.spread, self.objective = validation, spread, objective
        self.reference = reference
        self.plan, self.world = spread.plan, spread.mesh.world
        self.tokenizer = tokenizer
        self.writer, self.progress = writer, progress
        self.newest: tuple[int, float] | None = None  # step and loss, for `checkpoint.keep_best`

    def after_step(self, done: int, stats: StepStats, seconds: float, last: bool) -> None:
        finished, due = done == self.total_steps, self.every.passed(done)
        if not finished and (not due or stats.stop_requested):
            return
        results: list[HeldOutLoss] = []
        rows = self.recipe.evaluation.rows
        for name, batches in self.validation.items():
            result = self._score(batches, None if finished else rows)
            if self.writer is not None and self.progress is not None:
                for of, part in result.named(name):
                    record = {"kind": "evaluation", "step": done, "name": of, **part.record()}
                    self.writer.write(record)
                    self.progress.evaluation(record)
            if finished and rows is not None and self.recipe.checkpoint.keep_best:
                result = self._score(batches, rows)  # what earlier checkpoints were scored on
            results.append(result)
        self._ask(done, finished)
        with force_eager():
            self._sample(done)
        targets = sum(result.targets for result in results)
        if targets:
            mean = sum(result.loss * result.targets for result in results) / targets
            self.newest = (done, mean)

    def _score(self, batches: Batches, most_rows: int | None) -> HeldOutLoss:
        # On a CPU, not compiled again for a short last pass. On a GPU the shape is training's,
        # and packed attention is only a fused kernel when compiled.
        on_cpu = self.world.device.type == "cpu"
        with force_eager() if on_cpu else nullcontext():
            return held_out_loss(
                self.spread,
                self.objective,
                batches,
                micro_batch=self.plan.micro_batch,
                most_rows=most_rows,
                reference=self.reference,
            )

    def _ask(self, done: int, finished: bool) -> None:
        tasks = [t for t in self.recipe.evaluation.tasks if finished or t.while_training]
        if not tasks:
            return
        examiner = Examiner(
            self.spread, self.tokenizer(), self.run.tokenizer, micro_batch=self.plan.micro_batch
        )
        for task in tasks:
            result = examiner.run(task)
            if self.writer is not None and self.progress is not None:
                save_details(result, self.run.answers(result.name, done))
                record = {"kind": "task", "step": done, **result.record()}
                self.writer.write(record)
                self.progress.task(record)

    def _sample(self, done: int) -> None:
        samples = self.recipe.evaluation.samples
        # Where no worker has all of the model, all of them generate together.
        if not samples.prompts or (self.spread.alone and not self.world.is_first):
            return
        params = SamplingParams(
            max_new_tokens=samples.max_new_tokens,
            temperature=samples.temperature,
            top_p=samples.top_p,
            seed=self.recipe.seed,
        )
        tokenizer, chat = self.tokenizer(), samples.chat
        if chat is None:
            chat = self.recipe.learns_examples and bool(tokenizer.chat_template)
        prompts: list[Prompt] = list(samples.prompts)
        if chat:
            turns = [[{"role": "user", "content": prompt}] for prompt in samples.prompts]
            prompts = [chat_prompt(tokenizer, turn) for turn in turns]
        completions = generate(
            self.spread.model,
            tokenizer,
            prompts,
            params,
            device=self.world.device,
            # One differing bit would end a text on one worker and leave the others waiting for it.
            agree=None if self.spread.alone else self.world.first_workers,
        )
        if self.writer is None or self.progress is None:
            return
        for prompt, completion in zip(samples.prompts, completions, strict=True):
            record = {
                "kind": "sample",
                "step": done,
                "prompt": f"{prompt}\n" if chat else prompt,
                "completion": completion.text,
            }
            self.writer.write(record)
            self.progress.sample(record)


class CheckpointHook:
    """Saves every so often, after the last step, and when the run was asked to stop."""

    def __init__(
        self,
        store: CheckpointStore,
        every: int,
        state: Callable[[int], tuple[State, dict]],
        newest_evaluation: Callable[[], tuple[int, float] | None],
        asynchronous: bool,
        writer: MetricsWriter | None,
    ) -> None:
        self.store, self.every, self.state = store, Every(every), state
        self.newest_evaluation, self.asynchronous, self.writer = (
            newest_evaluation,
            asynchronous,
            writer,
        )

    def after_step(self, done: int, stats: StepStats, seconds: float, last: bool) -> None:
        if not self.every.passed(done) and not last:
            return
        started = time.perf_counter()
        tensors, meta = self.state(done)
        evaluated = self.newest_evaluation()
        metric = evaluated[1] if evaluated is not None and evaluated[0] == done else None
        self.store.save(done, tensors, meta, asynchronous=self.asynchronous, metric=metric)
        if last:
            self.store.wait()
        if self.writer is not None:
            stalled = time.perf_counter() - started
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            self.writer.write(
                {"kind": "checkpoint", "step": done, "seconds_stalled": stalled, "bytes": size}
            )
