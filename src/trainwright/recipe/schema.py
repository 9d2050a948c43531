"""The recipe: what a user wants trained, as one closed, frozen, torch-free document.

YAML becomes these models in `recipe.load`; every other room receives them finished. Unknown keys
are refused, every field has a description (the recipe reference and the JSON schema are made from
them), and nothing here touches files or devices.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def refusal(what: str, fix: str, key: str = "") -> PydanticCustomError:
    """An error to raise in a validator; `key` is relative to the section that raises it."""
    context = {"what": what, "fix": fix, "key": key}
    return PydanticCustomError("recipe", "{what}; {fix}", context)


def _no_truth(value: Any) -> Any:
    # pydantic reads `true` as 1, which turns a slip such as `steps: true` into a run of one step.
    if isinstance(value, bool):
        raise refusal("true and false are not numbers", "write a number")
    return value


NotTruth = BeforeValidator(_no_truth)
Count = Annotated[int, Field(gt=0), NotTruth]
Positive = Annotated[float, Field(gt=0), NotTruth]
NotNegative = Annotated[float, Field(ge=0), NotTruth]
Share = Annotated[float, Field(ge=0, le=1), NotTruth]
Fraction = Annotated[float, Field(ge=0, lt=1), NotTruth]


class Section(BaseModel):
    """A part of the recipe: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    # The key that a plain string in this section's place stands for.
    shorthand: ClassVar[str] = ""
    # Groups of keys of which one excludes the others: "steps | epochs | tokens".
    alternatives: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def from_string(cls, value: Any) -> Any:
        return {cls.shorthand: value} if cls.shorthand and isinstance(value, str) else value


class ModelSection(Section):
    """What is trained: a pretrained directory (`path`), or a new model (`family` and its shape)."""

    alternatives = ("path | family preset config",)

    path: str | None = Field(
        None,
        description="Directory or hub id of a pretrained model in Hugging Face's layout.",
        examples=["./my-model"],
    )
    family: str | None = Field(
        None,
        description="Family of a model trained from scratch, such as llama, qwen3 or gemma2.",
        examples=["llama"],
    )
    preset: str | None = Field(
        None,
        description="Named size for a new model; `trainwright init --presets` lists them.",
        examples=["4m"],
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Hugging Face config keys for a new model; they override the preset's.",
        examples=[{"hidden_size": 256}],
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code shipped inside a pretrained model's directory."
    )

    @model_validator(mode="after")
    def one_origin(self) -> ModelSection:
        if self.path is None and self.family is None:
            raise refusal(
                "there is neither a pretrained model nor a new one",
                "write `path: DIRECTORY` to go on from a model, or `family: llama` and "
                "`preset: 4m` for a new one",
            )
        if self.path is not None and self.family is not None:
            raise refusal(
                "`path` (a pretrained model) and `family` (a new one) exclude each other",
                "keep one of them",
                "family",
            )
        if self.path is not None and (self.preset or self.config):
            raise refusal(
                "`preset` and `config` shape a new model, but `path` names a pretrained one",
                "leave them out, or replace `path` by `family`",
                "preset" if self.preset else "config",
            )
        if self.family is not None and not (self.preset or self.config):
            raise refusal(
                f"the new {self.family} model has no shape",
                "write `preset: 4m` (`trainwright init --presets` lists the sizes) or `config:`",
            )
        return self


class TrainTokenizer(Section):
    """A byte-level BPE trained on the recipe's own data."""

    vocab_size: Annotated[int, Field(ge=260), NotTruth] = Field(
        4096, description="Entries of the vocabulary, special tokens included."
    )
    bytes: Count = Field(
        50_000_000, description="Most bytes of text to train on, spread evenly over the documents."
    )


