"""What a source of the recipe points at: its kind and its files, found without reading them."""

from __future__ import annotations

import difflib
import glob
import os
import re
import sysconfig
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from trainwright.errors import Mistake, UserError
from trainwright.recipe.inputs import EMBEDDED
from trainwright.recipe.schema import Source, SourceKind

ENDINGS: dict[SourceKind, tuple[str, ...]] = {
    "text": (
        *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".xml", ".csv"),
        *(".tsv", ".log", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go"),
        *(".java", ".js", ".ts", ".rb", ".sh", ".sql", ".yaml", ".yml", ".toml"),
    ),
    "jsonl": (".jsonl", ".ndjson", ".jsonlines", ".json"),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather", ".ipc"),
}
KIND_OF: dict[str, SourceKind] = {
    ending: kind for kind, endings in ENDINGS.items() for ending in endings
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

_GLOB = re.compile(r"[*?[]")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Tests are not the library's own voice, and installed packages are not the library.
_STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Located:
    """A source found on disk, or the hub dataset `hub` (then without files).

    `files` are in reading order; documents are named after them relative to `root`.
    """

    kind: SourceKind
    root: Path
    files: tuple[Path, ...]
    hub: str | None = None

    def name_of(self, file: Path) -> str:
        """How documents of `file` are named: its path below `root`, with forward slashes."""
        return file.relative_to(self.root).as_posix()


def locate(source: Source, key: str = "") -> Located:
    """Find the files of `source`; `key` is its place in the recipe ("data.sources.0").

    Raises UserError for a missing path, a glob or folder without files, an unknown ending, and
    files of several kinds where no kind is given.
    """
    if source.kind in EMBEDDED:
        return _locate_stdlib(source.kind, key)
    assert source.path is not None  # the schema holds that
    path = Path(source.path).expanduser()
    key = f"{key}.path" if key else ""
    if path.is_dir():
        return _locate_folder(path, source.kind, key)
    if path.exists():
        kind = source.kind or kind_of_ending(path, key)
        if kind == "dataset":
            what = f"{path} is a file, not the folder of a saved dataset"
            raise _refusal(what, "give the folder, or another `kind`", key)
        return Located(kind, path.parent, (path,))
    if _GLOB.search(str(path)):
        return _locate_glob(path, source.kind, key)
    if source.kind == "dataset" or (source.kind is None and _is_hub_id(source.path)):
        return Located("dataset", path, (), hub=source.path)
    raise _missing(path, key)


def kind_of_ending(path: Path, key: str = "") -> SourceKind:
    """The kind that a file's ending says; UserError with the nearest one where it says none."""
    ending = bare_ending(path)
    if ending in KIND_OF:
        return KIND_OF[ending]
    near = difflib.get_close_matches(ending, KIND_OF, n=1, cutoff=0.7)
    kind: SourceKind = KIND_OF[near[0]] if near else "text"
    shown = f"the ending `{ending}`" if ending else "a name without an ending"
    closest = f"; the nearest ending is `{near[0]}`" if near else ""
    raise _refusal(
        f"{path}: {shown} does not say how to read it{closest}",
        f"add `kind: {kind}` to the source, or another of {', '.join(ENDINGS)}",
        key,
    )


def bare_ending(path: Path) -> str:
    """`.jsonl` of `a.jsonl.gz`: a file's ending below its compression, in lower case."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def _locate_stdlib(kind: SourceKind, key: str) -> Located:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in _files_below(root, _STDLIB_LEFT_OUT) if file.suffix == ".py"]
    if not files:
        raise _refusal(
            f"this Python has no library sources in {root}",
            "name text files of your own in `data.sources`",
            key,
        )
    return Located(kind, root, _in_order(root, files))


def _locate_folder(folder: Path, kind: SourceKind | None, key: str) -> Located:
    if kind in (None, "dataset") and _is_saved_dataset(folder):
        return Located("dataset", folder, _in_order(folder, _files_below(folder)))
    if kind == "dataset":
        raise _refusal(
            f"{folder} is no dataset saved with `save_to_disk`: it has no dataset_info.json",
            "name its files in a glob, such as `path: FOLDER/**/*.parquet`",
            key,
        )
    found = list(_files_below(folder))
    if not found:
        raise _refusal(f"the folder {folder} holds no files", "check the path", key)
    return _of_one_kind(folder, found, kind, f"the folder {folder}", key)


def _locate_glob(pattern: Path, kind: SourceKind | None, key: str) -> Located:
    root = Path(*_before_glob(pattern.parts)) if pattern.parts else Path()
    found = [Path(match) for match in glob.glob(str(pattern), recursive=True)]  # noqa: PTH207
    files = [match for match in found if match.is_file()]
    if not files:
        raise _refusal(
            f"no file matches {pattern}"
            + ("" if root.is_dir() else f": there is no folder {root}"),
            "`**` stands for folders at any depth, `*` for any name in one folder",
            key,
        )
    if kind == "dataset":
        raise _refusal(f"{pattern} is a glob, a dataset is one folder", "drop `kind`", key)
    if kind is not None:
        return Located(kind, root, _in_order(root, files))
    return _of_one_kind(root, files, None, str(pattern), key)


def _of_one_kind(
    root: Path, found: list[Path], kind: SourceKind | None, place: str, key: str
) -> Located:
    """The files among `found` that a source of `kind` reads, or all if they are of one kind."""
    by_kind: dict[SourceKind | None, list[Path]] = {}
    for file in found:
        by_kind.setdefault(KIND_OF.get(bare_ending(file)), []).append(file)
    if kind is not None:
        # A kind given outright also claims files whose ending says nothing, if there are no others.
        files = by_kind.get(kind) or by_kind.get(None)
        if not files:
            endings = ", ".join(ENDINGS[kind][:3])
            what = f"{place} holds no {kind} files ({endings}, …)"
            raise _refusal(what, "check `path` and `kind`", key)
        return Located(kind, root, _in_order(root, files))
    known = {each: files for each, files in by_kind.items() if each is not None}
    if len(known) > 1 and all(_is_read_me(file) for file in known.get("text", ())):
        known.pop("text", None)
    if not known:
        kind_of_ending(sorted(found)[0], key)
    if len(known) > 1:
        counts = ", ".join(f"{len(files)} {each}" for each, files in sorted(known.items()))
        raise _refusal(
            f"{place} holds files of several kinds: {counts}",
            f"add `kind:` to the source ({' or '.join(sorted(known))}), or narrow it with a glob",
            key,
        )
    [(only, files)] = known.items()
    return Located(only, root, _in_order(root, files))


def _missing(path: Path, key: str) -> UserError:
    folder = path.parent
    names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        fix = f"did you mean `{folder / near[0]}`?"
    elif not folder.is_dir():
        fix = f"there is no folder {folder} either: check the path"
    else:
        fix = "check the path; a dataset on the Hugging Face hub needs `kind: dataset`"
    return _refusal(f"there is no file or folder {path}", fix, key)


def _refusal(what: str, fix: str, key: str) -> UserError:
    return UserError(Mistake(what, fix, key=key))


def _is_hub_id(path: str) -> bool:
    return bool(_HUB_ID.fullmatch(path)) and bare_ending(Path(path)) not in KIND_OF


def _is_saved_dataset(folder: Path) -> bool:
    one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


def _is_read_me(file: Path) -> bool:
    return file.name.lower().startswith(("readme", "license", "changelog"))


def _files_below(folder: Path, left_out: Set[str] = frozenset()) -> Iterator[Path]:
    """All files at any depth, but for hidden ones and folders named in `left_out`."""
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        yield from (Path(where, name) for name in names if not name.startswith("."))


def _in_order(root: Path, files: list[Path] | Iterator[Path]) -> tuple[Path, ...]:
    return tuple(sorted(files, key=lambda file: file.relative_to(root).as_posix()))


def _before_glob(parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts[:-1]:
        if _GLOB.search(part):
            return
        yield part
