"""One way to answer a prompt: llama_cpp's `create_completion`, over `generate`.

llama_cpp's own loop decodes the whole answer again for each token's text, looks for the first stop
string of the list where the text has another one first, takes the log-probabilities of an echo from
the wrong rows, and cannot echo token ids.  This one answers as it does where it is right.
"""

from __future__ import annotations

import random
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from llama_cpp import Llama, LogitsProcessorList
from llama_cpp.llama_tokenizer import LlamaTokenizer

from swift_gguf.llama.answer_text import AnswerText
from swift_gguf.llama.prompts import Prompt, piece
from swift_gguf.llama.scores import LogProbs, Records, Scored
from swift_gguf.native import library

SAMPLED = (
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "tfs_z",
    "mirostat_mode",
    "mirostat_tau",
    "mirostat_eta",
    "frequency_penalty",
    "presence_penalty",
    "repeat_penalty",
    "stopping_criteria",
    "grammar",
)
"""What goes from `create_completion` to `generate` under the same name."""

MAX_REST = 3
"""Bytes of a character after its first."""


@dataclass(frozen=True)
class Request:
    """A completion as far as generations need to know it."""

    max_tokens: int | None = None
    echo: bool = False
    """Are log-probabilities of the prompt asked for, too?"""
    records: Records | None = None
    """Of the rows that log-probabilities are asked of."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a completion is asked for; names are those of `Llama.create_completion`."""

    prompt: str | Sequence[int]
    suffix: str | None = None
    max_tokens: int | None = None
    """None: as many as the context holds; 0: none."""
    logprobs: int | None = None
    echo: bool = False
    stop: Sequence[str] = ()
    stream: bool = False
    seed: int | None = None
    model: str | None = None
    temperature: float = 0.8
    logits_processor: Any = None
    logit_bias: Mapping[int, float] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """The rest, `SAMPLED`."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Asked:
        """Of `create_completion`'s arguments."""
        rest = {name: value for name, value in arguments.items() if name not in SAMPLED}
        stop = rest.pop("stop", None) or ()
        return cls(
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            sampling={name: arguments[name] for name in SAMPLED if name in arguments},
            **rest,
        )


