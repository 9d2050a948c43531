"""PEFT's adapter_config.json: read into an `AdapterSpec`, and written from one. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainwright.errors import Mistake, UserError
from trainwright.models.adapter_spec import AdapterSpec, Init

# Keys that say nothing about what an adapter computes, or only how it was started or trained.
INERT = frozenset(
    {
        "peft_type",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "inference_mode",
        "fan_in_fan_out",  # for layers that keep their weight turned; ours do not
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "qalora_group_size",
        "runtime_config",
    }
)
READ = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "use_rslora",
        "use_dora",
        "init_lora_weights",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
    }
)
UNKNOWN = {
    "target_parameters": "adapts matrices of experts, which are stacked here",
    "trainable_token_indices": "trains single tokens' embeddings",
}
# Starts after which the base is as it was; all others have changed its weights.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def spec_of(config: Mapping[str, Any], where: str) -> AdapterSpec:
    """What an adapter_config.json describes.

    An adapter that PiSSA started comes with `init` "pissa": its tensors are to be taken with the
    difference that its start made. Raises UserError naming every key that would change what the
    adapter computes and is not known here; `where` is the file.
    """
    mistakes = _refusals(config)
    ranks = {"r": config.get("r", 8), **(config.get("rank_pattern") or {})}
    if not all(type(rank) is int for rank in ranks.values()):
        mistakes.append(Mistake("ranks are no whole numbers", "restore the file", "r"))
    if mistakes:
        raise UserError(Mistake(m.what, m.fix, m.key, where) for m in mistakes)
    layers = config.get("layers_to_transform")
    init: Init = "pissa" if config.get("init_lora_weights") == "pissa" else "default"
    try:
        return AdapterSpec(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout") or 0.0,
            targets=_names(config["target_modules"]),
            exclude=_names(config.get("exclude_modules") or ()),
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            init=init,
            modules_to_save=tuple(config.get("modules_to_save") or ()),
            layers_to_transform=(layers,)
            if isinstance(layers, int)
            else tuple(layers or ()) or None,
            layers_pattern=_listed(config.get("layers_pattern")),
            rank_pattern=dict(config.get("rank_pattern") or {}),
            alpha_pattern=dict(config.get("alpha_pattern") or {}),
            ties=bool(config.get("ensure_weight_tying")),
        )
    except UserError as error:
        raise UserError(Mistake(m.what, m.fix, m.key, where) for m in error.mistakes) from error


def config_of(
    spec: AdapterSpec,
    targets: str | tuple[str, ...],
    saved: tuple[str, ...],
    *,
    base_model: str | None,
    tied: bool,
    task: str = "CAUSAL_LM",
) -> dict[str, Any]:
    """The adapter_config.json of a spec, whose start is forgotten.

    `targets` and `saved` are names by which PEFT finds the modules that the spec means; `tied` says
    whether the model's output head is its embedding's matrix, and `task` what PEFT calls its work.
    """
    return {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "exclude_modules": spec.exclude
        if isinstance(spec.exclude, str)
        else list(spec.exclude) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "init_lora_weights": True,
        "modules_to_save": list(saved) or None,
        "layers_to_transform": None
        if spec.layers_to_transform is None
        else list(spec.layers_to_transform),
        "layers_pattern": list(spec.layers_pattern) or None,
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": dict(spec.alpha_pattern),
        "ensure_weight_tying": tied and spec.ties,
    }


def _refusals(config: Mapping[str, Any]) -> list[Mistake]:
    """The keys of a config that change what it computes in ways not known here."""
    mistakes = []
    kind = config.get("peft_type")
    if kind != "LORA":
        fix = "only LoRA and what has grown out of it can be loaded"
        return [Mistake(f"is {kind!r}", fix, "peft_type")]
    if config.get("target_modules") is None:
        fix = "the names of the layers that it adapts"
        mistakes.append(Mistake("is not given", fix, "target_modules"))
    if config.get("bias", "none") != "none":
        what = f"is {config['bias']!r}: biases were trained along"
        mistakes.append(Mistake(what, "merge it into its model with PEFT", "bias"))
    start = config.get("init_lora_weights", True)
    if start != "pissa" and not any(start is s or start == s for s in _PLAIN_STARTS):
        what = f"is {start!r}: that start changed the base's weights"
        fix = (
            "save it with PEFT's `path_initial_model_for_weight_conversion`, which writes a plain"
            " adapter"
        )
        mistakes.append(Mistake(what, fix, "init_lora_weights"))
    for key, value in config.items():
        if key not in INERT | READ and value not in (None, False, 0, "", [], {}):
            does = UNKNOWN.get(key, "does what is not known here")
            what = f"{does}: {value!r}"
            fix = "merge the adapter into its model with PEFT, or remove the key if it needs it not"
            mistakes.append(Mistake(what, fix, key))
    return mistakes


def _names(value: str | Sequence[str]) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return "all-linear" if value.lower() == "all-linear" else value
    return tuple(value)


def _listed(value: str | list[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value else tuple(value or ())
