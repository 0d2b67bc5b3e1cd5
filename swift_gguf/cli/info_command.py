"""`swift-gguf info`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from swift_gguf.cli.options import load_model, model_flags
from swift_gguf.subnetwork import format_layers

if TYPE_CHECKING:
    from swift_gguf.model import Model
    from swift_gguf.profile import Known
    from swift_gguf.search.objective import Objective


@click.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@model_flags
def info(model: str, as_json: bool, **values: Any) -> None:
    """Show what a model is, and which of its sub-layers a draft can leave out."""
    with load_model(model, values) as loaded:
        report = describe(loaded)
    click.echo(json.dumps(report, ensure_ascii=False) if as_json else _table(report))


def describe(model: Model) -> dict[str, Any]:
    """Everything `info` shows; sizes in bytes, shares of a one-token pass from 0 to 1."""
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


def _learned(model: Model) -> dict[str, Any] | None:
    """What the profile holds, the best first; None if nothing was learned yet."""
    from swift_gguf.cost import Costs, machine_key
    from swift_gguf.profile import Store, fingerprint
    from swift_gguf.search.objective import Objective

    profile = Store().load(fingerprint(model.path))
    if profile is None:
        return None
    costs = profile.costs.get(machine_key(model))
    objective = Objective(costs=Costs.from_dict(costs)) if costs is not None else None
    return {
        "search_s": profile.search_s,
        "evaluations": profile.evaluations,
        "subnetworks": [
            {
                "skip_attn": format_layers(item.subnetwork.skip_attn),
                "skip_ffn": format_layers(item.subnetwork.skip_ffn),
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
        ("chat template", "yes" if report["chat_template"] else "no (a base model: use --raw)"),
        ("backend", f"{report['backend']}, {report['threads']} threads"),
        ("llama.cpp", report["llama_cpp_commit"][:9]),
        ("speculation", report["rollback_refusal"] or "possible"),
    ]
    lines = [f"{name:<14}{value}" for name, value in rows]
    total = report["pass"]["weight_bytes"]
    head = report["pass"]["head_bytes"] / total
    lines += [
        "",
        f"a pass over one token reads {total / 1e6:.0f} MB of weights, the head {head:.1%}:",
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
    return "\n".join(lines)


def _learned_lines(learned: dict[str, Any] | None) -> list[str]:
    if learned is None:
        return ["nothing learned yet: `swift-gguf tune` finds what drafts can leave out"]
    head = (
        f"learned from {learned['evaluations']} drafts scored in {learned['search_s']:.0f} s "
        "(`swift-gguf tune --reset` forgets it)"
    )
    if not learned["subnetworks"]:
        return [head]
    rows = [
        f"{_times(item['predicted_speedup'])}  {item['agreement']:5.0%} of {item['positions']:4}  "
        f"attention {item['skip_attn'] or '-'}; FFN {item['skip_ffn'] or '-'}"
        for item in learned["subnetworks"]
    ]
    return [head, "predicted   agreement      left out", *rows]


def _speedup(known: Known, objective: Objective) -> float:
    outcomes = [seen.outcome() for seen in known.seen.values()]
    return objective.rate(known.subnetwork, outcomes).speedup


def _times(speedup: float | None) -> str:
    return f"{speedup:8.2f}x" if speedup is not None else "        ?"
