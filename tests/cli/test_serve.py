"""`serve` in a process of its own, spoken to by OpenAI's client, beside transformers and PEFT."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests.conftest import REPOSITORY
from tests.models.adapter_cases import adapted, move
from trainwright.cli.main import main
from trainwright.data.templates_named import NAMED_TEMPLATES
from trainwright.data.tokenizers import byte_tokenizer, load_tokenizer
from trainwright.models.adapter_files import load_adapter, save_adapter
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.models.weights import initialise, load_model, new_model, save_model
from trainwright.rollout.engine import generate
from trainwright.rollout.sampling import SamplingParams
from trainwright.rollout.scheduler import MOST_ROWS

# Long enough for answers that nobody waits to the end of.
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1_000_000,
    "initializer_range": 0.2,
    "eos_token_id": 257,
}
# What a chat template makes of tools, of calls, and of a variable of its own.
TOOLS = """\
{%- for tool in tools or [] -%}[{{ tool.function.name }}]{%- endfor -%}{{- mood -}}
{%- for message in messages if message.tool_calls -%}
{{- message.tool_calls[0].function.arguments.word -}}
{%- endfor -%}
"""
PROMPTS = ["Hello, world", "a", "Once upon a time", "the quick brown fox"]
TURNS: list[Any] = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
]
LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small chat model over bytes, `base`; adapters of it, `rhyme` and `dora`; one of another."""
    folder = tmp_path_factory.mktemp("served")
    for name, options in (
        ("rhyme", {"rank": 4}),
        ("dora", {"rank": 2, "dora": True, "targets": ("q_proj", "down_proj")}),
        ("other", {"rank": 4, "targets": ("o_proj",)}),
    ):
        shape = SHAPE if name != "other" else {**SHAPE, "hidden_size": 48}
        model = new_model(decoder_config(new_hf_config("llama", shape, 260)))
        initialise(model, 1)
        with torch.no_grad():
            model.lm_head.weight[128:] = 0.0  # greedy answers are ASCII, and have no end
        if name == "rhyme":
            save_model(model, folder / "base")
        adapted(model, learnt=False, **options)
        move(model, len(name))
        save_adapter(model, folder / name)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOLS + NAMED_TEMPLATES["plain"]
    tokenizer.save_pretrained(str(folder / "base"))
    return folder


class Server:
    """A `trainwright serve`, ready when it has printed where it is."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "trainwright.cli.main", "serve", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r"http://127.0.0.1:(\d+)/v1", self.line)
        assert found, self.line + self.process.communicate()[1]
        self.url, self.port = found[0], int(found[1])

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def stop(self) -> tuple[int, str]:
        """End it as Ctrl-C does; its exit code and what it said beside."""
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Server]:
    adapters = [f"--adapter=rhyme={folder / 'rhyme'}", f"--adapter=my-dora={folder / 'dora'}"]
    server = Server(folder / "base", *adapters)
    yield server
    assert server.stop() == (0, "")


@pytest.fixture
def client(server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def expected(folder: Path, adapters: list[str], prompt: str | list[int]) -> str:
    """The greedy continuation that transformers and PEFT give, which `generate` gives too."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder / "base")
    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    ours = load_model(folder / "base")
    for name in adapters:
        load_adapter(ours, folder / name, name=name)
        if isinstance(theirs, PeftModel):
            theirs.load_adapter(str(folder / name), name)
        else:
            theirs = PeftModel.from_pretrained(theirs, str(folder / name), name)
    if adapters:
        theirs.base_model.set_adapter(adapters)
    ending = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 258}
    output = theirs.eval().generate(input_ids=torch.tensor([ids]), **ending)
    text = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    params = SamplingParams(max_new_tokens=LENGTH, temperature=0)
    (completion,) = generate(ours, tokenizer, [ids], params)
    assert completion.text == text and len(text) == LENGTH
    return text


# How the templates `plain` writes TURNS before an answer.
CHAT = [256, *b"User:\nWhat is it?\nAssistant:\nA cat.", 257, *b"\nUser:\nAnd now?\nAssistant:\n"]
SERVED = {"base": [], "rhyme": ["rhyme"], "my-dora": ["dora"], "rhyme+my-dora": ["rhyme", "dora"]}


@pytest.mark.parametrize("model", SERVED)
def test_greedy_answers_are_transformers_with_every_adapter(client, folder, model):
    text = expected(folder, SERVED[model], PROMPTS[0])
    made = client.completions.create(
        model=model, prompt=PROMPTS[0], max_tokens=LENGTH, temperature=0
    )
    assert (made.choices[0].text, made.choices[0].finish_reason) == (text, "length")
    assert made.usage is not None
    usage = (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens)
    assert usage == (13, LENGTH, 13 + LENGTH)

    text = expected(folder, SERVED[model], CHAT)
    answer = client.chat.completions.create(
        model=model, messages=TURNS, max_completion_tokens=LENGTH, temperature=0
    )
    message = answer.choices[0].message
    assert (message.role, message.content, answer.model) == ("assistant", text, model)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(CHAT)


