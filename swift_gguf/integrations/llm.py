"""The plug-in for `llm`: ``llm -m swift/smollm2-135m "..."``, ``llm -m swift/model.gguf "..."``.

llm asks every plug-in for its models before it knows which one is wanted: until one answers,
nothing of this package is loaded but names.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llm
from llm.parts import TextPart
from pydantic import Field

from swift_gguf.errors import ModelError, SwiftError
from swift_gguf.hub import registry, resolve
from swift_gguf.hub.huggingface import PREFIX as HUB
from swift_gguf.text_files import read_text

if TYPE_CHECKING:
    from swift_gguf.llama import Llama

PREFIX = "swift/"
_NAMED = re.compile(rf"(?:-m|--model=)?{PREFIX}(.+)", re.DOTALL)  # -mswift/..., too


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    """The models known by name, and every file that was named to llm so far.

    llm looks models up in a list, so a path must be in it: one on the command line is added, and
    remembered, so that ``llm -c`` goes on with the conversation.
    """
    remembered = _remembered()
    references = [entry.name for entry in registry()]
    references += [reference for reference in remembered if _exists(reference)]
    aliases: dict[str, set[str]] = {reference: set() for reference in references}
    for spelling in _named_to_llm(sys.argv[1:]):
        reference = spelling
        if Path(spelling).is_file():
            reference = str(Path(spelling).resolve())
        aliases.setdefault(reference, set())
        if reference != spelling:
            aliases[reference].add(PREFIX + spelling)
    for reference, spellings in aliases.items():
        register(SwiftModel(reference), aliases=sorted(spellings))
    _remember([name for name in aliases if name not in references and _exists(name)])


class AnswerOptions(llm.Model.Options):
    """As on swift-gguf's own command line, with its defaults."""

    temperature: float = Field(default=0.8, description="0: always the likeliest token")
    top_k: int = Field(default=40, ge=0, description="Among the likeliest so many; 0: all")
    top_p: float = Field(default=0.95, ge=0, le=1, description="Among the likeliest of this share")
    min_p: float = Field(
        default=0.05, ge=0, le=1, description="None less likely, relative to the likeliest"
    )
    repeat_penalty: float = Field(default=1.0, gt=0, description="1: none")
    max_tokens: int | None = Field(default=None, ge=1, description="Of an answer, at most")
    seed: int | None = Field(default=None, ge=0, description="The same seed, the same answer")
    speculation: str = Field(
        default="auto", description="auto, off, or sources of drafts, joined by commas"
    )
    ctx_size: int | None = Field(default=None, ge=1, description="Context in tokens")


class SwiftModel(llm.Model):
    """A GGUF: a path, ``hf:owner/repo[/file.gguf]`` or a name of `swift-gguf models`."""

    can_stream = True
    supports_schema = True
    Options = AnswerOptions

    def __init__(self, reference: str) -> None:
        self.model_id = PREFIX + reference
        self._reference = reference
        self._llama: Llama | None = None
        self._ctx_size: int | None = None

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None,
    ) -> Iterator[str]:
        """Pieces of the answer; what has been said before in the conversation is not decoded again.

        Raises:
            llm.ModelError: one line that says what to do.
        """
        try:
            yield from self._answer(prompt, response)
        except (SwiftError, OSError, ValueError) as error:
            hint = "; a larger one: -o ctx_size N" if "context window" in str(error) else ""
            raise llm.ModelError(" ".join(str(error).split()) + hint) from error

    def _answer(self, prompt: llm.Prompt, response: llm.Response) -> Iterator[str]:
        options = prompt.options
        assert isinstance(options, AnswerOptions)
        llama = self._loaded(options)
        seed = _seed(options)
        sampling: dict[str, Any] = {
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "min_p": options.min_p,
            "repeat_penalty": options.repeat_penalty,
            "max_tokens": options.max_tokens,
            "seed": seed,
        }
        if prompt.schema:
            sampling["response_format"] = {"type": "json_object", "schema": prompt.schema}
        for chunk in _chunks(llama, _messages(prompt), sampling):
            choice = chunk["choices"][0]
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
            if text:
                yield text
        stats = llama.speculation.stats
        last = stats.stop_reason != "eos"  # the last token is out, but in no context
        n_input = llama.n_tokens - stats.predicted_n + last
        response.set_usage(input=n_input, output=stats.predicted_n)
        response.response_json = {
            "seed": seed,
            "stop_reason": stats.stop_reason,
            "timings": stats.timings(),
            "speculation": stats.speculation() | {"why": llama.speculation.reason},
        }

    def _loaded(self, options: AnswerOptions) -> Llama:
        """The model, with a context of the size that is wanted."""
        from swift_gguf.hub.progress import download_progress
        from swift_gguf.llama import Llama

        llama = self._llama
        if llama is None or self._ctx_size != options.ctx_size:
            if llama:
                self._llama = None
                llama.close()
            with download_progress() as progress:
                path = resolve(self._reference, progress=progress)
            llama = Llama(
                str(path),
                n_ctx=options.ctx_size,
                n_gpu_layers=-1,
                flash_attn=None,
                speculation=options.speculation,
                verbose=False,
            )
            self._llama, self._ctx_size = llama, options.ctx_size
        if llama.speculation.mode != options.speculation:
            llama.speculation.mode = options.speculation
        return llama


def _chunks(
    llama: Llama, messages: list[dict[str, str]], sampling: dict[str, Any]
) -> Iterator[Any]:
    if "tokenizer.chat_template" in llama.metadata:
        yield from llama.create_chat_completion(messages, stream=True, **sampling)
        return
    if len(messages) != 1 or "response_format" in sampling:
        raise ModelError(
            f"{llama.model_path} has no chat template: it goes on with one text, and knows neither "
            "conversations, system prompts nor schemas"
        )
    yield from llama.create_completion(prompt=messages[0]["content"], stream=True, **sampling)


def _messages(prompt: llm.Prompt) -> list[dict[str, str]]:
    """The whole conversation, this prompt last, as templates take it."""
    return [
        {
            "role": message.role,
            "content": "".join(part.text for part in message.parts if isinstance(part, TextPart)),
        }
        for message in prompt.messages
    ]


def _seed(options: AnswerOptions) -> int:
    from swift_gguf.sampling import SamplingOptions

    seed = SamplingOptions(seed=options.seed).with_seed().seed
    assert seed is not None
    return seed


# -- which models there are ------------------------------------------------------------------------


def _named_to_llm(arguments: Sequence[str]) -> list[str]:
    return [match[1] for match in map(_NAMED.fullmatch, arguments) if match]


def _exists(reference: str) -> bool:
    return reference.startswith(HUB) or Path(reference).is_file()


def _list_path() -> Path:
    folder: Callable[[], Path] = llm.user_dir
    return folder() / "swift-gguf.json"


def _remembered() -> list[str]:
    try:
        names = json.loads(read_text(_list_path()))
    except (SwiftError, ValueError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _remember(names: list[str]) -> None:
    if names:
        with contextlib.suppress(OSError):  # a home that cannot be written: `llm -c` needs the path
            kept = [*dict.fromkeys(_remembered() + names)]
            _list_path().write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