class TokenizerSection(Section):
    """How text becomes tokens. A plain string means `path`."""

    shorthand = "path"
    alternatives = ("path | train",)

    path: str | None = Field(
        None,
        description="Directory or hub id of a tokenizer, or `bytes` for one token a byte.",
        examples=["bytes"],
    )
    train: TrainTokenizer | None = Field(
        None, description="Train a byte-level BPE on this recipe's training documents."
    )

    @model_validator(mode="after")
    def one_origin(self) -> TokenizerSection:
        if (self.path is None) == (self.train is None):
            raise refusal(
                "`path` and `train` exclude each other" if self.path else "the tokenizer is empty",
                "write either `path: DIRECTORY` or `train: {vocab_size: 4096}`",
            )
        return self


SourceKind = Literal["text", "jsonl", "parquet", "arrow", "dataset", "python-stdlib"]


class Source(Section):
    """Where documents come from. A plain string means `path`, or `python-stdlib`."""

    shorthand = "path"

    kind: SourceKind | None = Field(
        None,
        description="Kind of source; taken from the path's ending where left out.",
        examples=["jsonl"],
    )
    path: str | None = Field(
        None,
        description="File, directory, glob, or Hugging Face dataset (id or saved to disk).",
        examples=["texts/*.txt"],
    )
    field: str = Field("text", description="Column or key that holds the text of a document.")
    subset: str | None = Field(
        None,
        description="Configuration name of a Hugging Face dataset.",
        examples=["wikitext-2-raw-v1"],
    )
    split: str = Field("train", description="Split of a Hugging Face dataset.")
    limit: Count | None = Field(
        None, description="Most documents to take from this source.", examples=[10_000]
    )
    weight: Positive | None = Field(
        None,
        description="Share of the mixture's tokens relative to the other sources' weights. Leave "
        "it out everywhere to see every document once an epoch.",
        examples=[2.0],
    )

    @model_validator(mode="before")
    @classmethod
    def from_string(cls, value: Any) -> Any:
        return {"kind": value} if value == "python-stdlib" else super().from_string(value)

    @model_validator(mode="after")
    def has_path(self) -> Source:
        if self.kind == "python-stdlib" and self.path is not None:
            raise refusal(
                "`python-stdlib` is the interpreter's own library and has no `path`",
                "leave `path` out, or write `kind: text` to read that path",
                "path",
            )
        if self.kind != "python-stdlib" and self.path is None:
            raise refusal(
                "the source has no `path`",
                "write `path: FILE_OR_FOLDER`, or `kind: python-stdlib` for Python's own library",
            )
        return self


class DataSection(Section):
    """Documents, how they are held out, and how they become rows of tokens."""

    sources: list[Source] = Field(
        default_factory=lambda: [Source(kind="python-stdlib")],
        min_length=1,
        description="Where documents come from.",
        examples=[["python-stdlib"]],
    )
    validation: Fraction | list[Source] = Field(
        0.01, description="Share of documents held out, or sources of their own."
    )
    sequence_length: Count = Field(1024, description="Tokens in a row of the batch.")
    packing: Literal["concat", "best-fit", "none"] = Field(
        "concat",
        description="`concat` fills rows end to end and splits documents; `best-fit` splits only "
        "documents longer than a row; `none` gives each document a row of its own.",
    )
    shuffle: bool = Field(True, description="Shuffle documents anew each epoch.")
    cache: Path | None = Field(
        None,
        description="Folder of the token cache; default `~/.cache/trainwright`.",
        examples=["~/token-cache"],
    )

    @model_validator(mode="after")
    def weights_all_or_none(self) -> DataSection:
        without = [index for index, source in enumerate(self.sources) if source.weight is None]
        if without and len(without) < len(self.sources):
            raise refusal(
                "this source has no `weight`, but others have one",
                "give `weight` to every source or to none",
                f"sources.{without[0]}",
            )
        return self


class Objective(Section):
    """What is optimised. A plain string means `kind`."""

    shorthand = "kind"

    kind: Literal["next_token"] = Field("next_token", description="Next-token prediction.")


