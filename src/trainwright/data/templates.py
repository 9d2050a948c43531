"""Chat templates: the tokenizer's own, one from a file, or one by name; and the text they give.

Jinja templates come from strangers: they run in transformers' immutable sandbox, over plain data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainwright.data.examples import Message, RowRefusedError
from trainwright.data.readers import decode_text, reading
from trainwright.data.templates_named import NAMED_TEMPLATES
from trainwright.errors import Mistake, UserError

Span = tuple[int, int]  # characters [begin, end) of a rendered text

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Templates that write today's date would give other tokens tomorrow. They get one fixed day
# instead, the one that Llama's templates name themselves where they cannot ask for the date.
_DATE_CALL = re.compile(r"strftime_now\(\s*(?:format\s*=\s*)?(['\"])(.*?)\1\s*\)")
_DATES = {
    "%d": "26",
    "%-d": "26",
    "%m": "07",
    "%b": "Jul",
    "%B": "July",
    "%Y": "2024",
    "%y": "24",
    "%A": "Friday",
    "%a": "Fri",
    "%H": "00",
    "%M": "00",
    "%S": "00",
}
_OWN = ("train",)  # keys of a message that are ours, not the template's


@dataclass(frozen=True)
class ChatTemplate:
    """How turns become text.

    `name` is "tokenizer", the template's name, or its file. `tokens` are the special tokens that
    the source may write (`bos_token`, …). `tool_source` takes the place of `source` where a
    conversation has tools, for tokenizers with two templates.
    """

    source: str
    name: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    tool_source: str | None = None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation, the same on every day.

        `add_generation_prompt` adds what comes before an answer of the assistant. `variables` are
        the template's own (such as `enable_thinking`). Raises RowRefusedError where the template
        refuses the conversation or fails.
        """
        return self._render(messages, tools, add_generation_prompt, variables, spans=False)[0]

    def render_marked(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[str, list[Span]]:
        """The text, and what of it the template marks by `{% generation %}` as the assistant's."""
        text, spans = self._render(messages, tools, False, {}, spans=True)
        return text, [(begin, end) for begin, end in spans if begin < end]

    def marks_answers(self, tools: Sequence[Mapping[str, Any]] = ()) -> bool:
        """Whether the template itself says which text is the assistant's."""
        return bool(_GENERATION.search(self._source_for(tools)))

    def check(self) -> None:
        """UserError if the template is no valid Jinja. (What it needs of a row, only rows show.)"""
        from jinja2 import TemplateSyntaxError

        try:
            self._render([{"role": "user", "content": "?"}], (), False, {}, spans=False)
        except RowRefusedError as error:
            cause = error.__cause__
            if isinstance(cause, TemplateSyntaxError):
                what = f"the chat template is no valid Jinja: {cause.message} (line {cause.lineno})"
                fix = "mend it, or name another with `tokenizer.chat_template`"
                raise UserError(Mistake(what, fix, where=self.name)) from error

    def _source_for(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return self.tool_source if tools and self.tool_source is not None else self.source

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        prompt: bool,
        variables: Mapping[str, Any],
        *,
        spans: bool,
    ) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        shown = [{k: v for k, v in message.items() if k not in _OWN} for message in messages]
        try:
            render: Any = render_jinja_template  # which is said to give less than it does
            texts, marked = render(
                conversations=[shown],
                tools=list(tools) or None,
                chat_template=_with_fixed_date(self._source_for(tools)),
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=spans,
                **{**self.tokens, **variables},
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise RowRefusedError(
                f"the chat template `{self.name}` refuses the conversation: {reason}",
                "mend the row, or name another template with `tokenizer.chat_template`",
            ) from error
        return texts[0], list(marked[0]) if spans else []


def find_template(reference: str | None, tokenizer: Path) -> ChatTemplate | None:
    """The template that `reference` means, with the special tokens of a tokenizer's directory.

    `reference` is a name (`NAMED_TEMPLATES`), a file that holds the Jinja source, or None for the
    tokenizer's own: then the result is None where it has none. Raises UserError for anything else,
    and for a template that is no valid Jinja.
    """
    if reference is None:
        template = _tokenizer_template(tokenizer)
    elif reference in NAMED_TEMPLATES:
        template = ChatTemplate(NAMED_TEMPLATES[reference], reference)
    else:
        path = Path(reference).expanduser()
        if not path.is_file():
            names = ", ".join(f"`{name}`" for name in NAMED_TEMPLATES)
            what = f"there is no chat template {reference}: no file, and not one of {names}"
            raise UserError(Mistake(what, "name one of these, or a file with the Jinja source"))
        with reading(path):
            source = decode_text(path.read_bytes(), path)
        template = ChatTemplate(source, str(reference))
    if template is None:
        return None
    template = replace(template, tokens=special_tokens(tokenizer))
    template.check()
    return template


def special_tokens(tokenizer: Path) -> dict[str, str]:
    """The special tokens of a tokenizer's directory by their names ("bos_token": "<s>")."""
    tokens = {}
    for key, value in _config(tokenizer).items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            tokens[key] = content
    return tokens


def _tokenizer_template(tokenizer: Path) -> ChatTemplate | None:
    """The template saved with a tokenizer: in a file of its own, or in its configuration."""
    given = _config(tokenizer).get("chat_template")
    by_name: dict[str, str] = {}
    if isinstance(given, str):
        by_name["default"] = given
    elif isinstance(given, list):
        by_name = {entry["name"]: entry["template"] for entry in given}
    more = tokenizer / "additional_chat_templates"
    files = {file.stem: file for file in more.glob("*.jinja")} if more.is_dir() else {}
    if (tokenizer / "chat_template.jinja").is_file():
        files["default"] = tokenizer / "chat_template.jinja"
    by_name |= {name: decode_text(file.read_bytes(), file) for name, file in files.items()}
    if "default" not in by_name:
        return None
    return ChatTemplate(by_name["default"], "tokenizer", tool_source=by_name.get("tool_use"))


def _config(tokenizer: Path) -> dict[str, Any]:
    file = tokenizer / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return config


@lru_cache
def _with_fixed_date(source: str) -> str:
    """`source` with `strftime_now` answering for one fixed day."""
    formats = {match[2] for match in _DATE_CALL.finditer(source)}
    if not formats:
        return source
    dates = {
        form: re.sub(r"%-?[a-zA-Z]", lambda code: _DATES.get(code[0], ""), form) for form in formats
    }
    # A macro hides the function of the same name. After the empty expression, unlike after the
    # macro's end, Jinja keeps a line end with which the source may begin.
    table = json.dumps(dates, ensure_ascii=False)
    macro = "{% macro strftime_now(format) %}{{ " + table + "[format] }}{% endmacro %}{{ '' }}"
    return macro + source
