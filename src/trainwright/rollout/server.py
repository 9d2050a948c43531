"""The OpenAI chat and completions API over one model and its adapters, for a look at the result.

The way of a request: JSON → `api_requests` → rows → `scheduler`, whose thread generates → pieces →
`api_answers`. All that stands here runs in one event loop.
"""

from __future__ import annotations

import asyncio
import copy
import hmac
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from trainwright.data.examples import RowRefusedError
from trainwright.data.formats_chat import messages_of, tools_of
from trainwright.errors import UserError
from trainwright.models.decoder import Decoder
from trainwright.rollout.api_answers import DONE, Answer, Choice, event
from trainwright.rollout.api_requests import (
    MOST_CHOICES,
    ApiError,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    read_request,
)
from trainwright.rollout.engine import Row, encode
from trainwright.rollout.prompts import chat_prompt
from trainwright.rollout.scheduler import ClosedError, Progress, Scheduler, Ticket

UNBOUNDED_ROOM = 4096  # tokens of an answer where neither the request nor the model has a limit
_PATIENCE = 3  # seconds that Ctrl-C gives to requests which are still coming in
STACK = "+"  # between the names of adapters that are used together

Value = TypeVar("Value")
Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class ServedModel:
    """A model and the names under which it is served, each with the adapters that it stands for.

    The base model's name stands for no adapters.
    """

    model: Any
    tokenizer: Any
    names: Mapping[str, tuple[str, ...]]

    @property
    def context(self) -> int | None:
        """The most tokens that a prompt and its answer may have between them."""
        if isinstance(self.model, Decoder):
            return self.model.config.max_positions
        limit: int | None = self.model.max_positions
        return limit

    def adapters(self, name: str) -> tuple[str, ...]:
        """The adapters that a request's `model` means; ApiError for one that is not served."""
        if name in self.names:
            return self.names[name]
        parts = [self.names.get(part, ()) for part in name.split(STACK)]
        stacked = tuple(adapter for part in parts for adapter in part)
        if not all(parts) or len(set(stacked)) < len(parts):
            served = ", ".join(self.names)
            message = f"there is no model {name!r}; served are: {served}"
            raise ApiError(message, status=404, param="model", code="model_not_found")
        return stacked


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; port 0 chooses a free one. UserError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        fix = "choose another with --port, or 0 for one that is free; and see --host"
        raise UserError(f"cannot listen on {host}, port {port}: {error}", fix) from error


def serve(served: ServedModel, door: socket.socket, *, api_key: str | None = None) -> None:
    """Answer requests that come in at `door`, until Ctrl-C or SIGTERM."""
    scheduler = Scheduler(served.model)
    config = uvicorn.Config(
        make_app(served, scheduler, api_key=api_key),
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=_PATIENCE,
    )
    try:
        _Server(config, scheduler).run(sockets=[door])
    except KeyboardInterrupt:  # which is how it is meant to end
        pass
    finally:
        scheduler.close()
        scheduler.join()


