"""What `swift-gguf bench` compares: our engine in several modes, and other programs (peers)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from swift_gguf.bench.modes import AUTO, BARE, LOOKUP, PLAIN, Mode
from swift_gguf.engine import generate
from swift_gguf.gguf.identity import profile_key
from swift_gguf.learning import Store
from swift_gguf.model import Model
from swift_gguf.sampling import Sampler, SamplingOptions
from swift_gguf.speculation import Speculation, SpeculationOptions
from swift_gguf.stats import SourceStats, Stats
from swift_gguf.tokens import common_prefix

DEFAULTS = SpeculationOptions()
LOOKUP_TOKENS = 10
"""`num_pred_tokens` of LlamaPromptLookupDecoding: its default."""


@dataclass(frozen=True)
class Answer:
    """The token ids, without an end-of-generation token, and the statistics."""

    ids: tuple[int, ...]
    stats: Stats


class Contender(Protocol):
    """Answers prompts, and keeps what it learns from one prompt to the next."""

    @property
    def why(self) -> str:
        """The active sources of drafts, or why there are none."""
        ...

    @property
    def setup_s(self) -> float:
        """Seconds of preparation before the first prompt, without loading the model."""
        ...

    def hold(self, tokens: Sequence[int]) -> None:
        """Fills the context with these tokens: the earlier part of a chat."""
        ...

    def answer(self, prompt: Sequence[int], *, max_tokens: int) -> Answer:
        """Decodes the part of the prompt that is not in the context yet, and an answer."""
        ...


@contextmanager
def opened(
    model: Model,
    modes: Sequence[Mode],
    sampling: SamplingOptions,
    *,
    draft_model: Path | None = None,
    layer_skip: SpeculationOptions = DEFAULTS,
    cold: bool = False,
) -> Iterator[dict[str, Contender]]:
    """The contenders by the names of their modes.

    Our modes share `model` in turns; each peer loads the file again.  Each mode of ours begins with
    the model's profile, without the texts of earlier answers: with these, a second run of the same
    suite would measure how well answers are remembered.  What a mode learns is deleted at the end.
    cold: each mode begins without a profile.

    Raises:
        SwiftError: a mode is impossible with this model.
    """
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for mode in modes:
            if mode.is_peer:
                contenders[mode.name] = stack.enter_context(closing(Peer(model, mode, sampling)))
                continue
            store = Store(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            if not cold:
                _copy_but_texts(model, store)
            contenders[mode.name] = stack.enter_context(
                closing(
                    Ours(
                        model,
                        speculation_options(mode, layer_skip, draft_model=draft_model),
                        sampling,
                        store=store,
                    )
                )
            )
        yield contenders


def _copy_but_texts(model: Model, store: Store) -> None:
    """Copies the user's profiles of the model, with and without its sidecar."""
    for sidecar in {None, model.sidecar.path if model.sidecar else None}:
        known = Store().load(profile_key(model.path, sidecar))
        if known is not None:
            store.add(replace(known, recycling=()))


def speculation_options(
    mode: Mode, layer_skip: SpeculationOptions = DEFAULTS, *, draft_model: Path | None
) -> SpeculationOptions:
    """The options of `Speculation` for a mode of ours.

    layer_skip: the options for modes that use this source.
    """
    if mode.base == PLAIN:
        return SpeculationOptions(mode="off")
    if mode.base == AUTO:
        return SpeculationOptions(mode=AUTO)
    if mode.base == BARE:
        return SpeculationOptions(mode=AUTO, sidecar=False)
    names = ",".join(mode.sources)
    if "draft-model" not in mode.sources:
        draft_model = None
    given = layer_skip if "layer-skip" in mode.sources else DEFAULTS
    options = replace(given, mode=names, draft_model=draft_model)
    if mode.draft_max is None:
        return options
    return replace(options, draft_max=mode.draft_max, search="off", fixed=True)


