"""The next token of each request, by the processors of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as hf

from sp_compile.errors import ConfigError, nearest

Maker = Callable[[Any], hf.LogitsProcessor]

# of the fields that change tokens, those that are served: by what was generated so far, and by the scores alone
BY_HISTORY: dict[str, Maker] = {
    "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": hf.NoRepeatNGramLogitsProcessor,
}
BY_SCORES: dict[str, Maker] = {
    "temperature": lambda value: hf.TemperatureLogitsWarper(float(value)),
    "top_k": hf.TopKLogitsWarper,
    "top_p": lambda value: hf.TopPLogitsWarper(float(value)),
    "min_p": hf.MinPLogitsWarper,
    "typical_p": hf.TypicalLogitsWarper,
    "epsilon_cutoff": hf.EpsilonLogitsWarper,
    "eta_cutoff": hf.EtaLogitsWarper,
}
SERVED = frozenset({*BY_HISTORY, *BY_SCORES, "suppress_tokens", "do_sample", "min_new_tokens", "max_new_tokens",
                    "eos_token_id"})  # fmt: skip
NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0,
                           "no_repeat_ngram_size": 0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "num_beams": 1,
                           "num_return_sequences": 1, "guidance_scale": 1.0, "num_beam_groups": 1, "min_length": 0,
                           "encoder_repetition_penalty": 1.0, "diversity_penalty": 0.0, "length_penalty": 1.0,
                           "renormalize_logits": False, "remove_invalid_values": False, "early_stopping": False,
                           "encoder_no_repeat_ngram_size": 0, "token_healing": False}  # fmt: skip
# of those that are not served, what says nothing about which token comes next
SILENT = frozenset({"max_length", "use_cache", "pad_token_id", "bos_token_id", "transformers_version", "cache_config",
                    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "use_mtp",
                    "return_dict_in_generate", "cache_implementation", "max_cache_len", "compile_config",
                    "disable_compile", "continuous_batching_config", "low_memory", "prefill_chunk_size",
                    "decoder_start_token_id", "is_assistant", "num_assistant_tokens", "assistant_confidence_threshold",
                    "num_assistant_tokens_schedule", "max_matching_ngram_size", "assistant_early_exit",
                    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"})  # fmt: skip
TOP_K = 50  # where nothing is said, as in transformers' generate


def configured(
    default: GenerationConfig | None, given: GenerationConfig | None, options: Mapping[str, Any]
) -> GenerationConfig:
    """The configuration of a generation: what was given, else the model's, with single options changed.

    Raises:
        ConfigError: an option that transformers does not know, or one that is not served here.
    """
    config = copy.deepcopy(given or GenerationConfig())
    for name, value in vars(default or config).items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    known = {name for name in vars(config) if not name.startswith("_")}
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"unknown generation option {name!r}{nearest(name, sorted(SERVED))}")
        setattr(config, name, value)
    for name in sorted(known - SERVED - SILENT):
        value = getattr(config, name)
        if value is not None and value != NEUTRAL.get(name) and value != []:
            raise ConfigError(
                f"{name}={value!r} is not served for ragged requests; unset it, or call model.generate(), which "
                "takes rows [B, S]"
            )
    return config


class Sampler:
    """Chooses tokens as transformers' ``generate`` does for each request alone.

    Args:
        config: from :func:`configured`.
        prompts: int64 ``[tokens]`` of each request.
        seeds: of each request's own random numbers, where tokens are sampled.
    """

    def __init__(self, config: GenerationConfig, prompts: Sequence[torch.Tensor], seeds: Sequence[int]) -> None:
        end = config.eos_token_id
        self.ends = frozenset([end] if isinstance(end, int) else end or [])
        self._sample = bool(config.do_sample)
        self._prompts = prompts
        self._device = prompts[0].device
        self._generators = [torch.Generator(self._device).manual_seed(seed) for seed in seeds]
        self._by_history = _chosen(config, BY_HISTORY)
        self._by_scores = _chosen(config, BY_SCORES) if self._sample else []
        if config.suppress_tokens:
            self._by_scores.insert(0, hf.SuppressTokensLogitsProcessor(config.suppress_tokens, device=self._device))
        self._soonest = int(config.min_new_tokens or 0)

    def next(self, requests: Sequence[int], logits: torch.Tensor, new: Sequence[Sequence[int]]) -> list[int]:
        """The next token of each of ``requests``.

        Args:
            logits: ``[requests, vocabulary]``.
            new: what each of them has generated so far.
        """
        scores = logits.to(torch.float32, copy=True)
        nothing = torch.zeros(len(requests), 0, dtype=torch.int64, device=scores.device)
        for i, request in enumerate(requests):
            if len(new[i]) < self._soonest:
                scores[i, [end for end in self.ends if 0 <= end < scores.shape[1]]] = -torch.inf
            if self._by_history:
                told = torch.cat([self._prompts[request], self._prompts[request].new_tensor(new[i])])[None]
                for each in self._by_history:
                    scores[i] = each(told, scores[i : i + 1])[0]
        for each in self._by_scores:
            scores = each(nothing, scores)
        if not self._sample:
            return [int(each) for each in scores.argmax(dim=-1)]
        shares = scores.softmax(dim=-1)
        return [
            int(torch.multinomial(shares[i : i + 1], 1, generator=self._generators[request]))
            for i, request in enumerate(requests)
        ]


def _chosen(config: GenerationConfig, table: Mapping[str, Maker]) -> list[hf.LogitsProcessor]:
    values = {name: getattr(config, name, None) for name in table}
    if "top_k" in values and values["top_k"] is None:
        values["top_k"] = TOP_K
    return [table[name](value) for name, value in values.items() if value is not None and value != NEUTRAL.get(name)]
