"""Flags that several commands share.  They have llama.cpp's names where it has such a flag."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from swift_gguf import text_files
from swift_gguf.errors import SchemaError

if TYPE_CHECKING:
    from swift_gguf.model import Model, ModelOptions
    from swift_gguf.sampling import SamplingOptions
    from swift_gguf.schemas.constraint import Constraint
    from swift_gguf.search.paper import PaperOptions
    from swift_gguf.speculation import SpeculationOptions

STANDARD_INPUT = "standard input"

F = TypeVar("F", bound=Callable[..., Any])


def _all(*options: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


model_flags = _all(
    click.option("-c", "--ctx-size", metavar="N",
                 type=click.IntRange(0), help="Context size in tokens; 0: as long as the model was "
                 "trained for.  [default: 4096, or less if the model was trained for less]"),
    click.option("-t", "--threads", type=click.IntRange(1, 512), metavar="N",
                 help="Number of threads.  [default: one per physical core]"),
    click.option("-ngl", "--n-gpu-layers", default=-1, metavar="N",
                 help="Number of layers on the GPU; -1: all.  [default: -1]"),
    click.option("-fa", "--flash-attn", type=click.Choice(["auto", "on", "off"]), default="auto",
                 help="Flash attention.  [default: auto]"),
    click.option("--sidecar", metavar="FILE",
                 help="Draft weights from `swift-gguf prepare`; none: use none.  [default: the "
                 "file beside the model, if there is one]"),
)  # fmt: skip

sampling_flags = _all(
    click.option("--temp", default=0.8, show_default=True, help="Temperature; 0: greedy."),
    click.option("--top-k", default=40, show_default=True,
                 help="Keep the N most likely tokens; 0: all."),
    click.option("--top-p", default=0.95, show_default=True,
                 help="Keep the most likely tokens up to this total probability; 1: all."),
    click.option("--min-p", default=0.05, show_default=True,
                 help="Drop tokens below this share of the top probability; 0: none."),
    click.option("--repeat-penalty", default=1.0, show_default=True,
                 help="Penalty for repeated tokens; 1: none."),
    click.option("--repeat-last-n", default=64, show_default=True,
                 help="Number of latest tokens that the penalties look at; -1: all."),
    click.option("--presence-penalty", default=0.0, show_default=True, help="0: none."),
    click.option("--frequency-penalty", default=0.0, show_default=True, help="0: none."),
    click.option("-s", "--seed", default=-1, metavar="N",
                 help="Random seed; -1: a new one each time.  [default: -1]"),
    click.option("--grammar", metavar="GBNF",
                 help="Constrain the answer to a grammar; its root rule is `root`."),
    click.option("--grammar-file", type=click.Path(path_type=Path), metavar="FILE",
                 help="Read the grammar from a file."),
)  # fmt: skip

template_flags = _all(
    click.option("--chat-template", metavar="JINJA",
                 help="Use this chat template (text or file) instead of the model's."),
    click.option("--chat-template-kwargs", metavar="JSON",
                 help="More variables for the template, as {\"name\": value}."),
    click.option("-rea", "--reasoning", type=click.Choice(["on", "off", "auto"]), default="auto",
                 help="Let the model think before it answers.  [default: auto, the template "
                 "decides]"),
    click.option("--reasoning-effort", metavar="LEVEL",
                 help="How much the model thinks, if its template has levels: none, low, medium, "
                 "high, ...  [default: the template's]"),
)  # fmt: skip

schema_flags = _all(
    click.option("-j", "--json-schema", metavar="SCHEMA",
                 help="Constrain the answer to a JSON schema; {}: any JSON."),
    click.option("-jf", "--json-schema-file", type=click.Path(path_type=Path), metavar="FILE",
                 help="Read the JSON schema from a file."),
)  # fmt: skip

answer_flags = _all(
    click.option(
        "-n",
        "--n-predict",
        default=-1,
        metavar="N",
        help="Stop the answer after N tokens; -1: no limit.  [default: -1]",
    ),
    click.option("-sys", "--system-prompt", metavar="TEXT", help="A system message."),
    template_flags,
)

speculation_flags = _all(
    click.option("--speculation", default="auto", show_default=True,
                 metavar="SOURCES", help="Where drafts come from: auto, off, or a comma-separated "
                 "list of ngram, recycling, layer-skip, draft-model."),
    click.option("--draft-model", type=click.Path(path_type=Path), metavar="PATH",
                 help="A smaller model with the same vocabulary, used for drafts."),
    click.option("--draft-max", metavar="N", type=click.IntRange(1, 64),
                 help="Maximum number of draft tokens.  [default: chosen by measured cost]"),
    click.option("--draft-p-min", metavar="P", type=click.FloatRange(0, 1),
                 help="Stop drafting below this probability.  [default: chosen by measured "
                 "acceptance]"),
    click.option("--search", default="auto", show_default=True, type=click.Choice(["auto", "off"]),
                 help="Search for layers to skip."),
    click.option("--speculative-sampling", is_flag=True,
                 help="Sample drafts and accept them with probability min(1, p/q).  Texts have the "
                 "same distribution, but a seed gives another text than plain decoding."),
)  # fmt: skip

search_flags = _all(
    click.option("--search", default="auto", show_default=True,
                 type=click.Choice(["auto", "paper"]),
                 help="Search for layers to skip; paper: SWIFT's own search, set by the next "
                 "flags."),
    click.option("--skip-ratio", default=0.45, show_default=True,
                 type=click.FloatRange(0, 1, min_open=True, max_open=True),
                 help="Share of sub-layers to skip."),
    click.option("--context-window", default=32, show_default=True, type=click.IntRange(1, 45),
                 help="Score a proposal on this many latest tokens."),
    click.option("--opt-interval", default=1, show_default=True, type=click.IntRange(1),
                 help="Score a proposal after every N forward passes."),
    click.option("--bayes/--no-bayes", default=True, show_default=True,
                 help="Use Bayesian optimisation."),
    click.option("--bayes-interval", default=25, show_default=True, type=click.IntRange(1),
                 help="Take every Nth proposal from Bayesian optimisation, the others at random."),
    click.option("--max-opt-iter", default=1000, show_default=True, type=click.IntRange(1),
                 help="Stop after N proposals."),
    click.option("--max-tolerance-iter", default=300, show_default=True, type=click.IntRange(1),
                 help="Stop after N proposals without improvement."),
    click.option("--max-score", default=0.95, show_default=True, type=click.FloatRange(0, 1),
                 help="Stop when a proposal's matchness exceeds this."),
)  # fmt: skip


layer_skip_flags = _all(
    click.option("--skip-attn", metavar="LAYERS",
                 help="Skip attention in these layers in layer-skip drafts: 3,5-9."),
    click.option("--skip-ffn", metavar="LAYERS",
                 help="Skip the FFN in these layers in layer-skip drafts: 4,6."),
    click.option("--draft-tree", type=click.Choice(["chain", "caterpillar", "best-first"]),
                 help="Shape of layer-skip drafts.  [default: chain]"),
    search_flags,
)  # fmt: skip


def speculation_options(values: dict[str, Any]) -> SpeculationOptions:
    """`SpeculationOptions` from the values of `speculation_flags`."""
    from swift_gguf.speculation import SpeculationOptions

    return SpeculationOptions(
        mode=values["speculation"],
        search=values["search"],
        draft_max=values["draft_max"],
        p_min=values["draft_p_min"],
        draft_model=values["draft_model"],
        sampled=values["speculative_sampling"],
    )


def layer_skip_options(values: dict[str, Any]) -> SpeculationOptions:
    """`SpeculationOptions` of a bench's layer-skip, from the values of `layer_skip_flags`."""
    from swift_gguf.speculation import SpeculationOptions
    from swift_gguf.subnetwork import parse_layers

    skip_attn, skip_ffn = (
        None if values[name] is None else parse_layers(values[name])
        for name in ("skip_attn", "skip_ffn")
    )
    return SpeculationOptions(
        skip_attn=skip_attn,
        skip_ffn=skip_ffn,
        tree=values["draft_tree"],
        search=values["search"],
        paper=paper_options(values),
    )


