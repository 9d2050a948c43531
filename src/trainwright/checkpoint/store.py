"""The store of a run's checkpoints: save in the background, commit, verify, load anywhere.

Called by all ranks together, or alone without torch.distributed. One directory a step; a step is
there whole or not at all, and what was damaged later is refused by name.
"""

from __future__ import annotations

import functools
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from trainwright.checkpoint import commit, integrity
from trainwright.checkpoint.manifest import Manifest, StoredFile, StoredTensor
from trainwright.checkpoint.parts import (
    Part,
    PartsLoadPlanner,
    PartsSavePlanner,
    Staging,
    group_of,
    part_of,
)
from trainwright.checkpoint.storage import SafetensorsReader, SafetensorsWriter
from trainwright.comm.groups import name_group
from trainwright.errors import Mistake, UserError

# A rank waits this long for the slowest one's disk before it gives a save up.
PATIENCE = timedelta(hours=2)
MISTAKES_SHOWN = 8

logger = logging.getLogger(__name__)

# A store without torch.distributed is meant, not an oversight.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


class CheckpointStore:
    """Checkpoints under `root`: `root/step-00000100/` with safetensors files and a manifest.

    Keeps the `keep_last` newest, every step that is a multiple of `keep_every`, and, with
    `keep_best`, the one with the lowest `metric`; others are deleted after the next commit.
    `claim`, `save`, `wait`, `load`, `rewind` and `close` are collective: every rank calls them in
    the same order, and a mistake on one is raised on all. The rest only reads, on any rank alone.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        keep_best: bool = False,
    ) -> None:
        self.root = Path(root).absolute()
        self.keep_best = keep_best
        self._to_keep = functools.partial(
            commit.steps_to_keep, keep_last=keep_last, keep_every=keep_every, keep_best=keep_best
        )
        self._lock: IO[str] | None = None
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._staging = Staging()

    # ---- what is there -------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps that were committed, ascending; damage done later shows in `verify` and `load`."""
        return commit.committed_steps(self.root)

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        return max(self.steps(), default=None)

    def directory(self, step: int) -> Path:
        """Where the checkpoint of `step` is."""
        return commit.step_directory(self.root, step)

    def metadata(self, step: int) -> Mapping[str, StoredTensor]:
        """Dtype and global shape of every tensor in `step`, by name. Raises UserError where there
        is no such checkpoint, or where its manifest is damaged."""
        return integrity.open_manifest(self.root, step).tensors

    def read_meta(self, step: int) -> dict[str, Any]:
        """The `meta` that was saved with `step`. Raises like `metadata`."""
        return integrity.open_manifest(self.root, step).meta

    def verify(self, step: int) -> list[Mistake]:
        """Read every byte of `step`: what is damaged, missing or does not belong, file by file."""
        return integrity.verify(self.root, step)

    # ---- saving --------------------------------------------------------------------------------

    def claim(self) -> None:
        """Become the only writer under `root`, and remove what dead writers left unfinished.

        `save` does it when need be; at the start of a run it frees space and finds a second
        training of the same folder early. Raises UserError when another process is the writer.
        """
        self._on_first_rank(self._lock_root)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor | Part],
        meta: Mapping[str, Any],
        *,
        asynchronous: bool = True,
        metric: float | None = None,
    ) -> None:
        """Save `tensors` (plain ones alike on all ranks, DTensors, Parts) and `meta` as `step`.

        Asynchronous, it returns once everything is copied to host memory; a background thread
        writes and commits. The next `save` or `wait` first waits for that to end and raises what
        went wrong: UserError when the disk is full, when a write fails on any rank, or when `step`
        is already there with other content. The same content again changes nothing; a damaged
        checkpoint of the same step is replaced. A failed save leaves no trace. `meta` is JSON,
        rank 0's is kept; `metric` (lower is better) serves `keep_best`.
        """
        self.wait()
        parts = {
            name: part
            for name, tensor in tensors.items()
            if (part := part_of(name, tensor)) is not None
        }
        meta_then = json.loads(json.dumps(dict(meta)))
        write = functools.partial(
            self._write, step, meta=meta_then, metric=metric, group=self._group
        )
        if asynchronous:
            self._pending = self._background.submit(write, self._staging.copy(parts))
        else:
            write(parts)

    def wait(self) -> None:
        """Until the save under way is committed; raises what went wrong with it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait for the save under way, then let another process write here."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def rewind(self, step: int) -> None:
        """Go on from `step`: newer checkpoints are set aside as `abandoned-step-…`, undeleted."""
        self.wait()

        def set_newer_aside() -> None:
            self._lock_root()
            for newer in self.steps():
                if newer > step:
                    aside = commit.abandon(self.root, newer)
                    logger.warning("the checkpoint of step %d is set aside as %s", newer, aside)

        self._on_first_rank(set_newer_aside)

    # ---- loading -------------------------------------------------------------------------------

    def load(self, step: int, into: Mapping[str, Tensor | Part]) -> dict[str, Any]:
        """Fill the tensors `into` in place from `step`, however it was sharded; returns its meta.

        Strict both ways: every tensor must be stored with its global shape and dtype, and of each
        group that `into` mentions (a name's first word, such as `model`) everything stored must
        be wanted by some rank. Hashes are verified first, the files shared out over the ranks.
        Raises UserError, the same on all ranks, naming every difference or damaged file; then no
        tensor has been written to.
        """
        self.wait()
        parts = {name: part for name in into if (part := part_of(name, into[name])) is not None}
        groups = {group_of(name) for name in into}
        manifest: Manifest | None = None
        mistakes: list[Mistake] = []
        try:
            manifest = integrity.open_manifest(self.root, step)
            # A rank that holds nothing of a tensor has no say in how it is kept.
            mistakes = _differences(manifest, parts)
        except UserError as error:
            mistakes = list(error.mistakes)
        stored = manifest.tensors if manifest is not None else {}
        unwanted = {name for name in stored if group_of(name) in groups} - set(into)
        answers = self._agree(mistakes, (groups, unwanted))
        assert manifest is not None
        _refuse_leftovers(step, answers)
        read_by_anyone = set.union(*(theirs for theirs, _ in answers))
        self._agree(self._verify_share(manifest, read_by_anyone))
        self._agree(self._read(manifest, parts))
        return manifest.meta

    # ---- inside --------------------------------------------------------------------------------

    @property
    def _rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def _world_size(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @functools.cached_property
    def _group(self) -> dist.ProcessGroup | None:
        """A group of our own, so that the background thread's messages never mix with training's;
        gloo, since what it sends is on the host. Made by the first collective call."""
        if self._world_size == 1:
            return None
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        name_group(group, "checkpoint")
        return group

    def _agree(self, mistakes: list[Mistake], value: Any = None) -> list[Any]:
        """Raise every rank's mistakes on every rank, or return every rank's `value`."""
        answers: list[Any] = [(mistakes, value)]
        if self._group is not None:
            answers = [None] * self._world_size
            dist.all_gather_object(answers, (mistakes, value), group=self._group)
        found = dict.fromkeys(mistake for theirs, _ in answers for mistake in theirs)
        if found:
            raise _mistakes(found)
        return [theirs for _, theirs in answers]

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0; what goes wrong there is raised on every rank."""
        mistakes: tuple[Mistake, ...] = ()
        if self._rank == 0:
            try:
                action()
            except UserError as error:
                mistakes = error.mistakes
            except OSError as error:
                mistakes = commit.failed_write(error, self.root, 0).mistakes
        self._agree(list(mistakes))

    def _lock_root(self) -> None:
        if self._lock is None:
            self._lock = commit.lock_for_writing(self.root)

    def _write(
        self,
        step: int,
        parts: Mapping[str, Part],
        *,
        meta: dict[str, Any],
        metric: float | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        unfinished: list[Path] = []  # on rank 0, the directory being written

        def prepare(total_bytes: int) -> Path:
            self._lock_root()
            unfinished.append(commit.begin(self.root, step, total_bytes))
            return unfinished[0]

        def finish(files: tuple[StoredFile, ...], tensors: dict[str, StoredTensor]) -> None:
            manifest = Manifest(step, self._world_size, metric, files, tensors, meta)
            if self._is_new(manifest):
                commit.publish(unfinished[0], self.root, manifest)
                unfinished.clear()

        try:
            dcp.save(
                {},
                storage_writer=SafetensorsWriter(prepare, finish),
                planner=PartsSavePlanner(parts),
                process_group=group,
                no_dist=group is None,
            )
        except CheckpointException as error:
            cause = _first_cause(error)
            if isinstance(cause, OSError):
                needed = sum(part.numel() * part.element_size() for part in parts.values())
                cause = commit.failed_write(cause, self.root, needed)
            logger.warning("the checkpoint of step %d was not saved: %s", step, cause)
            raise cause from None
        finally:
            for directory in unfinished:
                commit.discard(directory)
        if self._rank == 0:
            self._retire()

    def _is_new(self, manifest: Manifest) -> bool:
        """Whether to commit, given what may already stand under the same step."""
        existing = self.directory(manifest.step)
        if not existing.exists():
            return True
        if self.verify(manifest.step):
            logger.warning("%s is damaged and is replaced", existing)
            commit.discard(existing)
            return True
        if integrity.open_manifest(self.root, manifest.step).same_content(manifest):
            return False
        raise UserError(
            f"{existing} exists already, with other content",
            fix="choose another `run_directory`, or move that checkpoint elsewhere",
        )

    def _retire(self) -> None:
        """Delete what need not be kept. A checkpoint that cannot be deleted costs only space."""
        steps = self.steps()
        metrics = {step: self._metric(step) for step in steps} if self.keep_best else {}
        for step in set(steps) - self._to_keep(steps, metrics):
            try:
                commit.discard(self.directory(step))
            except OSError as error:
                logger.warning("%s could not be deleted: %s", self.directory(step), error)

    def _metric(self, step: int) -> float | None:
        try:
            return integrity.open_manifest(self.root, step).metric
        except UserError:
            return None

    def _verify_share(self, manifest: Manifest, groups: set[str]) -> list[Mistake]:
        """Verify this rank's share of the files that hold `groups`; other ranks take the others."""
        used = {
            chunk.file
            for name, tensor in manifest.tensors.items()
            if group_of(name) in groups
            for chunk in tensor.chunks
        }
        files = [file for file in manifest.files if file.name in used]
        share = files[self._rank :: self._world_size]
        return integrity.verify_files(self.root, manifest.step, share)

    def _read(self, manifest: Manifest, parts: Mapping[str, Part]) -> list[Mistake]:
        """Fill the parts. Each rank for itself: what fills a part follows from the manifest."""
        try:
            dcp.load(
                {},
                storage_reader=SafetensorsReader(self.directory(manifest.step), manifest),
                planner=PartsLoadPlanner(parts),
                no_dist=True,
            )
        except CheckpointException as error:
            cause = _first_cause(error)
            if isinstance(cause, OSError):
                return [integrity.damage(self.root, manifest.step, f"cannot be read: {cause}")]
            raise cause from None
        return []


def _differences(manifest: Manifest, parts: Mapping[str, Part]) -> list[Mistake]:
    mistakes = []
    for name, part in parts.items():
        saved = manifest.tensors.get(name)
        if saved is None:
            mistakes.append(Mistake(f"{name} is not in the checkpoint of step {manifest.step}"))
        elif saved.shape != part.shape:
            mistakes.append(Mistake(f"{name} was saved with shape {saved.shape}, not {part.shape}"))
        elif saved.dtype != part.dtype:
            mistakes.append(Mistake(f"{name} was saved as {saved.dtype}, not {part.dtype}"))
    return mistakes


def _refuse_leftovers(step: int, answers: Iterable[tuple[set[str], set[str]]]) -> None:
    """Raise for what no rank loads. A rank answers: groups it loads, names it lacks in them."""
    answers = list(answers)
    leftover = {
        name
        for name in set.union(*(lacking for _, lacking in answers))
        if all(name in lacking or group_of(name) not in groups for groups, lacking in answers)
    }
    if leftover:
        raise _mistakes(
            Mistake(f"{name} is in the checkpoint of step {step}, but nothing here is for it")
            for name in sorted(leftover)
        )


def _mistakes(found: Iterable[Mistake]) -> UserError:
    """The first of many mistakes, and how many more there are."""
    mistakes = list(found)
    if len(mistakes) > MISTAKES_SHOWN:
        more = Mistake(f"and {len(mistakes) - MISTAKES_SHOWN} more like these")
        mistakes = [*mistakes[:MISTAKES_SHOWN], more]
    return UserError(mistakes)


def _first_cause(error: CheckpointException) -> BaseException:
    """What went wrong on the lowest rank where something did, with that rank named."""
    rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
    cause.add_note(f"on rank {rank}, while a checkpoint was saved or loaded")
    return cause
