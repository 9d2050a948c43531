"""What the schema cannot see: whether a recipe's parts fit each other, the disk and the packages.

Each check takes a draft whose broken parts are None, so that all mistakes come in one report.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from trainwright.data.sources import check_source
from trainwright.errors import Mistake, UserError
from trainwright.models.scoring import gives_scores
from trainwright.planner.beside import vocabulary_mistake
from trainwright.planner.candidate import candidate_of
from trainwright.planner.cluster.load import load_cluster
from trainwright.planner.known_model import (
    directory_vocabulary,
    known_config,
    known_native,
    known_vocabulary,
    read_local_config,
)
from trainwright.planner.legality import beside_mistakes, legality_mistakes
from trainwright.planner.make import batch_tokens_mistakes
from trainwright.recipe.load import Check, Draft
from trainwright.recipe.paths import is_spelt_as_path
from trainwright.recipe.presets import model_config
from trainwright.recipe.schema import EIGHT_BIT, PAGED, DataSection, ModelSection, Training

_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def check_model_shape(draft: Draft) -> Iterator[Mistake]:
    """A new model's family, preset and config; a local model's config, and its kind of head."""
    if draft.model is not None:
        # Raises UserError with all of them.
        known_config(draft.model, draft.tokenizer, draft.objective)
    yield from ()


def check_model_directory(draft: Draft) -> Iterator[Mistake]:
    """A pretrained model's directory: that it is there, and has a config and safetensors."""
    if draft.model is not None and draft.model.path is not None:
        yield from _directory_mistakes(draft.model.path, "model.path")


def check_model_beside(draft: Draft) -> Iterator[Mistake]:
    """A reference's or a teacher's directory, and that a teacher knows the model's tokens."""
    if draft.objective is None:
        return
    for name in ("reference", "teacher"):
        path = getattr(draft.objective, name)
        if path is not None:
            yield from _directory_mistakes(path, f"objective.{name}")
    if draft.objective.teacher is None or draft.model is None:
        return
    teacher = read_local_config(ModelSection(path=draft.objective.teacher)) or {}
    own = (read_local_config(draft.model) or draft.model.config).get("vocab_size")
    if own is None and draft.model.family is not None:
        own = model_config(draft.model).get("vocab_size") or known_vocabulary(draft.tokenizer)
    found = teacher.get("vocab_size")
    if isinstance(own, int) and isinstance(found, int):
        yield from filter(None, [vocabulary_mistake(own, found)])


def _directory_mistakes(value: str, key: str) -> Iterator[Mistake]:
    path = Path(value)
    if not path.is_dir():
        if path.is_file():
            yield Mistake(f"{path} is a file", "name the directory that it lies in", key)
        elif is_spelt_as_path(value) or value.count("/") > 1:
            yield Mistake(f"there is no directory {path}", _near_directory(path), key)
        return
    config = path / "config.json"
    if not config.is_file():
        fix = "name a model in Hugging Face's layout, such as a run's `export` folder"
        yield Mistake(f"{path} has no config.json", fix, key)
    elif read_local_config(ModelSection(path=value)) is None:
        yield Mistake(f"{config} is not a JSON object", "save or download the model anew", key)
    if not any(path.glob("*.safetensors")):
        fix = "name a model in Hugging Face's layout, such as a run's `export` folder"
        if any(path.glob("*.bin")):
            fix = (
                "its .bin files are pickles, which can run code and are not read; load the model "
                "in transformers once and `save_pretrained` it"
            )
        yield Mistake(f"{path} has no weights in safetensors", fix, key)


def check_tokenizer(draft: Draft) -> Iterator[Mistake]:
    """That there is a tokenizer, where it is said to be."""
    if draft.model is None or "tokenizer" in draft.broken:
        return
    tokenizer = draft.tokenizer
    if tokenizer is None:
        if draft.model.family is not None:
            yield Mistake(
                "a new model needs a tokenizer",
                "write `tokenizer: {train: {vocab_size: 4096}}`, `tokenizer: bytes`, or "
                "`tokenizer: DIRECTORY`",
                key="tokenizer",
            )
        elif Path(draft.model.path or "").is_dir() and not _has_tokenizer(draft.model.path or ""):
            what = f"{draft.model.path} has no tokenizer of its own"
            fix = "write `tokenizer: DIRECTORY` with the tokenizer that the model was trained with"
            yield Mistake(what, fix, key="tokenizer")
        return
    if tokenizer.train is not None and draft.model.path is not None:
        yield Mistake(
            "a pretrained model knows the tokens of its own tokenizer only",
            "leave `tokenizer` out; to train a tokenizer, train a new model",
            key="tokenizer.train",
        )
    path = tokenizer.path
    if path is None or path == "bytes":
        return
    if Path(path).is_dir():
        if not _has_tokenizer(path):
            fix = "name a directory with a tokenizer.json"
            yield Mistake(f"{path} holds no tokenizer", fix, key="tokenizer.path")
    elif is_spelt_as_path(path):
        what = f"there is no directory {path}"
        yield Mistake(what, _near_directory(Path(path)), key="tokenizer.path")


