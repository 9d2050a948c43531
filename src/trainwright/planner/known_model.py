"""What a recipe alone tells about its model, before a tokenizer is trained or weights are read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainwright.errors import Mistake, UserError
from trainwright.models.families import FAMILIES, DecoderConfig, decoder_config, new_hf_config
from trainwright.models.scoring import with_head
from trainwright.recipe.presets import model_config
from trainwright.recipe.schema import ModelSection, Objective, TokenizerSection

BYTE_VOCABULARY = 259  # 256 bytes and the three special tokens of `tokenizer: bytes`
_LIKELY_VOCABULARY = 32_000  # stands in where the tokenizer is not here yet


def known_vocabulary(tokenizer: TokenizerSection | None) -> int | None:
    """Entries of the tokenizer, where the recipe or a local directory says; None elsewhere."""
    if tokenizer is None:
        return None
    if tokenizer.train is not None:
        return tokenizer.train.vocab_size
    if tokenizer.path == "bytes":
        return BYTE_VOCABULARY
    return directory_vocabulary(Path(tokenizer.path or ""))


def directory_vocabulary(directory: Path) -> int | None:
    """One more than the largest token id in a directory's tokenizer.json; None without one."""
    tokens = directory_tokens(directory)
    return None if tokens is None else max(tokens.values(), default=-1) + 1


def directory_tokens(directory: Path) -> dict[str, int] | None:
    """The ids of all tokens in a directory's tokenizer.json; None without one."""
    try:
        tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        entries = tokenizer["model"]["vocab"]
        if not isinstance(entries, dict):  # pieces with their scores, in order
            entries = {entry[0]: number for number, entry in enumerate(entries)}
        added = {each["content"]: each["id"] for each in tokenizer.get("added_tokens") or ()}
        return {**entries, **added}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def read_local_config(model: ModelSection) -> dict[str, Any] | None:
    """The config.json of a pretrained model in a local directory; None where there is none."""
    if model.path is None or not Path(model.path).is_dir():
        return None
    try:
        config = json.loads((Path(model.path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def known_native(model: ModelSection) -> bool | None:
    """Whether the model is one of our families; None for a hub id, whose config is not here."""
    if model.family is not None:
        return True
    config = read_local_config(model)
    return None if config is None else config.get("model_type") in FAMILIES


def known_config(
    model: ModelSection,
    tokenizer: TokenizerSection | None = None,
    objective: Objective | None = None,
) -> DecoderConfig | None:
    """The decoder that the recipe describes; None for a hub id or a family we do not have.

    A new model's vocabulary is that of its config or its tokenizer, or 32,000 where neither is
    known yet. Raises `UserError` with every mistake in the config, each with its recipe key, and
    where the model is none for the objective.
    """
    scores = objective is not None and objective.gives_scores
    if model.family is not None:
        shape = model_config(model)
        vocabulary = shape.get("vocab_size") or known_vocabulary(tokenizer) or _LIKELY_VOCABULARY
        new = new_hf_config(model.family, shape, vocabulary)
        return decoder_config(with_head(new, scores=scores))
    config = read_local_config(model)
    if config is None:
        return None
    if objective is not None:
        config = with_head(config, scores=scores)
    if config.get("model_type") not in FAMILIES:
        return None
    try:
        return decoder_config(config)
    except UserError as error:
        # The keys are the directory's, not the recipe's.
        file = Path(model.path or "") / "config.json"
        raise UserError(_in_directory(each, file) for each in error.mistakes) from None


def _in_directory(mistake: Mistake, file: Path) -> Mistake:
    name = mistake.key.removeprefix("model.config.")
    return replace(mistake, what=f"`{name}` in {file} {mistake.what}", key="model.path")
