"""`swift-gguf convert`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swift_gguf.cli.help import examples
from swift_gguf.hub.progress import download_progress

if TYPE_CHECKING:
    from swift_gguf.convert.checkpoint import Checkpoint
    from swift_gguf.convert.plan import Plan
    from swift_gguf.convert.run import Conversion, ConvertOptions
    from swift_gguf.convert.steps import Report
    from swift_gguf.learning import Profile


@click.command(
    epilog=examples(
        "swift-gguf convert ./SmolLM2-135M-Instruct --quantize Q4_K_M",
        "swift-gguf convert hf:owner/repo -o model.gguf --quantize IQ3_XXS --imatrix auto",
        "swift-gguf convert ./checkpoint -o model.gguf --quantize Q4_0 --prepare --tune",
    )
)
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE",
              help="[default: here, SOURCE-TYPE.gguf]")  # fmt: skip
@click.option("--quantize", metavar="TYPE",
              help="Q4_K_M, Q8_0, IQ4_XS, ...  [default: not at all]")  # fmt: skip
@click.option("--list-types", is_flag=True, is_eager=True, expose_value=False,
              callback=lambda ctx, _, value: _list_types(ctx) if value else None,
              help="Show every TYPE, and stop.")  # fmt: skip
@click.option("--outtype", type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
              help="What is quantised, or the result if nothing is.  [default: 16 bits, as the "
              "checkpoint has them]")  # fmt: skip
@click.option("--output-tensor-type", metavar="TYPE", help="Of the LM head.")
@click.option("--token-embedding-type", metavar="TYPE")
@click.option("--tensor-type", "overrides", multiple=True, metavar="PATTERN=TYPE",
              help="Of tensors in whose name the regular expression is found.")  # fmt: skip
@click.option("--leave-output-tensor", is_flag=True, help="Do not quantise the LM head.")
@click.option("--pure", is_flag=True, help="All tensors in one type, none at more bits.")
@click.option("--imatrix", metavar="FILE|auto",
              help="Which columns matter: from llama-imatrix, or by own answers.")  # fmt: skip
@click.option("--calibration-tokens", metavar="N", type=click.IntRange(1),
              help="Of own answers.  [default: 6000; 12000 for --prepare]")  # fmt: skip
@click.option("--sort-neurons", is_flag=True,
              help="Put neurons of FFNs in order of importance; changes no answer.")  # fmt: skip
@click.option("--keep-intermediate", is_flag=True, help="Keep what was quantised, too.")
@click.option("--model-name", metavar="NAME", help="[default: the checkpoint's]")
@click.option("--prepare", "prepares", is_flag=True,
              help="Then derive draft weights (`swift-gguf prepare`).")  # fmt: skip
@click.option("--tune", "tunes", is_flag=True, help="Then find good drafts (`swift-gguf tune`).")
@click.option("--minutes", default=1.0, show_default=True, metavar="M",
              type=click.FloatRange(0, min_open=True), help="For --tune.")  # fmt: skip
@click.option("--embed-profile", is_flag=True,
              help="Write what --tune found into the model, for whoever gets it.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be written, and stop.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--allow-pickle", is_flag=True, help="Take pytorch_model.bin, too.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoint brings.")
@click.option("-t", "--threads", type=click.IntRange(1), metavar="N")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def convert(source: str, **values: Any) -> None:
    """Make a GGUF of a Hugging Face checkpoint: a folder, or hf:owner/repo.

    Nothing is under the final name before it is whole.  Ctrl-C ends it; the same command goes on
    later with the step it was at.
    """
    if values["embed_profile"] and not values["tunes"]:
        raise click.UsageError("--embed-profile writes down what --tune finds; give both")
    from swift_gguf.convert import checkpoint, converter
    from swift_gguf.convert.run import Conversion

    converter.require_packages()
    trust = {"allow_pickle": values["allow_pickle"], "trust_code": values["trust_remote_code"]}
    found = checkpoint.look(source, **trust)
    converter.require_convertible(found, converter.find())  # before weights are fetched
    if not values["dry_run"]:
        with download_progress() as progress:
            found = checkpoint.fetch(found, progress=progress)
    options = _options(found, values)
    out = values["output"] or Path(_default_name(source, options))
    conversion = Conversion(found, out, options)
    if values["dry_run"]:
        _show_plan(conversion, as_json=values["as_json"])
        return
    there = [path for path in (out, conversion.kept) if path and path.exists()]
    if there and not conversion.is_done and not values["force"]:
        raise click.ClickException(f"{there[0]} exists; give --force to replace it, or another -o")
    start = time.monotonic()
    # what other commands say is no part of our JSON
    with conversion, redirect_stdout(sys.stderr if values["as_json"] else sys.stdout):
        if not conversion.is_done:
            click.echo(_plan_line(found, conversion.plan), err=True)
            _write(conversion, values)
            click.echo(_result_line(conversion, time.monotonic() - start))
        _make_fast(out, values)
        conversion.forget()
    if values["as_json"]:
        click.echo(json.dumps(_result(conversion, time.monotonic() - start)))


def _write(conversion: Conversion, values: dict[str, Any]) -> None:
    """The model, and in it what was learned of it if that is wanted."""
    from dataclasses import replace

    from swift_gguf.gguf.identity import fingerprint
    from swift_gguf.learning import EMBEDDED, Store, portable

    with _display() as report:
        path = conversion.run(report)
    profile = _tuned(path, values) if values["embed_profile"] else None
    conversion.finish({EMBEDDED: portable(profile)} if profile else {})
    if profile:  # with the keys it is another file
        Store().add(replace(profile, fingerprint=fingerprint(conversion.out)))
        Store().forget(profile.fingerprint)


def _list_types(context: click.Context) -> None:
    from swift_gguf.native.convert import NEED_IMATRIX, file_types

    for name in sorted(file_types()):
        click.echo(name + ("  (needs --imatrix)" if name in NEED_IMATRIX else ""))
    context.exit()


def _options(checkpoint: Checkpoint, values: dict[str, Any]) -> ConvertOptions:
    from swift_gguf.convert.run import N_TOKENS, ConvertOptions
    from swift_gguf.native.convert import Quantization

    imatrix = values["imatrix"]
    quantization = None
    if values["quantize"]:
        quantization = Quantization(
            name=values["quantize"].upper(),
            output_tensor_type=values["output_tensor_type"],
            token_embedding_type=values["token_embedding_type"],
            overrides=tuple(map(_override, values["overrides"])),
            pure=values["pure"],
            leave_output_tensor=values["leave_output_tensor"],
        )
    return ConvertOptions(
        quantization=quantization,
        outtype=values["outtype"] or checkpoint.outtype,
        imatrix=Path(imatrix) if imatrix not in (None, "auto") else None,
        auto_imatrix=imatrix == "auto",
        calibration_tokens=values["calibration_tokens"] or N_TOKENS,
        sort_neurons=values["sort_neurons"],
        keep_intermediate=values["keep_intermediate"],
        name=values["model_name"],
        prepares=values["prepares"],
        embeds=values["embed_profile"],
        n_threads=values["threads"],
    )


def _override(text: str) -> tuple[str, str]:
    pattern, equals, name = text.rpartition("=")
    if not (pattern and equals and name):
        raise click.UsageError(f"--tensor-type {text}: write PATTERN=TYPE, as in ffn_down=q6_k")
    return pattern, name


def _default_name(source: str, options: ConvertOptions) -> str:
    name = Path(source.removeprefix("hf:")).expanduser().resolve().name
    kind = options.quantization.name if options.quantization else options.outtype.upper()
    return f"{name}-{kind}.gguf"


# -- what comes after ------------------------------------------------------------------------------


def _tuned(path: Path, values: dict[str, Any]) -> Profile | None:
    """What tuning finds without a sidecar, which is no part of the model."""
    from swift_gguf.gguf.identity import fingerprint
    from swift_gguf.learning import Store

    _tune(path, values, sidecar="none")
    profile = Store().load(fingerprint(path))
    if profile is None or not profile.known:
        click.echo("nothing was found to embed", err=True)
        return None
    return profile


def _make_fast(out: Path, values: dict[str, Any]) -> None:
    """The sidecar and the profile, where they are wanted."""
    from swift_gguf.cli.prepare_command import prepare

    if values["prepares"]:
        given = {"threads": values["threads"], "tokens": values["calibration_tokens"]}
        extra = {name: value for name, value in given.items() if value}
        click.get_current_context().invoke(prepare, model=str(out), minutes=0.0, **extra)
    if values["tunes"] and (values["prepares"] or not values["embed_profile"]):
        _tune(out, values, sidecar=None)


def _tune(path: Path, values: dict[str, Any], *, sidecar: str | None) -> None:
    from swift_gguf.cli.tune_command import tune

    threads = {"threads": values["threads"]} if values["threads"] else {}
    click.get_current_context().invoke(
        tune, model=str(path), minutes=values["minutes"], sidecar=sidecar, as_json=False, **threads
    )


# -- what is said ----------------------------------------------------------------------------------


def _plan_line(checkpoint: Checkpoint, plan: Plan) -> str:
    from swift_gguf.convert.plan import readable

    what = f"{checkpoint.architecture}, {checkpoint.n_params / 1e6:,.0f}M weights"
    sizes = [f"model {readable(plan.model)}"]
    if plan.quantizes:
        sizes.insert(0, f"intermediate {readable(plan.intermediate)}")
    if plan.sidecar:
        sizes.append(f"draft weights {readable(plan.sidecar)}")
    return f"{what}; about: {', '.join(sizes)}"


def _show_plan(conversion: Conversion, *, as_json: bool) -> None:
    import shutil

    from swift_gguf.convert.plan import readable

    checkpoint, plan = conversion.checkpoint, conversion.plan
    free = shutil.disk_usage(plan.folder).free if plan.folder.is_dir() else 0
    if as_json:
        values = {
            "architecture": checkpoint.architecture,
            "n_params": checkpoint.n_params,
            "checkpoint_bytes": checkpoint.n_bytes,
            "intermediate_bytes": plan.intermediate if plan.quantizes else 0,
            "model_bytes": plan.model,
            "sidecar_bytes": plan.sidecar,
            "needed_bytes": plan.needed,
            "free_bytes": free,
            "output": str(conversion.out),
        }
        click.echo(json.dumps(values))
        return
    nearly = "" if checkpoint.tensors else "about "
    click.echo(
        f"{checkpoint.name}: {checkpoint.architecture}, "
        f"{nearly}{checkpoint.n_params / 1e6:,.0f}M weights in {len(checkpoint.parts)} files, "
        f"{readable(checkpoint.n_bytes)}"
    )
    if plan.quantizes:
        click.echo(f"  meanwhile  {conversion.work}  about {readable(plan.intermediate)}")
    click.echo(f"  {conversion.out}  about {readable(plan.model)}")
    if plan.sidecar:
        click.echo(f"  draft weights beside it  at most {readable(plan.sidecar)}")
    verdict = "enough" if free >= plan.needed else "too little"
    click.echo(f"needs {readable(plan.needed)}, {readable(free)} are free: {verdict}")
    if free < plan.needed:
        raise click.exceptions.Exit(1)


def _result_line(conversion: Conversion, seconds: float) -> str:
    from swift_gguf.convert.plan import readable

    line = f"wrote {conversion.out}, {readable(conversion.out.stat().st_size)}, in {seconds:.0f} s"
    if not conversion.peak_bytes:
        return line
    steps = "converting and quantizing" if conversion.plan.quantizes else "converting"
    return (
        f"{line}; {steps} took at most {readable(conversion.peak_bytes)} of memory (largest file "
        f"of the checkpoint: {readable(conversion.checkpoint.largest_part)})"
    )


def _result(conversion: Conversion, seconds: float) -> dict[str, Any]:
    return {
        "output": str(conversion.out),
        "bytes": conversion.out.stat().st_size,
        "architecture": conversion.checkpoint.architecture,
        "seconds": round(seconds, 1),
        "peak_bytes": conversion.peak_bytes,
        "largest_part_bytes": conversion.checkpoint.largest_part,
    }


@contextmanager
def _display() -> Iterator[Report]:
    """A bar for every step, in bytes where it writes some; on a pipe a line for every step."""
    if not sys.stderr.isatty():
        last = ""

        def line(what: str, done: int, total: int, unit: str, /) -> None:
            nonlocal last
            if what != last:
                last = what
                click.echo(what, err=True)

        yield line
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.TextColumn("{task.fields[shown]}"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        tasks: dict[str, rich.TaskID] = {}

        def show(what: str, done: int, total: int, unit: str, /) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[what] = bar.add_task(what, total=total, shown="")
            bar.update(tasks[what], completed=done, total=total, shown=_amount(done, total, unit))

        yield show


def _amount(done: int, total: int, unit: str) -> str:
    from swift_gguf.convert.plan import readable

    if unit == "bytes":
        return f"{readable(done)} of {readable(total)}"
    return f"{done} of {total} {unit}"