def check_vocabulary(draft: Draft) -> Iterator[Mistake]:
    """A tokenizer with more entries than the model has embeddings, where both are known."""
    if draft.model is None or "tokenizer" in draft.broken:
        return
    tokens = known_vocabulary(draft.tokenizer)
    if draft.tokenizer is None and draft.model.path is not None:
        tokens = directory_vocabulary(Path(draft.model.path))
    config = read_local_config(draft.model) or draft.model.config
    entries = config.get("vocab_size")
    if tokens is None or not isinstance(entries, int) or tokens <= entries:
        return
    what = f"the tokenizer has {tokens:,} tokens, but the model's vocabulary is {entries:,}"
    if draft.model.family is not None:
        fix = f"leave `vocab_size` out, or write `vocab_size: {tokens}`"
        yield Mistake(what, fix, key="model.config.vocab_size")
    else:
        fix = "use the tokenizer that the model was trained with"
        key = "model.path" if draft.tokenizer is None else "tokenizer"
        yield Mistake(what, fix, key=key)


def check_sequence_length(draft: Draft) -> Iterator[Mistake]:
    """Rows longer than the positions that the model knows."""
    if draft.model is None or draft.data is None:
        return
    length = draft.data.sequence_length
    if draft.objective is not None:  # a row holds all of an example's sequences
        length //= draft.objective.sequences
    if draft.model.family is not None:
        config = known_config(draft.model, draft.tokenizer)
        most = config.max_positions if config is not None else None
        fix = (
            f"write `sequence_length: {most}`, or `model.config.max_position_embeddings: {length}`"
        )
    else:
        most = (read_local_config(draft.model) or {}).get("max_position_embeddings")
        fix = f"write `sequence_length: {most}` or less"
    if isinstance(most, int) and length > most:
        what = f"rows of {length:,} tokens are longer than the model's {most:,} positions"
        yield Mistake(what, fix, key="data.sequence_length")


def check_sources(draft: Draft) -> Iterator[Mistake]:
    """Files that are missing, empty or not what they are said to be."""
    if draft.data is None:
        return
    examples = draft.objective is not None and draft.objective.kind != "next_token"
    for index, source in enumerate(draft.data.sources):
        yield from check_source(source, f"data.sources.{index}", examples=examples)
    if isinstance(draft.data.validation, list):
        for index, source in enumerate(draft.data.validation):
            yield from check_source(source, f"data.validation.{index}", examples=examples)


def check_layout(draft: Draft) -> Iterator[Mistake]:
    """Whether the recipe's ways to spread the work go together, as far as the recipe tells.

    Without a number of workers, as few are supposed as its degrees make.
    """
    parallel, training, data = draft.parallel, draft.training, draft.data
    if training is not None and data is not None:
        yield from batch_tokens_mistakes(training, data)
    if parallel is None or training is None:
        return
    config, native = None, None
    if draft.model is not None:
        native = known_native(draft.model)
        with contextlib.suppress(UserError):  # told by `check_model_shape`
            config = known_config(draft.model, draft.tokenizer, draft.objective)
    candidate = candidate_of(
        parallel,
        training,
        world=None if parallel.workers == "auto" else parallel.workers,
        optimizer=draft.optimizer.name if draft.optimizer is not None else "adamw",
        sequence_length=data.sequence_length if data is not None else None,
        model=config,
        native=native,
        adapter=draft.adapter,
        objective=draft.objective,
    )
    yield from legality_mistakes(candidate)
    yield from beside_mistakes(candidate)


def check_cluster(draft: Draft) -> Iterator[Mistake]:
    """The description of the machines; raises UserError with all that is wrong with it."""
    if draft.cluster is not None:
        load_cluster(draft.cluster)
    yield from ()


