"""Reward models as Hugging Face's configs say them: a decoder whose head gives one score a token.

transformers calls such a model a sequence classifier of one label, and takes the score of a text's
last token that is no padding. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainwright.errors import Mistake, UserError
from trainwright.models.family_specs import FAMILIES

HEAD = "score"  # what transformers calls the layer
_SUFFIX = "ForSequenceClassification"
# transformers' classes by family; it has none for these two.
CLASSIFIERS = {
    name: family.architecture.removesuffix("ForCausalLM") + _SUFFIX
    for name, family in FAMILIES.items()
    if name not in ("granite", "olmoe")
} | {"gemma3_text": f"Gemma3Text{_SUFFIX}"}


def gives_scores(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a sequence classifier, and not of a language model."""
    return any(str(name).endswith(_SUFFIX) for name in hf.get("architectures") or ())


def label_count(hf: Mapping[str, Any]) -> int:
    """How many numbers a sequence classifier gives; two where its config is silent."""
    return len(hf.get("id2label") or ()) or int(hf.get("num_labels") or 2)


def with_head(
    hf: Mapping[str, Any], *, scores: bool, pad_token_id: int | None = None
) -> dict[str, Any]:
    """The config.json of the model to train: one that gives scores, or one that gives logits.

    A language model's becomes that of a reward model with the same body; `pad_token_id` is then
    the token by which transformers finds where a text ends. Raises UserError where the family has
    no such class in transformers, and where a reward model is to give logits.
    """
    family, origin = hf.get("model_type"), "model"
    if not scores:
        if not gives_scores(hf):
            return dict(hf)
        fix = "write `objective: reward`, or name the language model that it was made from"
        raise UserError(Mistake("it is a reward model, which writes no text", fix, origin))
    if family not in CLASSIFIERS:
        what = f"transformers has no class for reward models of the family {family}"
        fix = f"choose a model of one of {', '.join(CLASSIFIERS)}"
        raise UserError(Mistake(what, fix, origin))
    scored = dict(hf)
    if not gives_scores(hf):
        scored |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        scored["architectures"] = [CLASSIFIERS[family]]
    if pad_token_id is not None:
        scored["pad_token_id"] = pad_token_id
    return scored
