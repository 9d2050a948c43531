"""EleutherAI's lm-eval with our models: log-likelihoods packed into rows, generation by our engine.

Importing this needs the extra `harness`; lm-eval then knows the model `trainwright` by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn

from trainwright.data.batches import IGNORED
from trainwright.errors import UserError
from trainwright.models.output_head import OutputHead
from trainwright.objectives.objective import Tensors, call
from trainwright.rollout.engine import generate
from trainwright.rollout.sampling import SamplingParams
from trainwright.training.continuations import score_continuations
from trainwright.training.harness_tasks import HarnessTasks
from trainwright.training.score import Subject, open_subject
from trainwright.training.tasks import context_length, open_renderer, stop_at_turn_end

_CONTEXT = 2048  # of a model that names none
_TOKENS = 2048  # whose logits are held at once
_ADVICE = "change the task's `generation_kwargs`"

# What of a task's `generation_kwargs` sampling reads, and what says nothing to it.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_SILENT = ("do_sample", "until", "max_gen_toks", "use_cache")


@register_model("trainwright")
class HarnessModel(TemplateLM):
    """A model of ours as lm-eval calls it; tokens and windows are those of its own `hf` models."""

    def __init__(
        self, subject: Subject | None = None, pretrained: str = "", batch_size: int | str = 8
    ) -> None:
        super().__init__()
        self.subject = subject or open_subject(pretrained)
        if not self.subject.writes:
            fix = "see how it ranks pairs with `trainwright evaluate --data`"
            raise UserError(f"{self.subject.name} is a reward model: it writes no text", fix)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8
        self.tokenizer: Any = self.subject.load_tokenizer()
        stop_at_turn_end(self.subject.spread, open_renderer(self.subject.directory))
        self._device = self.subject.spread.mesh.world.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text which nothing else precedes: BOS, or else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Tokens of context."""
        return context_length(self.subject.spread) or _CONTEXT

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of cached requests."""
        return str(self.subject.directory).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens as the tokenizer makes them, without a second BOS before one that is written."""
        options = {}
        begun = string.startswith(self.tokenizer.decode(self.prefix_token_id))
        if add_special_tokens is not None or begun:
            options["add_special_tokens"] = bool(add_special_tokens)
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        sequences = []
        for _, context, continuation in requests:
            # One more than the context holds: the last token is predicted, and not read.
            ids = (context + continuation)[-(self.max_length + 1) :]
            sequences.append((ids, len(ids) - len(continuation)))
        scores = score_continuations(
            self.subject.spread, sequences, micro_batch=self.batch_size, score=greedy_scores
        )
        results = [(log_prob, bool(greedy)) for log_prob, greedy in scores]
        for (texts, *_), result in zip(requests, results, strict=True):
            if texts is not None:  # None in rolling windows, which are kept as a whole
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context's length."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += found
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows) if windows else [])
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts after contexts, up to the stop strings of each."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        results = [""] * len(requests)
        for numbers in groups.values():
            texts = [requests[number].args[0] for number in numbers]
            found = self._generate(texts, requests[numbers[0]].args[1])
            for number, text in zip(numbers, found, strict=True):
                results[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return results

    def _generate(self, contexts: Sequence[str], options: dict[str, Any]) -> list[str]:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        most, until = wanted["max_gen_toks"], wanted.get("until") or []
        unknown = [key for key in wanted if key not in (*_SAMPLING, *_SILENT)]
        if unknown:
            what = f"a task asks for {', '.join(unknown)}, which generation here does not know"
            raise UserError(what, _ADVICE)
        room = self.max_length - most
        if room < 1:
            what = f"a task asks for {most:,} new tokens, and the context has {self.max_length:,}"
            raise UserError(what, _ADVICE)
        sampling = {key: wanted[key] for key in _SAMPLING if wanted.get(key) is not None}
        if not wanted["do_sample"]:
            sampling["temperature"] = 0.0
        params = SamplingParams(most, stop=tuple(stop for stop in until if stop), **sampling)
        completions = generate(
            self.subject.spread.model,
            self.tokenizer,
            [self.tok_encode(context)[-room:] for context in contexts],
            params,
            device=self._device,
        )
        return [postprocess_generated_text(each.text, until, None) for each in completions]


def run_harness(
    subject: Subject,
    tasks: HarnessTasks,
    *,
    few_shot: int | None = None,
    rows: int | None = None,
    batch: int = 8,
    chat: bool = False,
) -> dict[str, dict[str, Any]]:
    """Every task's scores as lm-eval computes them, with their standard errors and row counts.

    `few_shot` examples (default: the task's own number) and at most `rows` rows of each task; with
    `chat` in the model's chat template. Raises UserError for tasks whose data cannot be had.
    """
    model = HarnessModel(subject, batch_size=batch)
    if chat and not model.tokenizer.chat_template:
        raise UserError(f"the tokenizer of {subject.name} has no chat template", "leave out --chat")
    with tasks.guarded():
        found = simple_evaluate(
            model,
            tasks=list(tasks.names),
            task_manager=tasks.manager,
            num_fewshot=few_shot,
            limit=rows,
            apply_chat_template=chat,
            log_samples=False,
            confirm_run_unsafe_code=tasks.trusted,
        )
    assert found is not None  # as on every process but the first of several
    counts = found["n-samples"]
    return {
        name: {"rows": counts.get(name, {}).get("effective", 0), **dict(_scores(record))}
        for name, record in found["results"].items()
    }


def _scores(record: dict[str, Any]) -> Iterable[tuple[str, float | None]]:
    """`acc`, `acc_stderr`, …; `exact_match,FILTER` where a task has more than the one filter."""
    for key, value in record.items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label = name if filtered == "none" else key
        error = record.get(f"{name}_stderr,{filtered}")
        yield label, float(value)
        yield f"{label}_stderr", float(error) if isinstance(error, int | float) else None


def greedy_scores(model: nn.Module, batch: Tensors) -> Tensor:
    """Σ log p of each sequence, and whether all its tokens are the likeliest (1 or 0).

    [rows, segments, 2]; for a model that is whole in this process.
    """
    labels, segments, number = batch["labels"], batch["own_segments"], int(batch["segments"])
    trained = labels != IGNORED

    def scored(hidden: Tensor, head: OutputHead) -> Tensor:
        parts = zip(hidden[trained].split(_TOKENS), labels[trained].split(_TOKENS), strict=True)
        log_probs, missed = [], []
        for states, wanted in parts:
            logits = head.logits(states)
            chosen = logits.gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
            log_probs.append(chosen - logits.logsumexp(-1))
            missed.append(logits.argmax(-1) != wanted)
        rows = torch.arange(len(labels), device=labels.device).unsqueeze(1).expand_as(labels)
        places = rows[trained], segments[trained].long()
        found = torch.zeros(2, len(labels), number, dtype=torch.float64, device=labels.device)
        for row, values in enumerate((log_probs, missed)):
            found[row].index_put_(places, torch.cat(values).double(), accumulate=True)
        return torch.stack([found[0], (found[1] == 0).double()], -1)

    result: Tensor = call(model, batch, scored)
    return result
