"""`swift-gguf verify`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swift_gguf.cli.help import complete_model, examples
from swift_gguf.cli.options import read_text

if TYPE_CHECKING:
    from swift_gguf.convert.verify import Comparison


@click.command(
    epilog=examples(
        "swift-gguf verify ./SmolLM2-135M-Instruct smollm2-Q4_K_M.gguf",
        "swift-gguf verify hf:owner/repo a-Q8_0.gguf a-Q4_0.gguf -f text.txt --tokens 512",
    )
)
@click.argument("source")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path),
                shell_complete=complete_model)  # fmt: skip
@click.option("-p", "--text",
              help="Text to compare on.  [default: a built-in text in several "
              "languages]")  # fmt: skip
@click.option("-f", "--file", type=click.Path(path_type=Path), help="Read the text from a file.")
@click.option("--tokens", default=256, show_default=True, metavar="N",
              type=click.IntRange(2, 8192),
              help="Compare on at most N tokens of the text.")  # fmt: skip
@click.option("-t", "--threads", type=click.IntRange(1), metavar="N",
              help="Number of threads.  [default: one per physical core]")  # fmt: skip
@click.option("--allow-pickle", is_flag=True, help="Accept pytorch_model.bin too.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def verify(source: str, models: tuple[Path, ...], **values: Any) -> None:
    """Compare GGUFs with their checkpoint: logits, most likely tokens, perplexity.

    SOURCE is the checkpoint: a folder or hf:owner/repo.  It runs in transformers, in 32 bits.
    The exit code is 1 if a model differs by more than its quantisation explains.
    """
    if values["text"] and values["file"]:
        raise click.UsageError("give --text or --file, not both")
    from swift_gguf.convert import checkpoint, converter
    from swift_gguf.convert.marks import without_marks
    from swift_gguf.convert.verify import TEXT, compare, reference
    from swift_gguf.gguf import check as gguf_check

    converter.require_packages()
    for path in models:
        gguf_check.check(path)  # first, because the checkpoint takes longer to load
    trust = {"allow_pickle": values["allow_pickle"], "trust_code": values["trust_remote_code"]}
    folder = checkpoint.fetch(checkpoint.look(source, **trust)).folder
    text = values["text"] or (read_text(values["file"]) if values["file"] else TEXT)
    with without_marks(folder) as readable:
        expected = reference(
            readable, text, n_tokens=values["tokens"], trust_code=values["trust_remote_code"]
        )
    found = [(path, compare(path, expected, n_threads=values["threads"])) for path in models]
    click.echo(
        json.dumps([_values(*pair) for pair in found])
        if values["as_json"]
        else "\n".join(_lines(*pair) for pair in found)
    )
    if any(comparison.failures for _, comparison in found):
        click.get_current_context().exit(1)


def _values(path: Path, comparison: Comparison) -> dict[str, Any]:
    failures = comparison.failures
    return {
        "model": str(path),
        **dataclasses.asdict(comparison),
        "failures": failures,
        "ok": not failures,
    }


def _lines(path: Path, found: Comparison) -> str:
    verdict = "; ".join(found.failures)
    return "\n".join(
        [
            f"{path}: {found.kind}, {found.bits:.2f} bits a weight",
            f"  logits      differ by {found.mean_difference:.2g} on average, "
            f"{found.max_difference:.2g} at most, over {found.n_tokens} tokens",
            f"  top token   the same at {found.agreement:.1%} of positions; "
            f"divergence {found.divergence:.2g} nats a token",
            f"  perplexity  {found.perplexity:.3f}; the checkpoint has "
            f"{found.reference_perplexity:.3f}",
            f"  FAILED: {verdict}" if verdict else f"  ok for {found.file_type}",
        ]
    )
