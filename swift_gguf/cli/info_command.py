"""`swift-gguf info`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swift_gguf.cli.help import examples, model_argument
from swift_gguf.cli.options import load_model, model_flags
from swift_gguf.subnetwork import format_layers

if TYPE_CHECKING:
    from swift_gguf.learning import Known
    from swift_gguf.model import Model, Sublayer
    from swift_gguf.planning.cost import Costs
    from swift_gguf.search.objective import Objective

BAR = 32  # characters
PLOTS = (".png", ".svg")


@click.command(
    epilog=examples(
        "swift-gguf info model.gguf",
        "swift-gguf info model.gguf --costs --plot costs.png",
        "swift-gguf info model.gguf --json | jq .learned",
    )
)
@model_argument
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--costs", "with_costs", is_flag=True,
              help="Show how long forward passes take on this machine; measures them if "
              "necessary.")  # fmt: skip
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), metavar="FILE.png",
              help="Draw the costs as a PNG or SVG file.")  # fmt: skip
@model_flags
def info(
    model: str, as_json: bool, with_costs: bool, plot_path: Path | None, **values: Any
) -> None:
    """Show a model's properties, and the layers that a draft can skip."""
    if plot_path:
        _require_plot(plot_path)
    with load_model(model, values) as loaded:
        costs = _costs(loaded) if with_costs or plot_path else None
        report = describe(loaded)
        if costs:
            report["costs"] = describe_costs(loaded, costs)
    if costs and plot_path:
        _plot(costs, plot_path)
    click.echo(json.dumps(report, ensure_ascii=False) if as_json else _table(report))


def _require_plot(path: Path) -> None:
    from swift_gguf.outputs import require_folder, require_matplotlib

    if path.suffix not in PLOTS:
        raise click.UsageError(f"--plot writes {' or '.join(PLOTS)} files, not {path.name}")
    require_folder(path)
    require_matplotlib()


def _costs(model: Model) -> Costs:
    """The costs from the model's profile.  If they are uncertain, measures and saves them."""
    from swift_gguf.learning import Learning

    learning = Learning(model, None)
    if not learning.is_measured:
        learning.measure_costs()
    return learning.costs


def describe(model: Model) -> dict[str, Any]:
    """Everything `info` shows.  Sizes are bytes; shares are of a one-token pass, 0 to 1."""
    from swift_gguf.native import library

    attention, ffn = model.sublayers
    cost = model.pass_cost(n_kv=0)
    return {
        "path": str(model.path),
        "name": model.metadata("general.name"),
        "architecture": model.metadata("general.architecture"),
        "description": model.description,
        "parameters": model.n_params,
        "bytes": model.n_bytes,
        "layers": model.n_layer,
        "vocabulary": model.n_vocab,
        "context": model.n_ctx,
        "context_trained": model.n_ctx_train,
        "chat_template": model.metadata("tokenizer.chat_template") is not None,
        "rollback_refusal": model.rollback_refusal,
        "backend": _backend(model),
        "threads": model.n_threads,
        "llama_cpp_commit": library().llama_commit,
        "pass": {
            "weight_bytes": cost.weight_bytes,
            "head_bytes": cost.head_bytes,
            "nodes": cost.n_nodes,
            "splits": cost.n_splits,
        },
        "sublayers": [
            {
                kind: {
                    "status": sublayer.status,
                    "weight_bytes": sublayer.weight_bytes,
                    "share": sublayer.weight_bytes / cost.weight_bytes
                    if cost.weight_bytes
                    else 0.0,
                }
                for kind, sublayer in (("attention", attention[i]), ("ffn", ffn[i]))
            }
            for i in range(model.n_layer)
        ],
        "learned": _learned(model),
    }


