"""Axolotl's `datasets`: each entry a source, its type a format with columns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from trainwright.recipe.importers.job import (
    Job,
    Rule,
    Table,
    each,
    ignored,
    names,
    section,
    unsupported,
)
from trainwright.recipe.importers.notes import Kind
from trainwright.recipe.importers.rules import OWN_LOADING
from trainwright.recipe.importers.templates import chat_template, template_file

_BUILDERS = ("json", "parquet", "arrow", "text")

# How preference types name columns, where rows here are not known by the same names.
_PREFERENCE: dict[str, dict[str, str]] = {
    **{name: {} for name in ("argilla", "argilla_chat", "intel", "prompt_pairs", "ultra")},
    "default": {},
    "icr": {"prompt": "input"},
}
_KTO = ("argilla", "argilla_chat", "intel", "prompt_pairs", "ultra")
_ARGILLA = "answers in `chosen_response` and `rejected_response` want `columns`"
# Types of instructions and conversations: our format, and columns of other names.
_INSTRUCTION: dict[str, tuple[str, dict[str, str]]] = {
    "alpaca": ("alpaca", {}),
    "alpaca_chat": ("alpaca", {}),
    "alpaca_w_system": ("alpaca", {}),
    "alpaca_instruct": ("alpaca", {}),
    "explainchoice": ("alpaca", {}),
    "gpteacher": ("alpaca", {"output": "response"}),
    "context_qa": ("prompt_completion", {"prompt": "question", "completion": "answer"}),
    "sharegpt": ("sharegpt", {}),
    "messages": ("messages", {}),
}
# A type's own way of writing a prompt, beside the recipe's chat template.
_WORDING = "the prompt is worded by the format and the chat template here, not as Axolotl words it"


def read_datasets(job: Job, key: str, value: Any) -> None:
    """`datasets` and `test_datasets`: a list of entries."""
    target = "data.validation" if key == "test_datasets" else "data.sources"
    if not isinstance(value, list):
        job.unsupported(key, "a list of datasets is expected")
        return
    sources = []
    for index, entry in enumerate(value):
        if not isinstance(entry, dict):
            job.unsupported(f"{key}.{index}", "a dataset is a section of keys")
            continue
        source = _Entry(job, f"{key}.{index}", entry, target).read()
        if source:
            sources.append(source)
    if sources:
        job.put(target, sources)


def is_plain_text(entry: Any) -> bool:
    """Whether a dataset is text to continue, without prompt or turns."""
    kind = entry.get("type") if isinstance(entry, dict) else None
    return isinstance(kind, str) and kind.split(":")[0].split(".")[0] in ("completion", "pretrain")


def _all_alpaca(job: Job) -> bool:
    """Whether every data set has Alpaca's wording; a template of ours is for all of them."""
    entries = job.get("datasets")
    kinds = [each.get("type") for each in entries if isinstance(each, dict)]
    return all(str(kind) in ("alpaca", "alpaca_w_system.load", "alpaca_w_system") for kind in kinds)