def test_the_models_are_listed(client, server):
    assert [model.id for model in client.models.list()] == ["base", "rhyme", "my-dora"]
    assert client.models.retrieve("rhyme").id == "rhyme"
    assert server.line.startswith("base, rhyme, my-dora at http")
    with plain(server) as connection:
        connection.request("GET", "/health")
        assert json.load(connection.getresponse()) == {"status": "ok"}


def plain(server: Server) -> Any:
    """A connection without OpenAI's client, closed at the end of a `with`."""
    return closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60))


def test_streams_join_to_the_whole_answers(client):
    greedy: dict[str, Any] = {"model": "rhyme", "max_tokens": LENGTH, "temperature": 0}
    whole = client.chat.completions.create(messages=TURNS, **greedy)
    events = list(
        client.chat.completions.create(
            messages=TURNS, stream=True, stream_options={"include_usage": True}, **greedy
        )
    )
    deltas = [event.choices[0].delta for event in events[:-1]]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert len(deltas) == LENGTH + 2  # the role, a token each, the end
    assert events[-2].choices[0].finish_reason == "length"
    assert events[-1].choices == [] and events[-1].usage == whole.usage
    assert len({event.id for event in events}) == 1

    text = client.completions.create(prompt="Hello", **greedy).choices[0].text
    pieces = list(client.completions.create(prompt="Hello", stream=True, **greedy))
    assert "".join(piece.choices[0].text for piece in pieces) == text
    assert pieces[-1].usage is None


def test_answers_end_before_a_stop_string(client):
    greedy: dict[str, Any] = {"model": "base", "prompt": "Hello", "temperature": 0}
    text = client.completions.create(max_tokens=LENGTH, **greedy).choices[0].text
    stops = [text[6:9]], [text[6:9], "never said", text[8]]
    for stop in stops:
        ends: list[Any] = [stop, stop[0]] if len(stop) == 1 else [stop]
        for each in ends:
            options: dict[str, Any] = {"max_tokens": LENGTH, "stop": each, **greedy}
            (choice,) = client.completions.create(**options).choices
            assert choice.finish_reason == "stop"
            assert choice.text == text[: min(text.find(s) for s in stop if s in text)]
            pieces = client.completions.create(stream=True, **options)
            assert "".join(piece.choices[0].text for piece in pieces) == choice.text
    assert client.completions.create(**greedy).choices[0].text == text[:16]  # OpenAI's default


def test_several_choices_and_prompts(client, folder):
    sampled: dict[str, Any] = {"model": "base", "max_tokens": 12, "seed": 5, "temperature": 0.9}
    made = client.completions.create(prompt=PROMPTS, n=2, **sampled)
    tokenizer = load_tokenizer(folder / "base")
    params = SamplingParams(max_new_tokens=12, seed=5, temperature=0.9)
    twice = [prompt for prompt in PROMPTS for _ in range(2)]
    ours = generate(load_model(folder / "base"), tokenizer, twice, params)
    assert [choice.text for choice in made.choices] == [each.text for each in ours]
    assert [choice.index for choice in made.choices] == list(range(8))
    again = client.completions.create(prompt=[[256, *p.encode()] for p in PROMPTS], n=2, **sampled)
    assert again.choices == made.choices
    other = client.completions.create(prompt=PROMPTS, n=2, **{**sampled, "seed": 6})
    assert other.choices != made.choices
    free = {**sampled, "seed": None, "prompt": "Hello"}
    assert client.completions.create(**free).choices != client.completions.create(**free).choices


def test_requests_that_come_together_get_what_they_get_alone(client):
    def ask(number: int) -> list[str]:
        made = client.completions.create(
            model=list(SERVED)[number % 4],
            prompt=PROMPTS[number % 3] * (1 + number % 2),
            max_tokens=10 + 7 * (number % 5),
            temperature=number % 3 / 2,
            top_p=0.9,
            seed=number,
            extra_body={"top_k": 5 * (number % 2), "min_p": 0.01},
        )
        return [choice.text for choice in made.choices]

    alone = [ask(number) for number in range(40)]
    with ThreadPoolExecutor(40) as threads:
        assert list(threads.map(ask, range(40))) == alone


def test_tools_calls_and_the_templates_own_variables_reach_the_template(client):
    def written(**more: Any) -> int:
        request: dict[str, Any] = {"model": "base", "messages": TURNS, "max_tokens": 1, **more}
        answer: Any = client.chat.completions.create(**request)
        return answer.usage.prompt_tokens - len(CHAT)

    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in "ab"]
    assert written() == 0
    assert written(tools=tools) == written(tools=tools, tool_choice="auto") == len("[a][b]")
    assert written(tools=tools, tool_choice="none") == 0
    assert written(extra_body={"chat_template_kwargs": {"mood": "calm"}}) == len("calm")
    call = {"id": "1", "type": "function", "function": {"name": "a", "arguments": '{"word": "up"}'}}
    called = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns = [TURNS[0], {"role": "assistant", "content": ""}]
    assert written(messages=called) == written(messages=turns) + len("up")


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"messages": [{"role": "nobody", "content": "x"}]}, "nobody", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url", "messages"),
    ({"tools": [{"type": "code"}]}, "tools", "tools"),
    ({"chat_template_kwargs": {"tokenize": False}}, "tokenize", None),
    ({"logprobs": True}, "not offered", "logprobs"),
    ({"n": 129}, "less than or equal to 128", "n"),
]


