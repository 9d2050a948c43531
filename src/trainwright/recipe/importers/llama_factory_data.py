"""LLaMA-Factory's data sets: names that `dataset_info.json` explains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainwright.recipe.importers.job import Job, names, number

_INFO = "dataset_info.json"

# Our columns under LLaMA-Factory's names, and what LLaMA-Factory calls them in the file by default.
_ALPACA = {
    "instruction": ("prompt", "instruction"),
    "input": ("query", "input"),
    "output": ("response", "output"),
    "system": ("system", None),
    "history": ("history", None),
}
_SHAREGPT = {
    "conversations": ("messages", "conversations"),
    "system": ("system", None),
    "tools": ("tools", None),
}
_MEDIA = ("images", "videos", "audios")


def sources(job: Job, key: str, kind: str) -> list[dict[str, Any]]:
    """The sources that `key` names, with their formats and columns, and a note on `key`.

    Of each entry of `dataset_info.json` (in `dataset_dir`, or beside the configuration) this takes
    path, format, columns, subset, split and number of samples. `kind` is the objective's.
    """
    folder, info = _find_info(job)
    found, doubts = [], []
    for name in job.names(key):
        entry = info.get(name) if info is not None else None
        if isinstance(entry, dict):
            source, differs = _source(entry, folder, kind)
        else:
            lost = "is not in it" if info is not None else "needs it, but it is not here"
            source, differs = {"path": name}, f"`{name}` {lost}; write the file's path and format"
        found.append(source)
        doubts += [differs] if differs else []
    target = "data.validation" if key == "eval_dataset" else "data.sources"
    if doubts:
        prefix = f"{_INFO}: " if not all("text" in doubt for doubt in doubts) else ""
        job.approximated(key, target, found, prefix + "; ".join(doubts))
    else:
        reason = f"as {_INFO} explains" if info is not None else ""
        job.translated(key, target, found, reason)
    return found


def _find_info(job: Job) -> tuple[Path, dict[str, Any] | None]:
    """The folder of the data, and its `dataset_info.json` if there is one to read.

    The folder is "." where it is the configuration's own, beside which the recipe will lie; else it
    is absolute, so that the recipe may lie anywhere.
    """
    beside = Path(job.name).parent
    named = Path(str(job.get("dataset_dir") or "data"))
    for folder in (named, beside / named, beside):
        try:
            info = json.loads((folder / _INFO).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(info, dict):
            same = folder.resolve() == beside.resolve()
            return Path() if same else folder.resolve(), info
    return named, None


def _source(entry: dict[str, Any], folder: Path, kind: str) -> tuple[dict[str, Any], str]:
    """A source for one entry, and what is doubtful about it."""
    columns = entry.get("columns") or {}
    source: dict[str, Any] = {}
    doubts = []
    if "hf_hub_url" in entry:
        source["path"] = entry["hf_hub_url"]
    elif "file_name" in entry:
        source["path"] = str(folder / str(entry["file_name"]))
    else:
        origin = next(
            (entry[each] for each in ("ms_hub_url", "om_hub_url", "script_url") if each in entry),
            "",
        )
        source["path"] = str(origin)
        doubts.append(f"`{origin}` is not on the Hugging Face hub; download it and name the file")
    for theirs, ours in (("subset", "subset"), ("split", "split"), ("num_samples", "limit")):
        if entry.get(theirs):
            source[ours] = entry[theirs]
    if kind == "next_token":
        field = columns.get("prompt", "text")
        if field != "text":
            source["field"] = field
        return source, "; ".join(doubts)
    source["format"], renamed = _format(entry, kind)
    if renamed:
        source["columns"] = renamed
    media = [each for each in _MEDIA if each in columns]
    if media:
        doubts.append(f"its {' and '.join(media)} cannot be read: models here read text only")
    return source, "; ".join(doubts)


def _format(entry: dict[str, Any], kind: str) -> tuple[str, dict[str, str]]:
    """Our format for an entry, and the columns whose names in the file are not ours."""
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    shared = entry.get("formatting", "alpaca") == "sharegpt"
    expected = _SHAREGPT if shared else _ALPACA
    renamed = {}
    for ours, (theirs, default) in expected.items():
        column = columns.get(theirs, default if not columns or theirs == "messages" else None)
        if column is not None and column != ours:
            renamed[ours] = column
    if kind == "kto":
        label = columns.get("kto_tag", "label")
        renamed |= {"label": label} if label != "label" else {}
        if renamed.get("conversations") == "messages":
            del renamed["conversations"]  # turns are known by either name
        return "kto", renamed
    if entry.get("ranking"):
        for answer in ("chosen", "rejected"):
            if columns.get(answer, answer) != answer:
                renamed[answer] = columns[answer]
        return "preference", renamed
    if not shared:
        return "alpaca", renamed
    role, content = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    if (role, content) == ("from", "value"):
        return "sharegpt", renamed
    column = renamed.pop("conversations", "conversations")
    named = {"messages": column, "role": role, "content": content}
    return "messages", renamed | {ours: theirs for ours, theirs in named.items() if ours != theirs}


def limit(job: Job, key: str, value: Any) -> None:
    """`max_samples`: the most rows of each data set."""
    most = int(number(value))
    for source in job.given("data.sources") or []:
        source["limit"] = min(most, source.get("limit", most))
    job.note("translated", key, "data.sources")


def shares(job: Job, key: str, value: Any) -> None:
    """`interleave_probs`: the data sets' shares of the mixture."""
    found = job.given("data.sources") or []
    weights = [number(each) for each in names(str(value))]
    if len(weights) != len(found):
        job.unsupported(key, "there is not one for each data set")
        return
    for source, weight in zip(found, weights, strict=True):
        source["weight"] = weight
    job.note("approximated", key, "data.sources", "shares of the tokens, not of the rows")
