"""A reference's scores of every answer, taken once before the run and kept in the data cache.

A source has a folder of its own, keyed by the reference, its arithmetic and the source's tokens; it
is there whole or not at all (`data.folders`). A sequence's score does not depend on its neighbours
in a row, so neither packing, order nor layout has a part in the key.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainwright.data.batches import Batches, Stream
from trainwright.data.digests import digest
from trainwright.data.fingerprint import remembered_digest
from trainwright.data.folders import build_once, cache_folder, file_hashes, is_whole
from trainwright.data.opening import PreparedData, whole_corpus
from trainwright.data.packing import Layout
from trainwright.data.token_cache import TokenCache
from trainwright.parallel.spread import force_eager
from trainwright.parallel.world import World
from trainwright.planner.plan import Plan
from trainwright.recipe.schema import ModelSection, Recipe
from trainwright.training.micro_batches import counts_losses, to_tensors
from trainwright.training.prepare import pretrained_directory
from trainwright.training.reference import Reference, ReferenceModel

FORMAT = 1  # part of every key: a change of what is kept, or how it is made, makes new folders
_FILE = "scores.bin"  # little-endian fp32 [documents, parts]

Scores = NDArray[np.float32]
Say = Callable[[str], None]


def take_reference(
    data: PreparedData,
    recipe: Recipe,
    hf_config: Mapping[str, Any],
    plan: Plan,
    world: World,
    build: Callable[[], Reference],
    say: Say,
) -> None:
    """Give the batches of `data` the reference's scores, from the cache or taken now. Collective.

    `build` makes the reference, and is called only where scores are missing; `hf_config` is that of
    the trained model. The first worker writes a source's scores when it has all of them.
    """
    caches = {cache.directory: cache for cache in _caches(data)}
    folders: dict[Path, Path] = {}
    missing: list[Path] = []
    if world.is_first:
        folders = {each: _folder(recipe, hf_config, each) for each in caches}
        missing = [each for each in caches if not is_whole(folders[each])]
    folders, missing = world.gather((folders, missing))[0]
    scores: dict[Path, Scores] = {}
    if missing:
        examples = sum(caches[each].documents for each in missing)
        say(f"asking the reference about {examples:,} examples, once")
        reference = build()
        assert isinstance(reference, ReferenceModel)  # of distillation nothing is cached
        for each in missing:
            scores[each] = _asked(reference, caches[each], recipe, plan, data.pad_id)
        del reference
        gc.collect()  # sharded modules hold each other
        if world.is_first:
            for each in missing:
                build_once(folders[each], partial(_write, scores[each]))
    else:
        say("what the reference makes of the examples is in the cache")
    for directory, cache in caches.items():
        if directory not in scores:
            flat = np.fromfile(folders[directory] / _FILE, dtype="<f4")
            scores[directory] = flat.reshape(cache.documents, cache.parts)
    for batches in _sets(data):
        for stream in batches.streams:
            stream.corpus.set_reference(scores)


def _sets(data: PreparedData) -> list[Batches]:
    return [data.train, *data.validation.values()]


def _caches(data: PreparedData) -> Iterator[TokenCache]:
    for batches in _sets(data):
        for stream in batches.streams:
            yield from stream.corpus.caches


def _folder(recipe: Recipe, hf_config: Mapping[str, Any], tokens: Path) -> Path:
    """Where the scores of the examples in `tokens` are kept."""
    root = cache_folder(recipe.data.cache)
    files = file_hashes(tokens)
    content = [files[name] for name in ("tokens.bin", "part_lengths.bin", "trained.bin")]
    key = [FORMAT, _fingerprint(recipe, hf_config, root), recipe.training.precision, content]
    return root / "references" / digest(key)


def _fingerprint(recipe: Recipe, hf_config: Mapping[str, Any], root: Path) -> list[Any]:
    """What decides the reference's weights: its files, or how a new model is drawn."""
    adapter, named = recipe.adapter, recipe.objective.reference
    section = ModelSection(path=named) if named is not None else recipe.model
    directory = pretrained_directory(section)
    quantised = adapter.quantise if adapter is not None and named is None else "none"
    if directory is None:
        return ["new", dict(hf_config), recipe.seed, quantised]
    patterns = ("config.json", "*.safetensors", "*.py")
    files = sorted({file for pattern in patterns for file in directory.glob(pattern)})
    return [remembered_digest(directory, files, root), quantised]


def _write(scores: Scores, folder: Path) -> dict[str, Any]:
    scores.astype("<f4").tofile(folder / _FILE)
    return {"documents": len(scores)}


def _asked(
    reference: ReferenceModel, cache: TokenCache, recipe: Recipe, plan: Plan, pad_id: int
) -> Scores:
    """The reference's scores of all examples of a source [documents, parts]. Collective.

    Each worker asks about its share of rows; all make the same number of forward passes.
    """
    stream = Stream(
        whole_corpus(cache),
        packing=recipe.packing,
        sequence_length=recipe.data.sequence_length,
        seed=0,
        shuffle=False,
    )
    batches = Batches([stream], batch_rows=plan.micro_batch, pad_id=pad_id, endless=False)
    spread, rows, most = reference.spread, batches.rows, plan.micro_batch
    mesh = spread.mesh
    table = torch.zeros(cache.documents, cache.parts, device=mesh.world.device)
    # Stages of a pipeline want several micro-batches on their way at once.
    per_pass, at_once = most * mesh.size("data"), max(1, plan.stages)
    starts = range(0, rows, per_pass)
    on_cpu = mesh.world.device.type == "cpu"
    with force_eager() if on_cpu else nullcontext():  # as in evaluation
        for group in range(0, len(starts), at_once):
            firsts = [start + mesh.index("data") * most for start in starts[group:][:at_once]]
            shares = [range(first, min(first + most, rows)) for first in firsts]
            tensors = [
                to_tensors(batches.read(own or range(1)), 0, most, spread, None) for own in shares
            ]
            for own, found in zip(shares, reference.scores(tensors), strict=True):
                if found is not None:
                    _enter(table, stream.layout(0), own, found.sums)
    # Workers that share rows have the same scores: one of them counts.
    table *= counts_losses(spread) and mesh.index("cp") == 0
    return mesh.world.sum(table).cpu().numpy()


def _enter(table: Tensor, layout: Layout, rows: range, sums: Tensor) -> None:
    """Put the scores of rows [rows, segments] into the table [documents, parts]."""
    parts = table.shape[1]
    for row, found in zip(rows, sums, strict=False):
        documents = layout.document[slice(*layout.first_run[row : row + 2])]
        own = found[: len(documents) * parts].view(-1, parts)
        table[torch.from_numpy(documents).to(table.device)] = own.to(table.dtype)
