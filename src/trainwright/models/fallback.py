"""Models of a `model_type` that Trainwright has no family for: transformers' own class inside.

It is called like a `Decoder` and keeps transformers' parameter names. What the inner class cannot
do (keep packed documents apart, lend its output head) is found out by trying, and refused.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.errors import Mistake, UserError
from trainwright.models.output_head import HeadFunction, OutputHead
from trainwright.models.safetensors_files import weight_files
from trainwright.models.whole_copies import head_weight


class FallbackCache:
    """What a generation has seen: transformers' own cache, or the tokens where it has none."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.tokens: Tensor | None = None


class FallbackModel(nn.Module):
    """A transformers causal language model behind `Decoder`'s interface.

    Like the decoder it is trained without dropout: the inner model stays in evaluation mode.
    """

    # Generation gives it rows of one length: not every class can be padded on the left.
    pads_left = False
    refill_lengths: frozenset[int] = frozenset()

    def __init__(self, inner: Any) -> None:
        super().__init__()
        # The inner model's parts become ours, so that parameters keep their names; the inner
        # model itself must not be registered beside them.
        self._inner = [inner.eval()]
        for name, child in inner.named_children():
            self.add_module(name, child)
        for name, parameter in inner.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.hf: dict[str, Any] = inner.config.to_dict()
        self.stop_token_ids: tuple[int, ...] = ()
        self.max_positions: int | None = self.hf.get("n_positions") or self.hf.get(
            "max_position_embeddings"
        )
        self.vocab_size: int = inner.get_output_embeddings().weight.shape[0]
        parameters = inspect.signature(inner.forward).parameters
        self._caches = "past_key_values" in parameters
        self._keeps_last = "logits_to_keep" in parameters
        self._takes_positions = "position_ids" in parameters
        self._tried: dict[str, bool] = {}

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers, as transformers names those that must not be split."""
        classes = self._inner[0]._no_split_modules or ()
        found: dict[str, nn.Module] = {}
        for name, module in self.named_modules():
            inside = any(name.startswith(f"{block}.") for block in found)
            if type(module).__name__ in classes and not inside:
                found[name] = module
        return list(found.values())

    def train(self, mode: bool = True) -> FallbackModel:
        """Notes the mode, and leaves the inner model without dropout."""
        self.training = mode
        return self

    def new_cache(self, capacity: int = 256) -> FallbackCache:
        """An empty cache; it grows as it must."""
        from transformers import DynamicCache

        return FallbackCache(DynamicCache(config=self._inner[0].config) if self._caches else None)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: FallbackCache | None = None,
        head: HeadFunction | None = None,
    ) -> Any:
        """As `Decoder.forward`; with a cache, the logits of each row's last token only.

        Raises UserError where the inner class cannot do what is asked.
        """
        options: dict[str, Any] = {"use_cache": False} if self._caches else {}
        if cache is not None:
            if segment_ids is not None or position_ids is not None:
                raise ValueError("a fallback model generates unpadded rows, counting by itself")
            return self._generate(input_ids, cache)
        if segment_ids is not None and not _one_document_a_row(segment_ids):
            self._require("packing", self._keeps_apart, segment_ids.device)
            options["position_ids"] = _restarting_positions(segment_ids)
        elif position_ids is not None and self._takes_positions:
            options["position_ids"] = position_ids
        if head is None:
            return self._inner[0](input_ids, **options).logits.float()
        self._require("head", self._head_is_linear, input_ids.device)
        return head(self._hidden(input_ids, options), self._output_head())

    def _generate(self, input_ids: Tensor, cache: FallbackCache) -> Tensor:
        """Logits [batch, 1, vocabulary] after the newest tokens, which follow the cache's."""
        options: dict[str, Any] = {"logits_to_keep": 1} if self._keeps_last else {}
        if self._caches:
            output = self._inner[0](
                input_ids, past_key_values=cache.inner, use_cache=True, **options
            )
            cache.inner = output.past_key_values
        else:
            seen = [] if cache.tokens is None else [cache.tokens]
            cache.tokens = torch.cat([*seen, input_ids], dim=1)
            output = self._inner[0](cache.tokens, **options)
        return output.logits[:, -1:].float()

    def _hidden(self, input_ids: Tensor, options: dict[str, Any]) -> Tensor:
        return self._inner[0].base_model(input_ids, **options)[0]

    def _output_head(self) -> OutputHead:
        """The head that the config describes, by the keys that transformers' models use."""
        matrix, hf = self._inner[0].get_output_embeddings(), self.hf
        scale = (hf.get("logit_scale") or 1.0) / (hf.get("logits_scaling") or 1.0)
        bias = getattr(matrix, "bias", None)
        softcap = hf.get("final_logit_softcapping")
        return OutputHead(head_weight(matrix), bias, float(scale), softcap)

    def require(self, device: torch.device, *, packing: bool) -> None:
        """Try now what training will ask for; UserError where the inner class lacks it.

        Before the model is spread: later, workers would try it at different times, each waiting
        for the others' shards.
        """
        self._require("head", self._head_is_linear, device)
        if packing:
            self._require("packing", self._keeps_apart, device)

    def _require(self, ability: str, test: Any, device: torch.device) -> None:
        """Try an ability on a few tokens, once; UserError where the inner class lacks it."""
        if ability not in self._tried:
            with torch.no_grad():
                self._tried[ability] = test(device)
        if not self._tried[ability]:
            name = self.hf.get("model_type")
            what, fix, key = REFUSALS[ability]
            raise UserError(Mistake(what.format(name=name), fix, key))

    def _keeps_apart(self, device: torch.device) -> bool:
        """Whether a document's logits are the same after another document in its row."""
        if not self._takes_positions:
            return False
        options = {"use_cache": False} if self._caches else {}
        second = torch.arange(4, device=device)
        rows = torch.stack([torch.cat([second + start, second]) for start in (1, 2)])
        rows = rows % self.vocab_size
        segments = torch.tensor([[0] * 4 + [1] * 4] * 2, device=device)
        packed = self._inner[0](rows, position_ids=_restarting_positions(segments), **options)
        alone = self._inner[0](rows[:, 4:], **options).logits
        return _close(packed.logits[:, 4:], alone)

    def _head_is_linear(self, device: torch.device) -> bool:
        """Whether our output head makes the inner model's logits of its hidden states."""
        options = {"use_cache": False} if self._caches else {}
        row = (torch.arange(8, device=device) % self.vocab_size).unsqueeze(0)
        logits = self._output_head().logits(self._hidden(row, options))
        expected = self._inner[0](row, **options).logits
        return logits.shape == expected.shape and _close(logits, expected)