def paper_options(values: dict[str, Any]) -> PaperOptions:
    """`PaperOptions` from the values of `search_flags`, which have SWIFT's own names."""
    from swift_gguf.search.paper import PaperOptions

    return PaperOptions(
        skip_ratio=values["skip_ratio"],
        context_window=values["context_window"],
        opt_interval=values["opt_interval"],
        bayes=values["bayes"],
        bayes_interval=values["bayes_interval"],
        max_steps=values["max_opt_iter"],
        max_tolerance=values["max_tolerance_iter"],
        max_score=values["max_score"],
    )


def model_options(values: dict[str, Any]) -> ModelOptions:
    """`ModelOptions` from the values of `model_flags`."""
    from swift_gguf.model import ModelOptions

    return ModelOptions(
        n_ctx=values["ctx_size"],
        n_threads=values["threads"],
        n_gpu_layers=values["n_gpu_layers"],
        flash_attn={"auto": None, "on": True, "off": False}[values["flash_attn"]],
        sidecar=_sidecar(values["sidecar"]),
    )


def _sidecar(value: str | None) -> Path | Literal["auto"] | None:
    if value is None:
        return "auto"
    return None if value == "none" else Path(value)


def sampling_options(values: dict[str, Any]) -> SamplingOptions:
    """`SamplingOptions` from the values of `sampling_flags`."""
    from swift_gguf.sampling import SamplingOptions

    grammar = values["grammar"]
    if values["grammar_file"] is not None:
        if grammar is not None:
            raise click.UsageError("give --grammar or --grammar-file, not both")
        grammar = read_text(values["grammar_file"])
    return SamplingOptions(
        temperature=values["temp"],
        top_k=values["top_k"],
        top_p=values["top_p"],
        min_p=values["min_p"],
        repeat_penalty=values["repeat_penalty"],
        presence_penalty=values["presence_penalty"],
        frequency_penalty=values["frequency_penalty"],
        repeat_last_n=values["repeat_last_n"],
        seed=None if values["seed"] == -1 else values["seed"],
        grammar=grammar,
    )