class Completion:
    """One answer to one prompt.

    Raises:
        ValueError: the prompt is empty or does not fit; or log-probabilities are asked of a model
            that llama_cpp decodes and keeps no logits of.
        UnsupportedModelError: a suffix, and the model cannot fill gaps.
    """

    def __init__(self, llama: Any, asked: Asked, *, keeps_rows: bool) -> None:
        """keeps_rows: the llama's `_scores` have a row for each position."""
        self._llama, self._asked = llama, asked
        self._prompt = Prompt.of(llama, asked.prompt, asked.suffix)
        needs_text = asked.echo or asked.logprobs is not None
        self._echo = self._prompt.text(llama) if needs_text else ""
        self._tokens: list[int] = []
        self._end: int | None = None  # the token that ended it
        self._finish_reason = "length"
        n_ctx, n_prompt = llama._n_ctx, len(self._prompt.tokens)
        if n_prompt >= n_ctx:
            raise ValueError(f"Requested tokens ({n_prompt}) exceed context window of {n_ctx}")
        self._room: int = n_ctx - n_prompt
        self._limit: int = (
            self._room if asked.max_tokens is None else min(asked.max_tokens, self._room)
        )
        if asked.logprobs is not None and not llama._logits_all:
            raise ValueError("logprobs is not supported for models created with logits_all=False")
        has_records = asked.logprobs is not None and not keeps_rows
        records = Records(n_top=asked.logprobs or 0) if has_records else None
        self.request = Request(asked.max_tokens, asked.echo and has_records, records)
        self._head = {
            "id": f"cmpl-{uuid.uuid4()}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": llama.model_path if asked.model is None else asked.model,
        }

    def whole(self) -> dict[str, Any]:
        """The answer as one response."""
        texts, scored, offsets = [], [], []
        for text, entries in self._parts():
            texts.append(text)
            scored += [one for one, _ in entries]
            offsets += [offset for _, offset in entries]
        n_prompt, n_said = len(self._prompt.tokens), len(self._tokens)
        return {
            **self._head,
            "choices": [self._choice("".join(texts), scored, offsets, self._finish_reason)],
            "usage": {
                "prompt_tokens": n_prompt,
                "completion_tokens": n_said,
                "total_tokens": n_prompt + n_said,
            },
        }

    def chunks(self) -> Iterator[dict[str, Any]]:
        """The answer in pieces, the last of which says why it ended."""
        for text, entries in self._parts():
            if text or entries:
                scored, offsets = [one for one, _ in entries], [offset for _, offset in entries]
                yield {**self._head, "choices": [self._choice(text, scored, offsets, None)]}
        last = {"text": "", "index": 0, "logprobs": None, "finish_reason": self._finish_reason}
        yield {**self._head, "choices": [last]}

    def _choice(
        self, text: str, scored: list[Scored], offsets: list[int], reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self._asked.logprobs is not None:
            logprobs = LogProbs(scored, offsets, lambda token: piece(self._llama, token))
        return {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": reason}

    # -- what is said ------------------------------------------------------------------------------

    def _parts(self) -> Iterator[tuple[str, list[tuple[Scored, int]]]]:
        """Text after text, with its tokens' scores and where they begin, if that is asked for."""
        has_scores = self._asked.logprobs is not None
        n_told, offset = 0, len(self._echo)
        for text, n_tokens in self._said():
            if n_tokens is None:  # the prompt's own
                yield text, self._of_prompt() if has_scores else []
                continue
            entries = []
            if has_scores:
                told = range(n_told, n_told + n_tokens)
                entries = [(self._scored(i, self._tokens[i]), offset) for i in told]
            yield text, entries
            n_told += n_tokens
            offset += len(text)
        if has_scores and self._asked.echo and self._end is not None:
            # who scores an echo leaves the last entry out, whatever the model says there
            yield "", [(self._scored(len(self._tokens), self._end), offset)]

    def _said(self) -> Iterator[tuple[str, int | None]]:
        """Text after text, and of how many tokens; None: the echo."""
        llama, asked = self._llama, self._asked
        echo = iter([(self._echo, None)] if asked.echo else [])
        stops = [stop.encode("utf-8") for stop in asked.stop]
        text = AnswerText(stops, by_token=asked.logprobs is not None)
        is_eog, vocab = library().api.llama_vocab_is_eog, llama._model.vocab
        self._prepare()
        with closing(self._generate()) as tokens:
            for token in tokens:
                yield from echo
                if self._limit == 0:
                    break
                if is_eog(vocab, token):
                    self._end, self._finish_reason = token, "stop"
                    break
                self._tokens.append(token)
                for told in text.feed(self._piece(token)):
                    yield told.text, told.n_tokens
                if text.is_stopped:
                    self._finish_reason = "stop"
                    break
                if self._is_full(text):
                    break
        yield from echo
        criteria = asked.sampling.get("stopping_criteria")
        if criteria is not None and criteria(llama._input_ids, llama._scores[-1, :]):
            self._finish_reason = "stop"
        if llama.verbose:
            llama._ctx.print_timings()
        for told in text.finish():
            yield told.text, told.n_tokens
        if llama.cache:
            llama.cache[self._prompt.tokens + self._tokens] = llama.save_state()

    def _is_full(self, text: AnswerText) -> bool:
        """As llama_cpp, goes on to the end of a character, unless each token is asked about."""
        rest = 0 if text.is_whole or self._asked.logprobs is not None else MAX_REST
        most: int = min(self._limit + rest, self._room)
        return len(self._tokens) >= most

    def _prepare(self) -> None:
        llama, seed = self._llama, self._asked.seed
        if llama.verbose:
            llama._ctx.reset_timings()
        if llama.cache:
            self._look_up()
        # without a seed, llama_cpp's own sequence of them
        llama.set_seed(random.Random(llama._seed).randint(0, 2**32) if seed is None else seed)

    def _look_up(self) -> None:
        """Loads the state that llama_cpp's cache has for the prompt, if it is worth it."""
        llama, tokens = self._llama, self._prompt.tokens
        try:
            found = llama.cache[tokens]
        except KeyError:
            return
        prefix = Llama.longest_token_prefix
        here = prefix(llama._input_ids.tolist(), tokens)
        if prefix(found.input_ids.tolist(), tokens) > here:
            llama.load_state(found)
            if llama.verbose:
                print("Llama._create_completion: cache hit", file=sys.stderr)

    def _generate(self) -> Any:
        asked = self._asked
        processors = asked.logits_processor
        if asked.logit_bias is not None:
            biases = {int(token): float(bias) for token, bias in asked.logit_bias.items()}
            processors = LogitsProcessorList([*(processors or ()), _biased(biases)])
        return self._llama.generate(
            self._prompt.tokens,
            temp=asked.temperature,
            logits_processor=processors,
            **asked.sampling,
        )

    def _piece(self, token: int) -> bytes:
        """What a token adds to the answer."""
        llama = self._llama
        if not isinstance(llama.tokenizer_, LlamaTokenizer):
            return self._by_tokenizer()
        said: bytes = llama.piece(token)
        is_first = self._asked.prompt == "" and len(self._tokens) == 1
        return said.removeprefix(b" ") if is_first else said

    def _by_tokenizer(self) -> bytes:
        """A tokenizer that the user brought says what all tokens are; what it has no whole
        character of is U+FFFD."""
        llama, tokens, prompt = self._llama, self._tokens, self._prompt.tokens

        def whole(n: int) -> bytes:
            text: bytes = llama.detokenize(tokens[:n], prev_tokens=prompt)
            while text.endswith(b"\xef\xbf\xbd"):
                text = text[:-3]
            return text

        return whole(len(tokens))[len(whole(len(tokens) - 1)) :]

    # -- scores ------------------------------------------------------------------------------------

    def _of_prompt(self) -> list[tuple[Scored, int]]:
        prompt, entries, before = self._prompt, [], b""
        for i, said in zip(prompt.written, prompt.pieces(self._llama), strict=True):
            token, offset = prompt.tokens[i], len(before.decode("utf-8", "ignore"))
            is_first = i == prompt.written.start
            one = Scored(token, None) if is_first else self._after(i - 1, token)
            entries.append((one, min(offset, len(self._echo))))
            before += said
        return entries

    def _scored(self, i: int, token: int) -> Scored:
        """The answer's token number `i`."""
        return self._after(len(self._prompt.tokens) + i - 1, token)

    def _after(self, position: int, token: int) -> Scored:
        if self.request.records:
            return self.request.records.after(position)
        return Scored.of(self._llama._scores[position, :], token, self._asked.logprobs or 0)


def _biased(biases: Mapping[int, float]) -> Callable[[Any, Any], Any]:
    def processor(_: Any, scores: Any) -> Any:
        scores = scores.copy()
        for token, bias in biases.items():
            scores[token] = bias + scores[token]
        return scores

    return processor