REFUSALS = {
    "packing": (
        "transformers' {name} model cannot keep documents packed into one row apart",
        "give each document its own row: `packing: none`",
        "data.packing",
    ),
    "head": (
        "transformers' {name} model makes its logits in a way that cannot be fused with the loss",
        "choose a model of another family",
        "model.path",
    ),
}


def load_fallback(
    directory: Path, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False
) -> FallbackModel:
    """The directory's model by transformers' own class; UserError where it cannot be had whole."""
    from transformers import AutoModelForCausalLM

    weight_files(directory)  # refuses pickles and missing shards in our own words
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises whatever its thousand classes raise
        fix = "a model whose code comes with it needs `trust_remote_code: true`"
        what = f"transformers cannot load this model: {error}"
        raise UserError(Mistake(what, fix, where=str(directory))) from error
    inner, report = loaded
    lost = sorted(report["missing_keys"])
    if lost:
        what = f"{len(lost)} tensors are missing from the files: {', '.join(lost[:6])}"
        raise UserError(Mistake(what, "copy or download it again", where=str(directory)))
    return FallbackModel(inner)


def _one_document_a_row(segments: Tensor) -> bool:
    """Whether no row holds more than one document, with padding after it only."""
    real = segments >= 0
    first = real[:, :1] & (segments == segments[:, :1])
    return bool((real == first).all() and (real[:, 1:] <= real[:, :-1]).all())


def _restarting_positions(segments: Tensor) -> Tensor:
    """Positions that count from 0 in each document: transformers tells documents apart by them."""
    slots = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return slots - torch.where(starts, slots, 0).cummax(dim=1).values


def _close(values: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-4 if expected.dtype == torch.float32 else 2e-2
    return bool((values - expected).abs().max() <= tolerance * expected.abs().max())
