"""The recipe: what a user wants trained, as one closed, frozen, torch-free document.

YAML becomes these models in `recipe.load`; every other room receives them finished. Unknown keys
are refused, every field has a description (the recipe reference and the JSON schema are made from
them), and nothing here touches files or devices.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainwright.recipe.adapter import Adapter
from trainwright.recipe.evaluation import Evaluation, Sampling, Task
from trainwright.recipe.inputs import (
    DataSection,
    ModelSection,
    Source,
    SourceKind,
    TokenizerSection,
    TrainTokenizer,
)
from trainwright.recipe.objective import Objective
from trainwright.recipe.parallel import Parallel, Recompute
from trainwright.recipe.section import (
    Count,
    Fraction,
    NotNegative,
    NotTruth,
    Positive,
    Section,
    Share,
    refusal,
)
from trainwright.recipe.swarm import Swarm

__all__ = [
    "Adapter",
    "Checkpoint",
    "DataSection",
    "Evaluation",
    "Export",
    "ModelSection",
    "Objective",
    "Optimizer",
    "Parallel",
    "Recipe",
    "Sampling",
    "Schedule",
    "Section",
    "Source",
    "SourceKind",
    "Swarm",
    "Task",
    "TokenizerSection",
    "Tracking",
    "TrainTokenizer",
    "Training",
]


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
    precision: Literal["fp32", "bf16", "fp16", "float8"] = Field(
        "bf16",
        description="Arithmetic of the forward and backward pass. Weights and optimizer state stay "
        "fp32; fp16 scales its loss dynamically; float8 makes the blocks' products 8 bits wide on "
        "GPUs that have them (extra `quant`).",
    )
    gradient_clip: Positive | None = Field(
        1.0, description="Largest global norm of the gradients; null leaves them alone."
    )
    recompute: Recompute | Literal["auto"] = Field(
        "none",
        description="Activations recomputed in the backward pass, to save memory: `none`, all of "
        "each block (`full`), all but the outputs of matrix products and attention (`selective`), "
        "a number from 0 (keep nothing) to 1 (keep all) that torch.compile meets at the least "
        "cost; or `auto`, each layer's own of the first three, the quickest that fit into memory.",
    )
    activation_offload: bool = Field(
        False,
        description="Keep activations in the host's memory between forward and backward pass; for "
        "GPUs whose memory is short and whose link to the host is quick.",
    )
    dropout: Fraction = Field(
        0.0,
        description="Share of the embedding's and each branch's outputs set to zero in training; "
        "the same whatever the layout. For small data seen often.",
    )
    router_balance_loss: NotNegative | None = Field(
        None,
        description="Weight of the loss that spreads a mixture of experts' tokens evenly; default "
        "the model config's own.",
        examples=[0.01],
    )
    router_z_loss: NotNegative = Field(
        0.0,
        description="Weight of the loss that keeps a router's logits small, such as 0.001.",
    )
    router_bias_rate: NotNegative | None = Field(
        None,
        description="How far a step moves the biases that balance experts without a loss; default "
        "0.001 for models that have such biases.",
        examples=[0.001],
    )
    neftune_alpha: NotNegative = Field(
        0.0,
        description="Strength of uniform noise on the embeddings in training (NEFTune, "
        "arXiv:2310.05914), such as 5.",
    )
    freeze: list[str] = Field(
        default_factory=list,
        description="Parameters that are not trained: parts of their names, with `*` for anything.",
        examples=[["embed_tokens", "layers.0.*"]],
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


OptimizerName = Literal["adamw", "muon", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"]
PAGED: tuple[OptimizerName, ...] = ("paged-adamw", "paged-adamw-8bit")  # in unified memory
EIGHT_BIT: tuple[OptimizerName, ...] = ("adamw-8bit", "paged-adamw-8bit")


class Optimizer(Section):
    """The update rule. A plain string means `name`."""

    shorthand = "name"

    name: OptimizerName = Field(
        "adamw",
        description="`adamw` (fused); `muon` for the blocks' matrices with AdamW for the rest; "
        "with the extra `quant`, `adamw-8bit`, whose state takes a quarter, and on a GPU "
        "`paged-adamw` and `paged-adamw-8bit`, whose state goes to the host's memory when the "
        "GPU's is full.",
    )
    learning_rate: Positive = Field(3e-4, description="Peak learning rate.")
    weight_decay: NotNegative = Field(
        0.1, description="Decoupled weight decay; norms and biases are left out of it."
    )
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="AdamW's moment decay rates.")
    eps: Positive = Field(1e-8, description="AdamW's denominator term.")
    momentum: Fraction = Field(0.95, description="Muon's momentum.")

    @property
    def is_paged(self) -> bool:
        """Whether the state lies in unified memory."""
        return self.name in PAGED


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


class Tracking(Section):
    """Where metrics go besides `metrics.jsonl`."""

    log_every: Count = Field(1, description="Steps between records in `metrics.jsonl`.")
    to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list,
        description="Trackers to write to as well (extra `track`).",
        examples=[["tensorboard"]],
    )
    project: str = Field("trainwright", description="Project name shown by the trackers.")


GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


class Export(Section):
    """What is made from the last checkpoint: a Hugging Face directory, GGUF files, an upload."""

    at_end: bool = Field(True, description="Export when training ends.")
    merge: bool = Field(
        False,
        description="Of a run with an adapter: the whole model with the adapter in its weights, "
        "instead of the adapter alone (in PEFT's layout).",
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Type of the weights.")
    shard_bytes: Count = Field(5_000_000_000, description="Most bytes in a weight file.")
    gguf: list[GgufType] = Field(
        default_factory=list,
        description="GGUF files to write besides, into the run's `gguf/`, for llama.cpp and what "
        "is built on it (extra `gguf`); an adapter is merged first.",
        examples=[["f16", "q8_0"]],
    )
    push: str | None = Field(
        None,
        description="Repository on the Hugging Face hub, as OWNER/NAME, to upload what was "
        "exported to.",
        examples=["me/my-model"],
    )
    private: bool = Field(False, description="Whether `push` makes a private repository.")

    @model_validator(mode="after")
    def more_only_at_the_end(self) -> Export:
        if not self.at_end and (self.gguf or self.push):
            key = "gguf" if self.gguf else "push"
            raise refusal(f"`{key}` is done at the end, and `at_end` is false", "leave it out", key)
        if self.push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push):
            raise refusal(f"{self.push!r} is no name of a repository", "write OWNER/NAME", "push")
        return self


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
    adapter: Adapter | None = Field(
        None,
        description="Train low-rank adapters instead of the model's own weights.",
        examples=[{"rank": 16}],
    )
    training: Training = Field(
        description="How long and how much a step.", examples=[{"steps": 1000}]
    )
    optimizer: Optimizer = Field(default_factory=Optimizer, description="The update rule.")
    schedule: Schedule = Field(default_factory=Schedule, description="Learning rate over the run.")
    parallel: Parallel = Field(default_factory=Parallel, description="How the work is spread.")
    cluster: Path | None = Field(
        None,
        description="A cluster.yaml: the machines that a launcher such as torchrun starts this on, "
        "and the links between them. Left out, every machine is taken to be like this one.",
        examples=["cluster.yaml"],
    )
    swarm: Swarm | None = Field(
        None,
        description="How machines over slow links train this together, each of them as a peer of "
        "`trainwright swarm`. `train` leaves it aside.",
        examples=[{"method": "sparseloco", "inner_steps": 30}],
    )
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="What is saved.")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="What is measured.")
    tracking: Tracking = Field(default_factory=Tracking, description="Where metrics go.")
    export: Export = Field(default_factory=Export, description="What comes out.")

    @classmethod
    def load(cls, path: str | os.PathLike[str], *overrides: str) -> Recipe:
        """Read the recipe at `path` with `key.path=value` overrides; `UserError` if it is wrong."""
        from trainwright.recipe.load import load_recipe

        return load_recipe(path, overrides)

    @model_validator(mode="after")
    def sections_go_together(self) -> Recipe:
        if self.learns_examples and self.tokenizer is not None and self.tokenizer.train is not None:
            raise refusal(
                "a tokenizer is trained on plain text, and these data are examples",
                "name one with `path`, or leave `tokenizer` out to use the model's own",
                "tokenizer.train",
            )
        if (
            self.adapter is not None
            and self.adapter.plus_ratio > 1
            and "adamw" not in (self.optimizer.name)
        ):
            raise refusal(
                "LoRA+ gives AdamW's learning rates factors, and muon would update the matrices",
                "write `optimizer: adamw`, or leave `plus_ratio` out",
                "adapter.plus_ratio",
            )
        if self.evaluation.tasks and self.objective.gives_scores:
            raise refusal(
                "a reward model scores texts and answers no questions",
                "leave the tasks out: the validation loss has the share of pairs it ranks right",
                "evaluation.tasks",
            )
        if self.learns_examples and self.data.packing == "concat":
            raise refusal(
                f"`concat` splits documents, and {self.objective.kind} learns from whole examples",
                "write `packing: best-fit`, or leave it out",
                "data.packing",
            )
        return self

    @property
    def learns_examples(self) -> bool:
        """Whether data are examples with prompts and answers, rather than plain text."""
        return self.objective.kind != "next_token"

    @property
    def packing(self) -> Literal["concat", "best-fit", "none"]:
        """How documents become rows."""
        return self.data.packing or ("best-fit" if self.learns_examples else "concat")

    @property
    def batch_sequences(self) -> int:
        """Rows in the global batch, however the recipe gave them."""
        if self.training.batch_tokens is not None:
            return self.training.batch_tokens // self.data.sequence_length
        return self.training.batch_sequences or 8