class _Entry:
    """One dataset. Its rules write into `source` instead of the recipe."""

    def __init__(self, job: Job, key: str, values: dict[str, Any], target: str) -> None:
        self.job, self.key, self.values, self.target = job, key, values, target
        self.source: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        self.job.run(self.table(), self.key)
        columns = self.source.get("columns")
        if not columns:
            self.source.pop("columns", None)
        return self.source

    def at(self, name: str) -> str:
        return f"{self.key}.{name}"

    def to(self, name: str) -> str:
        return f"{self.target}.{self.key.rpartition('.')[2]}.{name}"

    def set(self, key: str, name: str, value: Any, differs: str = "") -> None:
        self.source[name] = value
        kind: Kind = "approximated" if differs else "translated"
        self.job.note(kind, key, self.to(name), differs)

    def column(self, key: str, ours: str, theirs: str) -> None:
        if ours != theirs:
            self.source.setdefault("columns", {})[ours] = theirs
        self.job.note("translated", key, self.to("columns"))

    def table(self) -> Table:
        rules: dict[str, Rule] = {
            "path": lambda job, key, value: self.path(key),
            "data_files": lambda job, key, value: self.path(key),
            "type": lambda job, key, value: self.kind(key, value),
            "name": lambda job, key, value: self.set(key, "subset", str(value)),
            "split": lambda job, key, value: self.split(key, str(value)),
            "ds_type": lambda job, key, value: self.file_kind(key, str(value)),
            "roles_to_train": lambda job, key, value: self.roles(key, value),
            "roles": lambda job, key, value: self.role_names(key, value),
            "message_property_mappings": lambda job, key, value: self.properties(key),
            "conversation": lambda job, key, value: chat_template(job, key, value),
            "chat_template": lambda job, key, value: chat_template(job, key, value),
            "chat_template_jinja": lambda job, key, value: template_file(job, key, value),
            "train_on_eos": lambda job, key, value: self.end(key, value),
            "field": lambda job, key, value: self.plain_field(key, value),
            "text_column": lambda job, key, value: self.plain_field(key, value),
            "field_messages": lambda job, key, value: self.messages(key, value),
            "message_field_role": lambda job, key, value: self.properties(key),
            "message_field_content": lambda job, key, value: self.properties(key),
        }
        for field, ours in _FIELDS.items():
            rules[field] = self.named(ours)
        rules |= each("trust_remote_code", unsupported("a dataset's own code is never run"))
        rules |= each("preprocess_shards skip", ignored(OWN_LOADING))
        return {**rules, **_UNSUPPORTED}

    def named(self, ours: str) -> Rule:
        return lambda job, key, value: self.column(key, ours, str(value))

    def path(self, key: str) -> None:
        """`path` and `data_files` together: a file, a folder or a name on the hub."""
        path, files = self.values.get("path"), self.values.get("data_files")
        chosen = path
        if files:
            file = next(iter(names(files)), "")
            inside = path not in _BUILDERS and path and Path(str(path)).is_dir()
            chosen = f"{path}/{file}" if inside else file
            several = isinstance(files, list) and len(files) > 1
            differs = "several files are several sources; this is the first" if several else ""
            if path not in (*_BUILDERS, None, "") and not inside:
                differs = f"the file alone, without `{path}`; name it as it lies on this disk"
            self.source["path"] = chosen
            for name in ("path", "data_files"):
                if self.values.get(name) and not self.job.is_noted(self.at(name)):
                    self.set(self.at(name), "path", chosen, differs)
        else:
            self.set(key, "path", str(path))

    def file_kind(self, key: str, value: str) -> None:
        endings = {"json": ("json", "jsonl"), "text": ("txt",)}.get(value, (value,))
        kind = "jsonl" if value == "json" else value
        if str(self.values.get("path", "")).endswith(endings):
            self.job.note("translated", key, self.to("path"), "known by the file's ending")
        elif kind in ("jsonl", "parquet", "arrow", "text"):
            self.set(key, "kind", kind)
        else:
            self.job.unsupported(key, "files are json, jsonl, parquet, arrow or text")

    def split(self, key: str, value: str) -> None:
        name, bracket, part = value.partition("[")
        count = re.fullmatch(r":(\d+)\]", part)
        if not bracket:
            self.set(key, "split", name)
        elif count:
            self.source["limit"] = int(count[1])
            self.set(key, "split", name)
        else:
            self.set(key, "split", name, f"all of it, not `[{part}`; `limit` takes the first rows")

    def kind(self, key: str, value: Any) -> None:
        """The type of prompt, which is the format of the rows."""
        if isinstance(value, dict):
            self.own_wording(key, value)
            return
        text = str(value)
        head, _, tail = text.replace(":", ".").partition(".")
        rl = str(self.job.get("rl") or "")
        if self.job.get("reward_model"):
            rl = "reward"
        if is_plain_text({"type": text}):
            if tail:
                self.source["field"] = tail
            if self.job.given("objective.kind") == "next_token":
                self.job.note("translated", key, self.to("field"), "plain text")
            else:
                self.set(key, "format", "text")
        elif rl and rl != "kto":
            self.preference(key, tail if head != "bradley_terry" else "")
        elif rl == "kto":
            known = tail.partition(".")[0] in _KTO
            self.set(key, "format", "kto", "" if known else f"`{text}` is not known")
        elif head == "chat_template":
            self.conversation(key)
        elif text in _INSTRUCTION or head in _INSTRUCTION:
            ours, columns = _INSTRUCTION.get(text) or _INSTRUCTION[head]
            self.source["columns"] = {**columns, **self.source.get("columns", {})}
            if _all_alpaca(self.job) and not self.job.has("chat_template"):
                # Without turns of a chat, Axolotl words the prompt as Alpaca did.
                self.job.put("tokenizer.chat_template", "alpaca")
                self.set(key, "format", ours, "worded by the template `alpaca`, near to Axolotl's")
            else:
                self.set(key, "format", ours, _WORDING if ours == "alpaca" else "")
        else:
            differs = f"`{text}` is not known; the rows' own keys will tell their format"
            self.set(key, "format", "auto", differs)

    def preference(self, key: str, kind: str) -> None:
        kind = kind or "default"
        columns = dict(_PREFERENCE.get(kind, {}))
        differs = _ARGILLA if kind == "argilla" else ""
        if kind not in _PREFERENCE:
            differs = f"`{kind}` is not known; the rows' own keys will tell their columns"
        if "field_messages" in self.values:
            columns["prompt"] = str(self.values["field_messages"])
        self.source["columns"] = {**columns, **self.source.get("columns", {})}
        self.set(key, "format", "preference", differs)

    def conversation(self, key: str) -> None:
        role, content = self.role_and_content()
        shared = (role, content) == ("from", "value")
        self.set(key, "format", "sharegpt" if shared else "messages")
        field = str(self.values.get("field_messages") or "messages")
        if field != ("conversations" if shared else "messages"):
            self.source.setdefault("columns", {})["conversations" if shared else "messages"] = field

    def role_and_content(self) -> tuple[str, str]:
        mapping = section(self.values.get("message_property_mappings") or {})
        role = mapping.get("role") or self.values.get("message_field_role") or "role"
        content = mapping.get("content") or self.values.get("message_field_content") or "content"
        return str(role), str(content)

    def messages(self, key: str, value: Any) -> None:
        preference = self.job.get("rl") not in (None, "", "kto") or self.job.get("reward_model")
        if not preference and self.values.get("type") in (None, ""):
            self.conversation(key)
        elif preference:
            self.source.setdefault("columns", {})["prompt"] = str(value)
            self.job.note("translated", key, self.to("columns"))
        else:
            self.job.note("translated", key, self.to("columns"))

    def properties(self, key: str) -> None:
        pair = self.role_and_content()
        mapping = section(self.values.get("message_property_mappings") or {})
        others = sorted(set(mapping) - {"role", "content"})
        if pair in (("from", "value"), ("role", "content")) and not others:
            self.job.note("translated", key, self.to("format"))
            return
        columns = self.source.setdefault("columns", {})
        for ours, theirs in (("role", pair[0]), ("content", pair[1]), *mapping.items()):
            if ours != theirs and pair != ("from", "value"):
                columns[ours] = theirs
        self.job.note("translated", key, self.to("columns"))

    def roles(self, key: str, value: Any) -> None:
        if value in (["assistant"], ["gpt"], ["gpt", "assistant"], ["assistant", "gpt"]):
            self.job.note("translated", key, "objective.train_on")
        else:
            reason = "the assistant's turns are trained on; others are with `train_on: all` only"
            self.job.unsupported(key, reason)

    def role_names(self, key: str, value: Any) -> None:
        usual = {"human", "user", "gpt", "assistant", "model", "system", "tool", "input", "output"}
        given = {name for group in section(value).values() for name in names(group)}
        if given <= usual:
            self.job.ignored(key, "the usual names of roles are known")
        else:
            others = ", ".join(sorted(given - usual))
            self.job.unsupported(key, f"roles must bear usual names in the file: {others} do not")

    def end(self, key: str, value: Any) -> None:
        if value == "turn":
            self.job.ignored(key, "the end of each trained turn is trained here too")
        else:
            self.job.unsupported(key, "the end of each trained turn is trained, and no other")

    def plain_field(self, key: str, value: Any) -> None:
        if is_plain_text(self.values):
            self.set(key, "field", str(value))
        else:
            self.job.ignored(key, "of use for `type: completion` only")

    def own_wording(self, key: str, value: dict[str, Any]) -> None:
        """A type written out: columns are ours too, their wording is not."""
        preference = {"field_chosen", "field_rejected"} & set(value)
        ours = "preference" if preference else "kto" if self.job.get("rl") == "kto" else "alpaca"
        self.source["format"] = ours
        for name, inner in value.items():
            path = f"{key}.{name}"
            if not inner:
                self.job.ignored(path, "empty")
            elif name.startswith("field_") and name in _FIELDS:
                self.column(path, _FIELDS[name], str(inner))
            else:
                self.job.unsupported(path, _WORDING)


_FIELDS = {
    "field_tools": "tools",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_prompt": "prompt",
    "field_completion": "completion",
    "field_label": "label",
    "field_system": "system",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
}

_UNSUPPORTED: Table = {
    **each("revision", unsupported("the newest version on the hub is taken; download the other")),
    **each("shards shards_idx", unsupported("no part of a dataset is taken but the first `limit`")),
    **each(
        "message_field_training message_field_training_detail",
        unsupported("name the key `train` in the messages themselves"),
    ),
    **each("drop_system_message", unsupported("take the system turns out of the file")),
    **each("split_thinking", unsupported("give the thoughts as `reasoning_content`")),
    **each(
        "field_thinking",
        unsupported("a turn's reasoning is `reasoning_content`, `reasoning` or `thinking`"),
    ),
    **each("template_thinking_key", unsupported("the template's own key is `reasoning_content`")),
    **each("input_format input_transform", unsupported(_WORDING)),
    **each("field_human field_model", unsupported("turns are `from` and `value` in a list")),
    **each("logprobs_field temperature", unsupported("distillation asks the teacher itself")),
    **each(
        "step_separator max_completion_length train_on_last_step_only",
        unsupported("no stepwise rewards"),
    ),
}
