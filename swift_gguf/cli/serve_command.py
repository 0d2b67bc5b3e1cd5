"""`swift-gguf serve`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swift_gguf.cli.help import examples, model_argument
from swift_gguf.cli.options import (
    model_flags,
    model_options,
    read_text,
    sampling_flags,
    sampling_options,
    speculation_flags,
    speculation_options,
    template_flags,
    template_variables,
)

if TYPE_CHECKING:
    from swift_gguf.server.options import ServerOptions


@click.command(
    epilog=examples(
        "swift-gguf serve smollm2-135m                # then open http://127.0.0.1:8080",
        "swift-gguf serve model.gguf --port 9000 --alias my-model --queue-size 32",
        "swift-gguf serve model.gguf --host 0.0.0.0 --api-key-file key.txt",
        "curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\",
        """  -d '{"messages": [{"role": "user", "content": "Hello!"}]}'""",
    )
)
@model_argument
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen on.  Any other address opens the server to the network.",
)
@click.option("--port", default=8080, show_default=True, metavar="N",
              type=click.IntRange(0, 65535),
              help="Port to listen on; 0: any free port.")  # fmt: skip
@click.option("--api-key", envvar="SWIFT_GGUF_API_KEY", show_envvar=True, metavar="KEY",
              help="Key that clients must send.  Other users of this machine can see a command's "
              "flags, so prefer the variable or the next flag.")  # fmt: skip
@click.option("--api-key-file", type=click.Path(path_type=Path), metavar="FILE",
              help="Read the key from a file.")  # fmt: skip
@click.option("-a", "--alias", metavar="NAME",
              help="The model's name in responses.  [default: from MODEL]")  # fmt: skip
@click.option("--cors", "origins", multiple=True, metavar="ORIGIN",
              help="Allow requests from pages of this web origin (https://chat.example.org; *: "
              "any).  May be repeated.")  # fmt: skip
@click.option("-n", "--n-predict", type=click.IntRange(1), metavar="N",
              help="Maximum number of tokens per answer.  [default: what fits the "
              "context]")  # fmt: skip
@click.option("--queue-size", default=64, show_default=True, metavar="N", type=click.IntRange(0),
              help="Number of requests that may wait; more get error 503.")  # fmt: skip
@click.option("--max-body", default=4 << 20, show_default=True, metavar="BYTES",
              type=click.IntRange(1024), help="Maximum size of a request.")  # fmt: skip
@click.option("--timeout", "timeout_s", default=600.0, show_default=True, metavar="SECONDS",
              type=click.FloatRange(0, min_open=True),
              help="Time limit for a request, from the queue to its last token.")  # fmt: skip
@click.option("--receive-timeout", "receive_s", default=30.0, show_default=True,
              metavar="SECONDS", type=click.FloatRange(0, min_open=True),
              help="Time limit for a client to send its request.")  # fmt: skip
@click.option("--drain", "drain_s", default=30.0, show_default=True, metavar="SECONDS",
              type=click.FloatRange(0),
              help="Time limit for running answers after SIGTERM or Ctrl-C.")  # fmt: skip
@click.option("--grammars/--no-grammars", default=True, show_default=True,
              help="Accept grammars and JSON schemas from clients.  Even a small one can "
              "keep llama.cpp busy forever.")  # fmt: skip
@click.option("--cache-ram", "cache_mib", default=1024, show_default=True, metavar="MIB",
              type=click.IntRange(0),
              help="Memory to cache the KV state of earlier conversations; 0: off.")  # fmt: skip
@click.option("--read-ahead/--no-read-ahead", default=True, show_default=True,
              help="After an answer, process what is known of the next prompt.")  # fmt: skip
@template_flags
@speculation_flags
@sampling_flags
@model_flags
def serve(model: str, **values: Any) -> None:
    """Serve a model over HTTP with OpenAI's API.  The path / is a chat page."""
    from swift_gguf.server.extra import require

    # until the server listens and installs its own handlers
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _interrupt)
    require()
    from swift_gguf.hub import resolve
    from swift_gguf.hub.progress import download_progress

    if values["speculative_sampling"]:
        raise click.UsageError(
            "serve does not support --speculative-sampling: it changes the text of a seed"
        )
    options = _options(model, values)
    with download_progress() as progress:
        path = resolve(model, progress=progress)
    from swift_gguf.native import StopFlag
    from swift_gguf.native.memory import give_back_large_buffers
    from swift_gguf.server.run import serve as serve_model
    from swift_gguf.server.served import ServedLlama

    speculation, loading = speculation_options(values), model_options(values)
    if not options.is_loopback and options.api_key is None:
        click.echo(
            f"swift-gguf: warning: anyone who can reach {options.host} can use this server; "
            "set --api-key",
            err=True,
        )
    give_back_large_buffers()
    stop = StopFlag()
    serve_model(
        lambda: ServedLlama.load(path, loading, speculation, options, stop=stop),
        options,
        stop_loading=stop.raise_,
        on_listening=lambda url: click.echo(f"listening on {url}", err=True),
        on_ready=lambda served: click.echo(
            f"ready: {options.alias}; speculation: {served.speculation.reason}", err=True
        ),
    )


def _leave(*_: object) -> None:
    _ignore_signals()
    sys.exit(0)


def _interrupt(*_: object) -> None:
    _ignore_signals()
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    """Called when the process ends: another signal would change its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def model_name(reference: str) -> str:
    """The model's name in responses, from a registry name, a path or an address."""
    return Path(reference).name.removesuffix(".gguf")


def _options(model: str, values: dict[str, Any]) -> ServerOptions:
    from swift_gguf.server.options import ServerOptions
    from swift_gguf.text import read_template

    template = values["chat_template"]
    key = values["api_key"]
    if values["api_key_file"] is not None:
        key = read_text(values["api_key_file"]).strip()
    if key is not None and not (key and key.isascii() and key.isprintable()):
        raise click.UsageError("the API key must consist of printable ASCII characters")
    return ServerOptions(
        host=values["host"],
        port=values["port"],
        api_key=key,
        origins=values["origins"],
        alias=values["alias"] or model_name(model),
        queue_size=values["queue_size"],
        max_body=values["max_body"],
        n_predict=values["n_predict"],
        timeout_s=values["timeout_s"],
        receive_s=values["receive_s"],
        drain_s=values["drain_s"],
        grammars=values["grammars"],
        cache_bytes=values["cache_mib"] << 20,
        reads_ahead=values["read_ahead"],
        chat_template=template and read_template(template),
        template_variables=template_variables(values),
        sampling=sampling_options(values),
    )