class Ours:
    """Our engine, on a model that is shared with other modes."""

    def __init__(
        self,
        model: Model,
        options: SpeculationOptions,
        sampling: SamplingOptions,
        *,
        store: Store,
    ) -> None:
        model.clear()
        start = perf_counter()
        self._speculation = Speculation(model, options, store=store)
        learning = self._speculation.learning
        if learning and learning.costs.is_provisional:
            learning.measure_costs()  # modes are compared with their costs known
        self.setup_s = perf_counter() - start
        self._model = model
        self._sampling = sampling

    @property
    def why(self) -> str:
        return self._speculation.why

    def hold(self, tokens: Sequence[int]) -> None:
        model = self._model
        common = common_prefix(model.tokens, tokens)
        if common == 0 or (model.rollback_refusal and common < model.n_past):
            common = 0
            model.clear()
        elif common < model.n_past:
            model.rollback(common)
        if common < len(tokens):
            model.decode(tokens[common:], n_outputs=0)

    def answer(self, prompt: Sequence[int], *, max_tokens: int) -> Answer:
        speculation, stats = self._speculation, Stats()
        with Sampler(self._model, self._sampling, prompt=prompt) as sampler:
            tokens = generate(
                self._model,
                prompt,
                sampler=sampler,
                drafter=speculation.drafter,
                search=speculation.begin(len(prompt)),
                draft_max=speculation.draft_max,
                max_tokens=max_tokens,
                stats=stats,
            )
            return Answer(tuple(token.id for token in tokens), stats)

    def close(self) -> None:
        self._speculation.close()


class Peer:
    """llama-cpp-python's own loop, with the same native library, on a second copy of the model."""

    setup_s = 0.0

    def __init__(self, model: Model, mode: Mode, sampling: SamplingOptions) -> None:
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        self.why = mode.base
        self._is_eog = model.is_eog
        self._sampling = sampling.with_seed()
        self._lookup = (
            _Counted(LlamaPromptLookupDecoding(num_pred_tokens=LOOKUP_TOKENS))
            if mode.base == LOOKUP
            else None
        )
        self._llama: Any = Llama(
            str(model.path),
            n_ctx=model.n_ctx,
            n_batch=model.options.n_batch,
            n_threads=model.n_threads,
            n_threads_batch=model.n_threads,
            n_gpu_layers=model.options.n_gpu_layers,
            flash_attn=model.options.flash_attn is not False,
            last_n_tokens_size=sampling.repeat_last_n,
            draft_model=self._lookup,
            # with a draft model, it reads the logits of all tokens, not only of the last n_batch
            logits_all=self._lookup is not None,
            verbose=False,
        )
        self._llama.eval([0])  # warm up pages and buffers, as for our own model

    def close(self) -> None:
        self._llama.close()

    def hold(self, tokens: Sequence[int]) -> None:
        llama = self._llama
        llama.n_tokens = common_prefix(llama.input_ids[: llama.n_tokens].tolist(), tokens)
        if llama.n_tokens < len(tokens):
            llama.eval(tokens[llama.n_tokens :])

    def answer(self, prompt: Sequence[int], *, max_tokens: int) -> Answer:
        stats = Stats(prompt_n=len(prompt) - self._llama.n_tokens, stop_reason="length")
        if self._lookup:
            self._lookup.calls.clear()
        ids: list[int] = []
        start = perf_counter()
        with closing(self._tokens(prompt)) as tokens:
            for token in tokens:
                stats.prompt_s = stats.prompt_s or perf_counter() - start
                if self._is_eog(token):
                    stats.stop_reason = "eos"
                    break
                ids.append(token)
                if len(ids) == max_tokens:
                    break
        stats.cycle_s = perf_counter() - start - stats.prompt_s
        stats.predicted_n = len(ids)
        self._count(stats, len(prompt), len(ids) + (stats.stop_reason == "eos"))
        return Answer(tuple(ids), stats)

    def _tokens(self, prompt: Sequence[int]) -> Any:
        from llama_cpp import LlamaGrammar

        options = self._sampling
        self._llama.set_seed(options.seed)
        return self._llama.generate(
            prompt,
            temp=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repeat_penalty=options.repeat_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            grammar=options.grammar and LlamaGrammar.from_string(options.grammar, verbose=False),
        )

    def _count(self, stats: Stats, prompt_n: int, sampled: int) -> None:
        """Counts cycles and drafts; the first sampled token belongs to the prompt's pass."""
        stats.cycles = stats.cycle_n = sampled - 1
        if self._lookup is None:
            return
        calls = self._lookup.calls
        stats.cycles = len(calls)
        source = SourceStats()
        ends = [length for length, _ in calls[1:]] + [prompt_n + sampled]
        for (length, drafted), end in zip(calls, ends, strict=True):
            if drafted:
                source.count(drafted=drafted, accepted=end - length - 1)
        if source.drafts:
            stats.sources[LOOKUP] = source


class _Counted:
    """A draft model for llama-cpp-python; records (text length, draft length) of every call."""

    def __init__(self, drafter: Any) -> None:
        self._drafter = drafter
        self.calls: list[tuple[int, int]] = []

    def __call__(self, input_ids: Any, /, **options: Any) -> Any:
        draft = self._drafter(input_ids, **options)
        self.calls.append((len(input_ids), len(draft)))
        return draft