def describe_costs(model: Model, costs: Costs) -> dict[str, Any]:
    """How long passes take on this machine, and how many bytes they read.

    "passes": the time of a pass by width.  "parts": the parts of a one-token pass; they add up to
    it.  "more": costs on top of a pass.  Bytes are those of the weights and of the KV cache at
    `costs.n_kv` tokens; a gigabyte is 10^9 bytes.
    """
    one_ms = costs.verify_ms(1)
    cost = model.pass_cost(n_kv=costs.n_kv)
    attention, ffn = model.sublayers
    parts = {
        "attention": (sum(costs.attention_ms), _bytes(attention, model, costs.n_kv)),
        "FFN": (sum(costs.ffn_ms), _bytes(ffn, model, costs.n_kv)),
        "head": (costs.head_ms, float(cost.head_bytes)),
    }
    all_ms, all_bytes = (sum(part[i] for part in parts.values()) for i in (0, 1))
    rest_bytes = cost.weight_bytes + cost.kv_bytes - all_bytes
    parts["rest"] = (max(0.0, one_ms - all_ms), max(0.0, rest_bytes))
    return {
        "machine": model.machine_key,
        "n_kv": costs.n_kv,
        "passes": [
            {"width": width, "ms": ms, "of_one": ms / one_ms, "ms_per_token": ms / width}
            for width, ms in costs.pass_ms
        ],
        "parts": [
            {
                "name": name,
                "ms": ms,
                "share": ms / one_ms,
                "bytes": n_bytes,
                "ms_per_gb": 1e9 * ms / n_bytes if n_bytes else None,
            }
            for name, (ms, n_bytes) in parts.items()
        ],
        "more": [
            {"name": name, "ms": ms, "share": ms / one_ms}
            for name, ms in (("row of logits", costs.row_ms), ("graph switch", costs.switch_ms))
        ],
        "measured": costs.as_dict(),
    }


def _bytes(sublayers: Sequence[Sublayer], model: Model, n_kv: int) -> float:
    """Bytes that a one-token pass reads for those sub-layers that can be skipped."""
    return sum(
        sublayer.weight_bytes + sublayer.kv_bytes * n_kv / model.n_ctx
        for sublayer in sublayers
        if sublayer.status == "ok"
    )


def _learned(model: Model) -> dict[str, Any] | None:
    """The model's profile, best drafts first; None if there is no profile yet."""
    from swift_gguf.gguf.identity import profile_key
    from swift_gguf.learning import Store
    from swift_gguf.planning.cost import stored_costs
    from swift_gguf.search.objective import Objective

    profile = Store().load(profile_key(model.path, model.sidecar.path if model.sidecar else None))
    if profile is None:
        return None
    costs = stored_costs(model, profile.costs)
    objective = Objective(costs=costs) if costs else None
    return {
        "search_s": profile.search_s,
        "evaluations": profile.evaluations,
        "subnetworks": [
            {
                "skip_attn": format_layers(item.subnetwork.skip_attn),
                "skip_ffn": format_layers(item.subnetwork.skip_ffn),
                "narrow_ffn": format_layers(item.subnetwork.narrow_ffn),
                "draft_head": item.subnetwork.draft_head,
                "agreement": item.agreement,
                "positions": item.positions,
                "predicted_speedup": objective and _speedup(item, objective),
            }
            for item in profile.known
        ],
        "costs": dict(profile.costs),
    }


def _backend(model: Model) -> str:
    from swift_gguf.native import library

    use_gpu = model.options.n_gpu_layers != 0
    device = next(d for d in library().devices() if use_gpu or not d.is_gpu)
    return f"{device.name} ({device.description})"