def check_schedule(draft: Draft) -> Iterator[Mistake]:
    """A warm-up, or warm-up and decay, that do not fit into the run."""
    schedule = draft.schedule
    if schedule is None:
        return
    if schedule.warmup >= 1:
        steps = _steps(draft.training, draft.data)
        if steps is not None and schedule.warmup >= steps:
            what = f"the warm-up of {schedule.warmup:g} steps is as long as the run ({steps} steps)"
            share = "write a share of the run, such as `warmup: 0.03`, or fewer steps"
            yield Mistake(what, share, key="schedule.warmup")
    elif schedule.name == "wsd" and schedule.warmup + schedule.decay > 1:
        what = f"warm-up {schedule.warmup:g} and decay {schedule.decay:g} are more than the run"
        yield Mistake(what, "let them sum to at most 1", key="schedule.decay")


def check_best(draft: Draft) -> Iterator[Mistake]:
    """The best checkpoint is the one with the lowest held-out loss: something must be held out."""
    if draft.checkpoint is None or draft.data is None or not draft.checkpoint.keep_best:
        return
    if draft.data.validation in (0, []):
        yield Mistake(
            "the best checkpoint is known by its held-out loss, but nothing is held out",
            "write `data.validation: 0.01`, or leave `keep_best` out",
            key="checkpoint.keep_best",
        )
    save = draft.checkpoint.every
    evaluate = draft.evaluation.every if draft.evaluation is not None else None
    if save and evaluate and save % evaluate and evaluate % save:
        yield Mistake(
            f"checkpoints every {save} steps and evaluations every {evaluate} rarely meet, and "
            "only a checkpoint that was evaluated can be the best",
            f"write `evaluation.every: {save}`",
            key="checkpoint.keep_best",
        )


def check_second_model(draft: Draft) -> Iterator[Mistake]:
    """A reference or a teacher that gives scores, where probabilities are asked for."""
    for key in ("reference", "teacher"):
        path = getattr(draft.objective, key, None)
        config = read_local_config(ModelSection(path=path)) if path else None
        if config is not None and gives_scores(config):
            what = f"{path} is a reward model, which gives no probabilities of tokens"
            yield Mistake(what, "name a language model", key=f"objective.{key}")


def check_samples(draft: Draft) -> Iterator[Mistake]:
    """Texts to complete, where the model is to score texts."""
    if draft.objective is None or draft.evaluation is None:
        return
    if draft.objective.gives_scores and draft.evaluation.samples.prompts:
        what = "a reward model writes no text that could be shown"
        yield Mistake(what, "leave the prompts out", key="evaluation.samples.prompts")


def check_installed(draft: Draft) -> Iterator[Mistake]:
    """Optional packages that the recipe asks for."""
    name = draft.optimizer.name if draft.optimizer is not None else "adamw"
    for package, users in (("torchao", EIGHT_BIT), ("bitsandbytes", PAGED)):
        if name in users and not _is_installed(package):
            yield Mistake(
                f"`{name}` needs the package {package}, which is not installed",
                "`pip install 'trainwright[quant]'`, or write `name: adamw`",
                key="optimizer.name",
            )
    wants_float8 = draft.training is not None and draft.training.precision == "float8"
    if wants_float8 and not _is_installed("torchao"):
        yield Mistake(
            "`float8` needs the package torchao, which is not installed",
            "`pip install 'trainwright[quant]'`, or write `precision: bf16`",
            key="training.precision",
        )
    for index, tracker in enumerate(draft.tracking.to if draft.tracking is not None else ()):
        if not _is_installed(_TRACKERS[tracker]):
            yield Mistake(
                f"the tracker `{tracker}` is not installed",
                f"`pip install {_TRACKERS[tracker]}`, or leave it out",
                key=f"tracking.to.{index}",
            )


recipe_checks: list[Check] = [
    check_model_shape,
    check_model_directory,
    check_model_beside,
    check_tokenizer,
    check_vocabulary,
    check_sequence_length,
    check_sources,
    check_layout,
    check_cluster,
    check_schedule,
    check_best,
    check_second_model,
    check_samples,
    check_installed,
]

# Of these, what a plan depends on: data, weights and a tokenizer need not be here to plan.
planning_checks: list[Check] = [
    check_model_shape,
    check_sequence_length,
    check_layout,
    check_cluster,
]


def _steps(training: Training | None, data: DataSection | None) -> int | None:
    """Optimizer steps of the run, where the recipe alone says."""
    if training is None or training.tokens is None or data is None:
        return None if training is None else training.steps
    batch = training.batch_tokens or (training.batch_sequences or 8) * data.sequence_length
    return math.ceil(training.tokens / batch)


def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def _has_tokenizer(directory: str) -> bool:
    return any((Path(directory) / name).is_file() for name in _TOKENIZER_FILES)


def _near_directory(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either: check the path"
    names = [each.name for each in path.parent.iterdir() if each.is_dir()]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"did you mean `{path.parent / close[0]}`?" if close else "check the path"
