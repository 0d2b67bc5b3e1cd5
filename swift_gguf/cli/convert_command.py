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
              help="File to write.  [default: SOURCE-TYPE.gguf in the current folder]")  # fmt: skip
@click.option("--quantize", metavar="TYPE",
              help="Quantise to this type: Q4_K_M, Q8_0, IQ4_XS, ...  [default: do not "
              "quantise]")  # fmt: skip
@click.option("--list-types", is_flag=True, is_eager=True, expose_value=False,
              callback=lambda ctx, _, value: _list_types(ctx) if value else None,
              help="List all types, and stop.")  # fmt: skip
@click.option("--outtype", type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
              help="Type of the result, or of the file that is quantised.  [default: the "
              "checkpoint's 16-bit type]")  # fmt: skip
@click.option("--output-tensor-type", metavar="TYPE", help="Type of the LM head.")
@click.option("--token-embedding-type", metavar="TYPE",
              help="Type of the token embeddings.")  # fmt: skip
@click.option("--tensor-type", "overrides", multiple=True, metavar="PATTERN=TYPE",
              help="Type of tensors whose names match the regular expression; may be "
              "repeated.")  # fmt: skip
@click.option("--leave-output-tensor", is_flag=True, help="Do not quantise the LM head.")
@click.option("--pure", is_flag=True, help="Use one type for all tensors.")
@click.option("--imatrix", metavar="FILE|auto",
              help="Importance matrix: a file from llama-imatrix, or auto to compute one from the "
              "model's own answers.")  # fmt: skip
@click.option("--calibration-tokens", metavar="N", type=click.IntRange(1),
              help="Number of tokens for --imatrix auto and --prepare.  [default: 6000; 12000 "
              "for --prepare]")  # fmt: skip
@click.option("--keep-intermediate", is_flag=True, help="Keep the unquantised file.")
@click.option("--model-name", metavar="NAME",
              help="Name in the model's metadata.  [default: the checkpoint's]")  # fmt: skip
@click.option("--prepare", "prepares", is_flag=True,
              help="Afterwards make draft weights (`swift-gguf prepare`).")  # fmt: skip
@click.option("--tune", "tunes", is_flag=True,
              help="Afterwards find good drafts (`swift-gguf tune`).")  # fmt: skip
@click.option("--minutes", default=1.0, show_default=True, metavar="M",
              type=click.FloatRange(0, min_open=True), help="Minutes for --tune.")  # fmt: skip
@click.option("--embed-profile", is_flag=True,
              help="Store the result of --tune in the model file.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show what would be written, and stop.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--allow-pickle", is_flag=True, help="Accept pytorch_model.bin too.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the checkpoint.")
@click.option("-t", "--threads", type=click.IntRange(1), metavar="N",
              help="Number of threads.  [default: one per physical core]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def convert(source: str, **values: Any) -> None:
    """Convert a Hugging Face checkpoint to GGUF.

    SOURCE is a folder or hf:owner/repo.  The output file appears when it is complete.  Ctrl-C
    stops; the same command resumes at the step where it stopped.
    """
    if values["embed_profile"] and not values["tunes"]:
        raise click.UsageError("--embed-profile stores the result of --tune; give both")
    from swift_gguf.convert import checkpoint, converter
    from swift_gguf.convert.run import Conversion

    converter.require_packages()
    trust = {"allow_pickle": values["allow_pickle"], "trust_code": values["trust_remote_code"]}
    found = checkpoint.look(source, **trust)
    converter.require_convertible(found, converter.find())  # before the weights are downloaded
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
    # the output of the other commands must not mix with the JSON
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
    """Writes the model; with --embed-profile, tunes it and stores the profile in it."""
    from dataclasses import replace

    from swift_gguf.gguf.identity import fingerprint
    from swift_gguf.learning import EMBEDDED, Store, portable

    with _display() as report:
        path = conversion.run(report)
    profile = _tuned(path, values) if values["embed_profile"] else None
    conversion.finish({EMBEDDED: portable(profile)} if profile else {})
    if profile:  # the stored profile changes the file, and so its fingerprint
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


# -- tuning and draft weights ----------------------------------------------------------------------


def _tuned(path: Path, values: dict[str, Any]) -> Profile | None:
    """The profile from a tuning without the sidecar, which is not part of the model file."""
    from swift_gguf.gguf.identity import fingerprint
    from swift_gguf.learning import Store

    _tune(path, values, sidecar="none")
    profile = Store().load(fingerprint(path))
    if profile is None or not profile.known:
        click.echo("tuning found nothing to store in the model", err=True)
        return None
    return profile


def _make_fast(out: Path, values: dict[str, Any]) -> None:
    """Runs `prepare` and `tune` as the flags ask."""
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


# -- output ----------------------------------------------------------------------------------------


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
        click.echo(f"  temporary  {conversion.work}  about {readable(plan.intermediate)}")
    click.echo(f"  {conversion.out}  about {readable(plan.model)}")
    if plan.sidecar:
        click.echo(f"  draft weights beside it  at most {readable(plan.sidecar)}")
    verdict = "enough" if free >= plan.needed else "not enough"
    click.echo(f"needs {readable(plan.needed)}; {readable(free)} free: {verdict}")
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
    """A progress bar for each step; without a terminal, a line for each step."""
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