def _table(report: dict[str, Any]) -> str:
    rows = [
        ("model", report["name"] or report["path"]),
        ("architecture", f"{report['architecture']}, {report['layers']} layers"),
        ("quantisation", f"{report['description']}, {report['bytes'] / 1e6:.0f} MB"),
        ("parameters", f"{report['parameters'] / 1e6:.0f} M"),
        ("context", f"{report['context']} tokens (trained for {report['context_trained']})"),
        ("chat template", "yes" if report["chat_template"] else "no (base model: use --raw)"),
        ("backend", f"{report['backend']}, {report['threads']} threads"),
        ("llama.cpp", report["llama_cpp_commit"][:9]),
        ("speculation", report["rollback_refusal"] or "possible"),
    ]
    lines = [f"{name:<14}{value}" for name, value in rows]
    total = report["pass"]["weight_bytes"]
    head = report["pass"]["head_bytes"] / total
    lines += [
        "",
        f"a one-token forward pass reads {total / 1e6:.0f} MB of weights, {head:.1%} in the head:",
        "",
    ]
    lines.append("layer  attention      FFN")
    for i, layer in enumerate(report["sublayers"]):
        cells = [
            f"{part['share']:6.1%}" if part["status"] == "ok" else part["status"]
            for part in (layer["attention"], layer["ffn"])
        ]
        lines.append(f"{i:5}  {cells[0]:>9}  {cells[1]:>9}")
    sums = [
        sum(layer[kind]["share"] for layer in report["sublayers"]) for kind in ("attention", "ffn")
    ]
    lines.append(f"  all  {sums[0]:9.1%}  {sums[1]:9.1%}")
    lines += ["", *_learned_lines(report["learned"])]
    if "costs" in report:
        lines += ["", *_costs_lines(report["costs"])]
    return "\n".join(lines)


def _costs_lines(costs: dict[str, Any]) -> list[str]:
    most = max(item["ms"] for item in costs["passes"])
    return [
        f"forward passes here ({costs['machine']}), {costs['n_kv']} tokens in the KV cache:",
        "",
        "width        ms   of one  ms/token",
        *(
            f"{item['width']:5}{item['ms']:10.2f}{item['of_one']:8.2f}x{item['ms_per_token']:10.2f}"
            f"  {'#' * round(BAR * item['ms'] / most)}"
            for item in costs["passes"]
        ),
        "",
        "of one token       ms   share     ms/GB",
        *(
            f"{item['name']:<11}{item['ms']:10.2f}{item['share']:8.1%}{_rate(item['ms_per_gb'])}"
            for item in costs["parts"]
        ),
        "on top",
        *(f"{item['name']:<13}{item['ms']:8.2f}{item['share']:8.1%}" for item in costs["more"]),
    ]


def _plot(costs: Costs, path: Path) -> None:
    """Two panels: what a pass takes by its width, and a token of it."""
    from swift_gguf.outputs import panels

    figure, (whole, each) = panels(2)
    widths = [width for width, _ in costs.pass_ms]
    whole.plot(widths, [ms for _, ms in costs.pass_ms], marker="o")
    each.plot(widths, [ms / width for width, ms in costs.pass_ms], marker="o")
    for panel, of in ((whole, "pass"), (each, "token")):
        panel.set_ylim(bottom=0)
        panel.set(xlabel="tokens in a pass", ylabel=f"ms a {of}")
    figure.savefig(path)


def _rate(ms_per_gb: float | None) -> str:
    return f"{ms_per_gb:10.1f}" if ms_per_gb is not None else f"{'-':>10}"


def _learned_lines(learned: dict[str, Any] | None) -> list[str]:
    if learned is None or not (learned["evaluations"] or learned["subnetworks"]):
        return ["nothing learned yet: `swift-gguf tune` finds the layers that drafts can skip"]
    head = (
        f"learned from {learned['evaluations']} drafts scored in {learned['search_s']:.0f} s "
        "(`swift-gguf tune --reset` deletes it)"
    )
    if not learned["subnetworks"]:
        return [head]
    rows = [
        f"{_times(item['predicted_speedup'])}  {item['agreement']:5.0%} of {item['positions']:4}  "
        f"attention {item['skip_attn'] or '-'}; FFN {item['skip_ffn'] or '-'}"
        for item in learned["subnetworks"]
    ]
    return [head, "predicted   agreement      skipped", *rows]


def _speedup(known: Known, objective: Objective) -> float:
    outcomes = [seen.outcome() for seen in known.seen.values()]
    return objective.rate(known.subnetwork, outcomes).speedup


def _times(speedup: float | None) -> str:
    return f"{speedup:8.2f}x" if speedup is not None else "        ?"
