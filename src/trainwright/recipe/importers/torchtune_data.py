"""torchtune's `dataset` sections: components, some of which stand for one dataset on the hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainwright.recipe.importers.job import Job, Rule, is_off, names, section, truth
from trainwright.recipe.importers.rules import IMAGES


@dataclass(frozen=True)
class _Component:
    """What a component reads and how: `path` where it is always the same dataset."""

    format: str = "auto"
    path: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    subset: str = ""
    plain: str = ""  # the column of plain text
    trains_input: bool = False


_COMPONENTS: dict[str, _Component] = {
    "alpaca_dataset": _Component("alpaca", "tatsu-lab/alpaca", trains_input=True),
    "alpaca_cleaned_dataset": _Component("alpaca", "yahma/alpaca-cleaned", trains_input=True),
    "grammar_dataset": _Component("alpaca", "liweili/c4_200m", {"instruction": "input"}),
    "samsum_dataset": _Component(
        "alpaca", "Samsung/samsum", {"instruction": "dialogue", "output": "summary"}
    ),
    "slimorca_dataset": _Component("sharegpt", "Open-Orca/SlimOrca-Dedup"),
    "hh_rlhf_helpful_dataset": _Component("preference", "RLHFlow/HH-RLHF-Helpful-standard"),
    "stack_exchange_paired_dataset": _Component(
        "preference",
        "lvwerra/stack-exchange-paired",
        {"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
    ),
    "wikitext_dataset": _Component(
        "text", "EleutherAI/wikitext_document_level", subset="wikitext-103-v1", plain="page"
    ),
    "cnn_dailymail_articles_dataset": _Component(
        "text", "ccdv/cnn_dailymail", subset="3.0.0", plain="article"
    ),
    "text_completion_dataset": _Component("text", plain="text"),
    "chat_dataset": _Component("sharegpt"),
    "instruct_dataset": _Component("alpaca", "", {"instruction": "input"}),
    "preference_dataset": _Component("preference"),
}
# Components whose rows are one input and one output.
_INPUT_OUTPUT = ("instruct_dataset", "grammar_dataset", "samsum_dataset")
_BUILDERS = ("json", "parquet", "arrow", "text")


def is_plain_text(dataset: Any) -> bool:
    """Whether every dataset of the section (or list of sections) is text to continue."""
    entries = dataset if isinstance(dataset, list) else [dataset]
    known = [_COMPONENTS.get(_name(each)) for each in entries]
    return bool(known) and all(each is not None and bool(each.plain) for each in known)


def _name(entry: Any) -> str:
    value = entry.get("_component_", "") if isinstance(entry, dict) else ""
    return str(value).rpartition(".")[2]


def read_datasets(job: Job, key: str, target: str) -> None:
    """One dataset, or a list of them, into `target`."""
    value = job.get(key)
    entries = value if isinstance(value, list) else [value]
    keys = [f"{key}.{index}" for index in range(len(entries))] if value is entries else [key]
    sources: list[dict[str, Any]] = []
    for path, entry in zip(keys, entries, strict=True):
        if isinstance(entry, dict):
            source = _source(job, path, entry, f"{target}.{len(sources)}")
            sources += [source] if source else []
    if sources:
        job.put(target, sources)
    _trained(job, keys, entries)


def _source(job: Job, key: str, entry: dict[str, Any], target: str) -> dict[str, Any]:
    name = _name(entry)
    known = _COMPONENTS.get(name)
    if "cauldron" in name or "llava" in name or "vqa" in name or "multimodal" in name:
        raise job.refusal(f"{key}._component_", f"`{name}`: {IMAGES}", "import one of text")
    plain = job.given("objective.kind") == "next_token"
    made = known or _Component()
    source: dict[str, Any] = {"path": made.path} if made.path else {}
    if made.subset:
        source["subset"] = made.subset
    if plain and made.plain != "text":
        source["field"] = made.plain
    elif not plain:
        source["format"] = made.format
        columns = {**made.columns, **({"text": made.plain} if made.plain else {})}
        columns = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
        if columns:
            source["columns"] = columns
    if "_component_" in entry:
        lost = "" if known else f"`{name}` is not known; the rows' own keys will tell their format"
        job.note("translated" if known else "approximated", f"{key}._component_", target, lost)
    rules = _rules(source, target, entry, plain)
    job.run(rules, key)
    return source


def _rules(
    source: dict[str, Any], target: str, entry: dict[str, Any], plain: bool
) -> dict[str, Rule]:
    def put(ours: str, value: Any, job: Job, key: str) -> None:
        source[ours] = value
        job.note("translated", key, f"{target}.{ours}")

    def path(job: Job, key: str, value: Any) -> None:
        files = entry.get("data_files")
        chosen = value
        if files and (value in _BUILDERS or key.endswith("data_files")):
            chosen = next(iter(names(files)), "")
        if key.endswith("data_files") and entry.get("source") not in (*_BUILDERS, None):
            job.unsupported(key, "name the file alone, as it lies on this disk")
            return
        source["path"] = str(chosen)
        several = isinstance(files, list) and len(files) > 1
        reason = "several files are several sources; this is the first" if several else ""
        job.note("approximated" if several else "translated", key, f"{target}.path", reason)

    def column_map(job: Job, key: str, value: Any) -> None:
        asked = "instruction" if _name(entry) in _INPUT_OUTPUT else "input"
        given = {
            asked if ours == "input" else ours: str(col) for ours, col in section(value).items()
        }
        columns = {ours: col for ours, col in given.items() if ours != col}
        put("columns", {**source.get("columns", {}), **columns}, job, key)

    def style(job: Job, key: str, value: Any) -> None:
        put("format", "messages" if value == "openai" else "sharegpt", job, key)

    def conversations(job: Job, key: str, value: Any) -> None:
        own = "messages" if entry.get("conversation_style") == "openai" else "conversations"
        if value != own:
            source["columns"] = {own: str(value)}
        job.note("translated", key, f"{target}.columns")

    def column(job: Job, key: str, value: Any) -> None:
        if plain:
            put("field", str(value), job, key)
        else:
            put("columns", {"text": str(value)}, job, key)

    def split(job: Job, key: str, value: Any) -> None:
        name, bracket, rest = str(value).partition("[")
        source["split"] = name
        reason = f"all of it, not `[{rest}`; `limit` takes the first rows" if bracket else ""
        job.note("approximated" if bracket else "translated", key, f"{target}.split", reason)

    def packed(job: Job, key: str, value: Any) -> None:
        ours = "best-fit" if truth(value) else "none"
        job.translated(key, "data.packing", ours)

    def system(job: Job, key: str, value: Any) -> None:
        job.unsupported(key, "system turns stand in the data")

    return {
        "source": path,
        "data_files": path,
        "column_map": column_map,
        "conversation_style": style,
        "conversation_column": conversations,
        "column": column,
        "split": split,
        "name": lambda job, key, value: put("subset", str(value), job, key),
        "subset": lambda job, key, value: put("subset", str(value), job, key),
        "packed": packed,
        "new_system_prompt": system,
    }


def _trained(job: Job, keys: list[str], entries: list[Any]) -> None:
    """`train_on_input` of each dataset; one `train_on` is for all of them."""
    if job.given("objective.kind") not in ("sft", "distill"):
        for key in keys:
            if job.has(f"{key}.train_on_input"):
                job.ignored(f"{key}.train_on_input", "of no use for this objective")
        return
    whole = []
    for key, entry in zip(keys, entries, strict=True):
        known = _COMPONENTS.get(_name(entry), _Component())
        given = job.get(f"{key}.train_on_input")
        whole.append(known.trains_input if given is None else not is_off(given))
    ours = "all" if all(whole) else "assistant"
    job.put("objective.train_on", ours)
    for key, every in zip(keys, whole, strict=True):
        path = f"{key}.train_on_input"
        if not job.has(path):
            continue
        if every == (ours == "all"):
            job.note("translated", path, "objective.train_on")
        else:
            reason = "one `train_on` is for all sources"
            job.note("approximated", path, "objective.train_on", reason)
