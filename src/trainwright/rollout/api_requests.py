"""What may be asked of the server: OpenAI's requests, checked, and the errors they are told in.

Nothing is ignored in silence: a field that asks for what there is not is refused by its name.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainwright.rollout.sampling import SamplingParams

MOST_CHOICES = 128
COMPLETION_TOKENS = 16  # OpenAI's default for plain completions; chats go on to the context's end

# Labels for OpenAI's own bookkeeping: they change no answer there either.
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")
# Fields of OpenAI's that are not offered, with the values that ask for nothing.
NOT_OFFERED: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "store": (False,),
    "audio": (),
    "functions": ([],),
    "function_call": ("none",),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}


class ApiError(Exception):
    """An error in OpenAI's shape, with its HTTP status."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """`include_usage`: a last event that counts the tokens."""

    include_usage: bool = False


class GenerationRequest(_Strict):
    """What both endpoints share. `top_k` and `min_p` are not OpenAI's; null is a default."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = (
        None
    )
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def room(self) -> int | None:
        """The most tokens to generate, None for as many as the context has room for."""
        return self.max_tokens

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, room: int) -> SamplingParams:
        """How to continue, with at most `room` tokens; a seed of its own where none is asked."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_new_tokens=room,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            stop=tuple(stop),
            seed=secrets.randbits(32) if self.seed is None else self.seed,
        )

    @model_validator(mode="before")
    @classmethod
    def _offered(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise ApiError("the request is not a JSON object")
        values = {key: value for key, value in values.items() if key not in LABELS}
        for name, nothing in NOT_OFFERED.items():
            value = values.pop(name, None)
            # False is no 0 here: `logprobs: 0` asks for those of the tokens themselves.
            if value is not None and (type(value), value) not in [(type(v), v) for v in nothing]:
                code = "unsupported_parameter"
                raise ApiError(f"{name!r} is not offered here: leave it out", param=name, code=code)
        return values


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions. `chat_template_kwargs` are the chat template's own variables."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def room(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. A prompt is a text or token ids, or a list of such."""

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], Field(min_length=1)]

    @property
    def room(self) -> int | None:
        return self.max_tokens or COMPLETION_TOKENS

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


Request = TypeVar("Request", bound=GenerationRequest)


def read_request(kind: type[Request], body: bytes) -> Request:
    """The request in a body; ApiError with the first thing that is wrong with it."""
    try:
        request = kind.model_validate(json.loads(body))
    except (ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise ApiError(f"the request is no JSON: {error}") from error
        found = error.errors(include_url=False)
        name = str(found[0]["loc"][0])
        if found[0]["type"] == "extra_forbidden":
            name = ".".join(map(str, found[0]["loc"]))
            message = f"there is no parameter {name!r}"
            raise ApiError(message, param=name, code="unknown_parameter") from error
        # What may be of several kinds has been tried as each.
        told = dict.fromkeys(each["msg"] for each in found if each["loc"][0] == name)
        raise ApiError(f"{name!r}: {'; or: '.join(told)}", param=name) from error
    if request.stream_options is not None and not request.stream:
        raise ApiError("'stream_options' is for streams: set 'stream'", param="stream_options")
    return request