class Training(Section):
    """How long, how much a step, and in which precision."""

    alternatives = ("steps | epochs | tokens", "batch_sequences | batch_tokens")

    steps: Count | None = Field(None, description="Optimizer steps to take.", examples=[1000])
    epochs: Positive | None = Field(
        None, description="Passes over the training documents.", examples=[1.0]
    )
    tokens: Count | None = Field(
        None, description="Tokens to train on, rounded up to steps.", examples=[1_000_000]
    )
    batch_sequences: Count | None = Field(
        None,
        description="Rows in the global batch of one optimizer step; default 8.",
        examples=[8],
    )
    batch_tokens: Count | None = Field(
        None,
        description="The same in tokens: a multiple of `data.sequence_length`.",
        examples=[8192],
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16",
        description="Arithmetic of the forward and backward pass. Weights and optimizer state stay "
        "fp32; fp16 scales its loss dynamically.",
    )
    gradient_clip: Positive | None = Field(
        1.0, description="Largest global norm of the gradients; null leaves them alone."
    )
    recompute: Literal["none", "full", "selective"] = Field(
        "none",
        description="Activations recomputed in the backward pass: none, all of each block, or all "
        "but the outputs of matrix products and attention.",
    )
    compile: Literal["auto"] | bool = Field(
        "auto", description="torch.compile of each block; `auto` does it where it pays."
    )

    @model_validator(mode="after")
    def one_length_one_batch(self) -> Training:
        lengths = {"steps": self.steps, "epochs": self.epochs, "tokens": self.tokens}
        given = [key for key, value in lengths.items() if value is not None]
        if not given:
            raise refusal(
                "nothing says how long to train",
                "write one of `steps: 1000`, `epochs: 1` and `tokens: 1_000_000`",
            )
        if len(given) > 1:
            names = " and ".join(f"`{key}`" for key in given)
            raise refusal(f"{names} all say how long to train", "keep one of them", given[1])
        if self.batch_sequences is not None and self.batch_tokens is not None:
            raise refusal(
                "`batch_sequences` and `batch_tokens` both give the batch",
                "keep one of them",
                "batch_tokens",
            )
        return self


class Optimizer(Section):
    """The update rule. A plain string means `name`."""

    shorthand = "name"

    name: Literal["adamw", "muon", "adamw-8bit"] = Field(
        "adamw",
        description="`adamw` (fused), `muon` for the blocks' matrices with AdamW for the rest, or "
        "`adamw-8bit` (extra `quant`).",
    )
    learning_rate: Positive = Field(3e-4, description="Peak learning rate.")
    weight_decay: NotNegative = Field(
        0.1, description="Decoupled weight decay; norms and biases are left out of it."
    )
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="AdamW's moment decay rates.")
    eps: Positive = Field(1e-8, description="AdamW's denominator term.")
    momentum: Fraction = Field(0.95, description="Muon's momentum.")


class Schedule(Section):
    """The learning rate over the run. A plain string means `name`."""

    shorthand = "name"

    name: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="Shape after warm-up; `wsd` is warm-up, stable, decay."
    )
    warmup: NotNegative = Field(
        0.03, description="Steps of linear warm-up; a number below 1 is a share of the run."
    )
    final: Share = Field(0.1, description="Last learning rate as a share of the peak.")
    decay: Share = Field(0.2, description="Share of the run that `wsd` spends decaying.")


class Parallel(Section):
    """How the work is spread. What is left out is derived from the machine."""

    workers: Count | Literal["auto"] = Field(
        "auto", description="Local worker processes; `auto` is one a GPU, or one on a CPU."
    )
    dp_replicate: Count | None = Field(
        None,
        description="Replicas that each hold whole weights (DDP; with `dp_shard`, HSDP).",
        examples=[2],
    )
    dp_shard: Count | None = Field(
        None,
        description="Workers over which weights, gradients and states are sharded (FSDP2).",
        examples=[2],
    )
    micro_batch: Count | Literal["auto"] = Field(
        "auto", description="Rows a worker puts through the model at once."
    )
    threads: Count | Literal["auto"] = Field(
        "auto", description="CPU threads a worker; `auto` shares the cores out evenly."
    )