class _Server(uvicorn.Server):
    """Ends what is under way when it is told to stop: a long answer would hold it up."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler) -> None:
        super().__init__(config)
        self.scheduler = scheduler

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.scheduler.close()
        super().handle_exit(sig, frame)


def make_app(served: ServedModel, scheduler: Scheduler, *, api_key: str | None = None) -> Starlette:
    """The application; with an `api_key` only requests that bear it are answered."""
    api = _Api(served, scheduler)

    def route(path: str, endpoint: Endpoint, method: str) -> Route:
        async def guarded(request: Request) -> Response:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if api_key and not hmac.compare_digest(given.encode(), api_key.encode()):
                raise ApiError("the API key is wrong", status=401, code="invalid_api_key")
            return await endpoint(request)

        return Route(path, guarded, methods=[method])

    return Starlette(
        routes=[
            Route("/health", _health, methods=["GET"]),
            route("/v1/models", api.models, "GET"),
            route("/v1/models/{name:path}", api.model, "GET"),
            route("/v1/chat/completions", api.chat, "POST"),
            route("/v1/completions", api.complete, "POST"),
        ],
        exception_handlers={
            ApiError: _told,
            HTTPException: _told,
            UserError: _told,
            ClientDisconnect: _told,
            Exception: _told,
        },
    )


async def _health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _told(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail}"
        error = ApiError(message, status=error.status_code)
    error = _as_api_error(error)
    return JSONResponse(error.body, error.status)


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        told = (f"{m.what} ({m.fix})" if m.fix else m.what for m in error.mistakes)
        return ApiError("; ".join(told))
    if isinstance(error, ClosedError):
        return ApiError(str(error), status=503)
    if isinstance(error, ClientDisconnect):
        return ApiError("the client is gone", status=499)  # as nginx calls it; nobody reads it
    return ApiError(f"{type(error).__name__}: {error}", status=500)


class _Api:
    """The endpoints."""

    def __init__(self, served: ServedModel, scheduler: Scheduler) -> None:
        self.served, self.scheduler = served, scheduler
        # Encoding can change settings of a tokenizer while the scheduler's thread decodes with it.
        self.encoder = copy.deepcopy(served.tokenizer)

    async def models(self, request: Request) -> Response:
        listed = [_model(name) for name in self.served.names]
        return JSONResponse({"object": "list", "data": listed})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.served.adapters(name)
        return JSONResponse(_model(name))

    async def chat(self, request: Request) -> Response:
        asked = read_request(ChatRequest, await request.body())
        adapters = self.served.adapters(asked.model)
        messages = _understood("messages", lambda: messages_of(asked.messages, "message"))
        shown = None if asked.tool_choice == "none" else asked.tools
        tools = _understood("tools", lambda: tools_of(shown))
        ids = chat_prompt(self.encoder, messages, tools, asked.chat_template_kwargs)
        return await self._answer(request, asked, [ids], adapters, chat=True)

    async def complete(self, request: Request) -> Response:
        asked = read_request(CompletionRequest, await request.body())
        adapters = self.served.adapters(asked.model)
        prompts = [encode(self.encoder, prompt) for prompt in asked.prompts]
        return await self._answer(request, asked, prompts, adapters, chat=False)

    async def _answer(
        self,
        request: Request,
        asked: GenerationRequest,
        prompts: list[list[int]],
        adapters: tuple[str, ...],
        *,
        chat: bool,
    ) -> Response:
        rows = self._rows(asked, prompts)
        answer = Answer(chat, asked.model, sum(map(len, prompts)))
        work = _Work(self.scheduler, rows, adapters)
        if asked.stream:
            events = _events(answer, work, usage=asked.includes_usage)
            return _EventStream(events, work)
        try:
            return JSONResponse(answer.whole(await work.finish(request)))
        finally:
            work.cancel()

    def _rows(self, asked: GenerationRequest, prompts: list[list[int]]) -> list[Row]:
        """A row for each choice: `n` for the first prompt, then those for the second, and on."""
        rows: list[Row] = []
        if len(prompts) * (asked.n or 1) > MOST_CHOICES:
            raise ApiError(f"more than {MOST_CHOICES} choices at once", param="n")
        for prompt in prompts:
            self._check(prompt)
            context = self.served.context
            left = UNBOUNDED_ROOM if context is None else context - len(prompt)
            params = asked.sampling(min(asked.room or left, left))
            for _ in range(asked.n or 1):
                rows.append(
                    Row(self.served.model, self.served.tokenizer, prompt, params, len(rows))
                )
        return rows

    def _check(self, prompt: list[int]) -> None:
        """ApiError for a prompt that the model cannot read, or that leaves no room."""
        vocabulary, context = self.served.model.vocab_size, self.served.context
        wrong = next((token for token in prompt if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise ApiError(f"token {wrong} is not among the model's {vocabulary}", param="prompt")
        if context is not None and len(prompt) >= context:
            message = f"the prompt has {len(prompt)} tokens, the model's context only {context}"
            raise ApiError(message, code="context_length_exceeded")


class _Work:
    """The rows of one request in the scheduler's hands, seen from the event loop."""

    def __init__(self, scheduler: Scheduler, rows: list[Row], adapters: tuple[str, ...]) -> None:
        loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[int, Progress | Exception]] = asyncio.Queue()
        self.choices = [Choice(index) for index in range(len(rows))]

        def deliver(index: int, news: Progress | Exception) -> None:
            with suppress(RuntimeError):  # the loop is gone: nobody waits any more
                loop.call_soon_threadsafe(self.queue.put_nowait, (index, news))

        self.tickets = [
            Ticket(row, adapters, partial(deliver, index)) for index, row in enumerate(rows)
        ]
        for ticket in self.tickets:
            scheduler.submit(ticket)

    async def pieces(self) -> AsyncIterator[tuple[Choice, str]]:
        """Each choice's next text, as it comes, until all are finished; raises what went wrong."""
        while any(choice.reason is None for choice in self.choices):
            index, news = await self.queue.get()
            if isinstance(news, Exception):
                raise news
            choice = self.choices[index]
            choice.text += news.text
            choice.tokens, choice.reason = news.tokens, news.reason
            yield choice, news.text

    async def finish(self, request: Request) -> list[Choice]:
        """All choices, whole; raises what went wrong, also where nobody waits any more."""

        async def read() -> None:
            async for _ in self.pieces():
                pass

        async def left() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.create_task(read()), asyncio.create_task(left())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        if tasks[0] not in done:
            raise ClientDisconnect
        await tasks[0]
        return self.choices

    def cancel(self) -> None:
        """Free the places of all rows that are not finished."""
        for ticket in self.tickets:
            ticket.cancelled = True


async def _events(answer: Answer, work: _Work, *, usage: bool) -> AsyncIterator[bytes]:
    try:
        if answer.chat:
            for choice in work.choices:
                yield event(answer.piece(choice.index, "", role=True))
        async for choice, text in work.pieces():
            if text:
                yield event(answer.piece(choice.index, text))
            if choice.reason is not None:
                yield event(answer.piece(choice.index, "", choice.reason))
        if usage:
            yield event(answer.counted(work.choices))
    except Exception as error:  # the status has been sent: what is left is an event
        told = _as_api_error(error)
        if told.status == 500:
            logging.getLogger("uvicorn.error").exception("a stream broke off")
        yield event(told.body)
        return
    yield DONE


class _EventStream(StreamingResponse):
    """Server-sent events that give up their work when the client does."""

    def __init__(self, events: AsyncIterator[bytes], work: _Work) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.work = work

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.work.cancel()


def _understood(param: str, read: Callable[[], Value]) -> Value:
    try:
        return read()
    except RowRefusedError as error:
        raise ApiError(error.what, param=param) from error


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "trainwright"}
