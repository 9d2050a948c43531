"""The recipe's first half: which model, which tokenizer, which text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trainwright.recipe.section import Count, Fraction, NotTruth, Positive, Section, refusal


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
    def finite_config(self) -> ModelSection:
        try:
            json.dumps(self.config, allow_nan=False)
        except ValueError:
            raise refusal(
                "a number is not finite, which no config.json can hold",
                "write a plain number",
                "config",
            ) from None
        return self

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
    chat_template: str | None = Field(
        None,
        description="How conversations become text: a name such as chatml or llama3, or a Jinja "
        "file; default the tokenizer's own, or chatml where it has none.",
        examples=["chatml"],
    )

    @model_validator(mode="after")
    def one_origin(self) -> TokenizerSection:
        if self.path is not None and self.train is not None:
            fix = "write either `path: DIRECTORY` or `train: {vocab_size: 4096}`"
            raise refusal("`path` and `train` exclude each other", fix)
        if self.path is None and self.train is None and self.chat_template is None:
            fix = "write either `path: DIRECTORY` or `train: {vocab_size: 4096}`"
            raise refusal("the tokenizer is empty", fix)
        return self


SourceKind = Literal["text", "jsonl", "parquet", "arrow", "dataset", "python-stdlib", "stdlib-docs"]
Format = Literal[
    "auto",
    "text",
    "prompt_completion",
    "alpaca",
    "sharegpt",
    "messages",
    "preference",
    "kto",
    "oasst",
]
EMBEDDED = ("python-stdlib", "stdlib-docs")  # kinds that need no path


class Source(Section):
    """Where documents come from. A plain string means `path`, or an embedded source's `kind`:
    `python-stdlib`, the interpreter's own library, or `stdlib-docs`, conversations about it."""

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
    format: Format = Field(
        "auto",
        description="How a row tells an example, for every objective but next_token; `auto` "
        "knows it by the row's keys.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Where the names differ: the format's own name, and the file's.",
        examples=[{"prompt": "question", "completion": "answer"}],
    )
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

    @classmethod
    def expand(cls, value: Any) -> Any:
        return {"kind": value} if value in EMBEDDED else super().expand(value)

    @model_validator(mode="after")
    def has_path(self) -> Source:
        if self.kind in EMBEDDED and self.path is not None:
            raise refusal(
                f"`{self.kind}` is made from the interpreter's own library and has no `path`",
                "leave `path` out, or write the kind of file that it is",
                "path",
            )
        if self.kind not in EMBEDDED and self.path is None:
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
    packing: Literal["concat", "best-fit", "none"] | None = Field(
        None,
        description="`concat` fills rows end to end and splits documents; `best-fit` splits only "
        "documents longer than a row; `none` gives each document a row of its own. Default concat "
        "for next_token, and best-fit for other objectives, whose examples are never split.",
        examples=["best-fit"],
    )
    too_long: Literal["cut", "drop"] = Field(
        "cut",
        description="What happens to examples longer than a row, for every objective but "
        "next_token: they lose their end, or are left out. Those that would lose all that is "
        "trained are always left out; both are counted and named.",
    )
    bad_rows: Literal["refuse", "drop"] = Field(
        "refuse",
        description="What happens to rows that are no example or hold nothing to train on: the run "
        "does not begin, or they are left out, counted and named.",
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