def constraint(values: dict[str, Any]) -> Constraint | None:
    """The JSON schema that the answer has to match, from the values of `schema_flags`.

    Raises:
        SchemaError: it is not a JSON schema, or it cannot be enforced.
    """
    text, path = values["json_schema"], values["json_schema_file"]
    if text is None and path is None:
        return None
    if text is not None and path is not None:
        raise click.UsageError("give --json-schema or --json-schema-file, not both")
    if values["grammar"] is not None or values["grammar_file"] is not None:
        raise click.UsageError("give a grammar or a JSON schema, not both")
    from swift_gguf.schemas.constraint import json_by

    if text is None:
        text = read_text(path)
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"the JSON schema is not JSON: {error}") from error
    return json_by(schema)


def template_variables(values: dict[str, Any]) -> dict[str, Any]:
    """The chat template's variables, from the values of `template_flags`.

    Raises:
        TemplateError: they are not a JSON object, or they set a reserved name.
    """
    from swift_gguf.templates import THINKS, parse_variables, with_reasoning

    text, effort = values["chat_template_kwargs"], values["reasoning_effort"]
    return with_reasoning(
        {} if text is None else parse_variables(text),
        thinks=THINKS[values["reasoning"]],
        effort=None if effort == "default" else effort,
    )


def load_model(reference: str, values: dict[str, Any], **more: Any) -> Model:
    """Loads the model that MODEL names; downloads it first if necessary.

    more: fields of `ModelOptions` that no flag sets.
    """
    from dataclasses import replace

    from swift_gguf.hub import resolve
    from swift_gguf.hub.progress import download_progress

    with download_progress() as progress:
        path = resolve(reference, progress=progress)
    from swift_gguf.model import Model

    model = Model(path, replace(model_options(values), **more))
    if model.sidecar_refusal:
        click.echo(f"swift-gguf: draft weights are not used: {model.sidecar_refusal}", err=True)
    return model


def read_text(path: Path, *, limit: int = text_files.MAX_BYTES) -> str:
    """The text of a file, or of standard input if the path is ``-``; at most `limit` bytes.

    Raises:
        SwiftError: it cannot be read, is too long, or is not text.
    """
    if str(path) != "-":
        return text_files.read_text(path, limit=limit)
    data = sys.stdin.buffer.read(limit + 1) if sys.stdin else b""
    return text_files.decode(data, STANDARD_INPUT, limit=limit)