class Checkpoint(Section):
    """What is saved while training, and what is kept."""

    every: Count | None = Field(
        None,
        description="Steps between checkpoints; default a tenth of the run. The last step is "
        "always saved.",
        examples=[100],
    )
    keep_last: Count = Field(2, description="Newest checkpoints to keep.")
    keep_every: Count | None = Field(
        None,
        description="Also keep for good every checkpoint whose step is a multiple of this.",
        examples=[1000],
    )
    keep_best: bool = Field(
        False, description="Also keep the checkpoint with the lowest validation loss."
    )
    asynchronous: bool = Field(
        True, description="Write in the background; training pauses only to copy the state."
    )


class Sampling(Section):
    """Completions written during evaluation."""

    prompts: list[str] = Field(
        default_factory=list,
        description="Prompts to complete.",
        examples=[["Once upon a time"]],
    )
    max_new_tokens: Count = Field(48, description="Most tokens to add to a prompt.")
    temperature: NotNegative = Field(0.7, description="0 is greedy.")
    top_p: Annotated[float, Field(gt=0, le=1), NotTruth] = Field(
        0.95, description="Nucleus sampling's probability mass."
    )


class Evaluation(Section):
    """Held-out loss and samples, during training and at its end."""

    every: Count | None = Field(
        None,
        description="Steps between evaluations; default a fifth of the run. The last step is "
        "always evaluated.",
        examples=[100],
    )
    rows: Count | None = Field(
        None,
        description="Most held-out rows to score during training; the last evaluation scores "
        "them all.",
        examples=[64],
    )
    samples: Sampling = Field(default_factory=Sampling, description="Completions to show.")


class Tracking(Section):
    """Where metrics go besides `metrics.jsonl`."""

    log_every: Count = Field(1, description="Steps between records in `metrics.jsonl`.")
    to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list,
        description="Trackers to write to as well (extra `track`).",
        examples=[["tensorboard"]],
    )
    project: str = Field("trainwright", description="Project name shown by the trackers.")


class Export(Section):
    """The Hugging Face directory made from the last checkpoint."""

    at_end: bool = Field(True, description="Export when training ends.")
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Type of the weights.")
    shard_bytes: Count = Field(5_000_000_000, description="Most bytes in a weight file.")


class Recipe(Section):
    """A whole recipe. `Recipe.load(path, *overrides)` reads one in Python."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        "run", description="Name of the run, and of its folder."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32), NotTruth] = Field(
        42, description="Seed of initialisation, data order and sampling."
    )
    run_directory: Path | None = Field(
        None,
        description="Folder of the run; default `runs/NAME` in the current folder.",
        examples=["runs/first"],
    )
    model: ModelSection = Field(
        description="What is trained.", examples=[{"family": "llama", "preset": "4m"}]
    )
    tokenizer: TokenizerSection | None = Field(
        None, description="How text becomes tokens; default the pretrained model's own."
    )
    data: DataSection = Field(default_factory=DataSection, description="What it learns from.")
    objective: Objective = Field(default_factory=Objective, description="What is optimised.")
    training: Training = Field(
        description="How long and how much a step.", examples=[{"steps": 1000}]
    )
    optimizer: Optimizer = Field(default_factory=Optimizer, description="The update rule.")
    schedule: Schedule = Field(default_factory=Schedule, description="Learning rate over the run.")
    parallel: Parallel = Field(default_factory=Parallel, description="How the work is spread.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="What is saved.")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="What is measured.")
    tracking: Tracking = Field(default_factory=Tracking, description="Where metrics go.")
    export: Export = Field(default_factory=Export, description="What comes out.")

    @classmethod
    def load(cls, path: str | os.PathLike[str], *overrides: str) -> Recipe:
        """Read the recipe at `path` with `key.path=value` overrides; `UserError` if it is wrong."""
        from trainwright.recipe.load import load_recipe

        return load_recipe(path, overrides)

    @property
    def batch_sequences(self) -> int:
        """Rows in the global batch, however the recipe gave them."""
        if self.training.batch_tokens is not None:
            return self.training.batch_tokens // self.data.sequence_length
        return self.training.batch_sequences or 8