@pytest.mark.parametrize(("change", "message", "param"), REFUSED)
def test_what_cannot_be_is_refused_by_its_name(client, change, message, param):
    request: dict[str, Any] = {"model": "base", "messages": TURNS, "max_tokens": 4, **change}
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/chat/completions", body=request, cast_to=object)
    error: Any = refused.value.body
    assert message in error["message"] and error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_prompts_that_the_model_cannot_take_are_refused(client):
    for change, message in (
        ({"prompt": [4711]}, "4711"),
        ({"prompt": ["a", "b"], "n": 100}, "128"),
        ({"prompt": "a" * 1_000_000}, "context"),
    ):
        request: dict[str, Any] = {"model": "base", **change}
        with pytest.raises(openai.BadRequestError, match=message):
            client.completions.create(**request)


def test_other_errors_have_openais_shape_too(client, server):
    for model in ("nobody", "base+rhyme", "rhyme+rhyme", "rhyme+"):
        with pytest.raises(openai.NotFoundError, match="served are: base, rhyme, my-dora"):
            client.completions.create(model=model, prompt="x")
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
        client.embeddings.create(model="base", input="x")
    with plain(server) as connection:
        for body in (b"{", b"[]", b"\xff", b"[" * 100_000):
            connection.request("POST", "/v1/completions", body)
            response = connection.getresponse()
            assert response.status == 400
            assert json.load(response)["error"]["type"] == "invalid_request_error"


def test_clients_that_leave_free_their_places(client, server):
    """Answers without end take all places; nobody else would ever get one."""
    endless: dict[str, Any] = {"model": "base", "messages": TURNS, "temperature": 0}
    streams = [client.chat.completions.create(stream=True, **endless) for _ in range(MOST_ROWS)]
    for stream in streams:
        assert next(iter(stream)).choices[0].delta.role == "assistant"
    for stream in streams:
        stream.close()
    for said in [json.dumps(endless).encode()] * MOST_ROWS + [b'{"model":']:
        with plain(server) as connection:
            length = {"Content-Length": str(max(len(said), 20))}
            connection.request("POST", "/v1/chat/completions", said, length)
    made = client.completions.create(model="base", prompt="Hello", max_tokens=8)
    assert made.usage is not None and made.usage.completion_tokens == 8


def test_ctrl_c_ends_what_is_under_way_of_a_model_with_a_key_and_no_template(folder, tmp_path):
    for file in (folder / "base").iterdir():
        if "token" not in file.name and "template" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    byte_tokenizer().save_pretrained(str(tmp_path))
    server = Server(tmp_path, "--api-key", "secret")
    with server.client("guess") as stranger, pytest.raises(openai.AuthenticationError, match="key"):
        stranger.models.list()
    with server.client("secret") as client:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model=tmp_path.name, messages=TURNS)
        stream = client.completions.create(
            model=tmp_path.name, prompt="Hello", max_tokens=900_000, temperature=0, stream=True
        )
        assert next(iter(stream)).choices[0].text
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
    _, said = server.process.communicate(timeout=60)
    assert (server.process.returncode, said) == (0, "")


def test_what_cannot_be_served_is_said_at_the_start(folder, server, monkeypatch, capsys):
    def refused(*arguments: object) -> str:
        command = ["trainwright", "serve", str(folder / "base"), *map(str, arguments)]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit, match="2"):
            main()
        return " ".join(capsys.readouterr().err.split())

    assert "NAME=DIR" in refused("--adapter", "rhyme")
    assert f"port {server.port}" in refused("--port", server.port)
    wrong = [f"--adapter={name}={folder / 'rhyme'}" for name in ("base", "a+b")]
    said = refused("--port", 0, *wrong)
    assert "'base'" in said and "'a+b'" in said
    other = refused("--port", 0, f"--adapter=other={folder / 'other'}")
    assert "adapter_model.safetensors" in other
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "trainwright.rollout.server")
    monkeypatch.delattr("trainwright.rollout.server")
    assert "pip install 'trainwright[serve]'" in refused()


def test_the_python_of_the_page_works(server, folder, tmp_path):
    text = (REPOSITORY / "docs" / "serving.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for before, after in (
        ("http://127.0.0.1:8000/v1", server.url),
        ('"french"', '"rhyme"'),
    ):
        assert before in block
        block = block.replace(before, after)
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
