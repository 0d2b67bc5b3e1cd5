"""Compares a GGUF with its checkpoint: llama.cpp and transformers run the same text.

Both decode the token ids of the checkpoint's tokenizer, and their logits are compared.  If the
GGUF's tokenizer gives other ids for the text, that is a separate failure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swift_gguf.convert import plan
from swift_gguf.errors import ConvertError
from swift_gguf.gguf import header as gguf_header
from swift_gguf.model import Model, ModelOptions
from swift_gguf.native.convert import file_types
from swift_gguf.text import encode

Floats = NDArray[np.float32]
N_TOKENS = 256
BATCH = 64

TEXT = """\
The lighthouse keeper had counted the steps every evening for thirty years: two hundred and twelve
from the kitchen to the lamp. Tonight there were two hundred and thirteen. He stopped on the last of
them and listened. Below, the sea was doing what it always did, and the wind was no worse than it
had been in March, when the windows broke. "You are getting old," he said to himself, and lit the
lamp.

def count_steps(tower, since=1994):
    \"\"\"How many steps were climbed, one evening at a time.\"\"\"
    return sum(day.steps for day in tower.log if day.year >= since)

Die Küstenwache meldete um 21:40 Uhr leichten Nebel. Le gardien n'avait pas vu de bateau depuis
trois jours. 灯台の光は二十海里先まで届く。Маяк светил до самого утра, and nobody asked why.

To compute the distance to the horizon in kilometres, multiply the square root of the height in
metres by 3.57: from 64 metres one sees 28.56 km far.
"""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a GGUF may differ from its checkpoint."""

    divergence: float
    """Maximum of the mean KL divergence from the checkpoint's distribution, in nats per token."""
    agreement: float
    """Minimum share of positions with the same most likely token."""


# About twice the values of SmolLM2 135M, which was quantised before (see docs/convert.md).  Larger
# models differ less; broken ones differ more.
_LIMITS = {
    "F16": Limits(divergence=1e-5, agreement=0.98),
    "Q8_0": Limits(divergence=0.0125, agreement=0.87),
    "Q6_K": Limits(divergence=0.035, agreement=0.83),
    "Q5_K_M": Limits(divergence=0.25, agreement=0.66),
    "Q4_K_M": Limits(divergence=0.165, agreement=0.73),
    "Q4_0": Limits(divergence=0.85, agreement=0.42),
    "Q3_K_M": Limits(divergence=0.36, agreement=0.53),
    "Q2_K": Limits(divergence=1.3, agreement=0.36),
    "IQ2_XS": Limits(divergence=1.4, agreement=0.36),
}
# For file types without measured values: by bits per weight of the main type.
_LIMITS_BY_BITS = (
    (24.0, Limits(divergence=1e-5, agreement=0.99)),
    (12.0, Limits(divergence=0.001, agreement=0.97)),
    (8.0, Limits(divergence=0.015, agreement=0.88)),
    (6.0, Limits(divergence=0.04, agreement=0.82)),
    (5.0, Limits(divergence=0.25, agreement=0.68)),
    (4.0, Limits(divergence=0.85, agreement=0.45)),
    (3.0, Limits(divergence=1.2, agreement=0.40)),
    (0.0, Limits(divergence=4.0, agreement=0.10)),
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The differences between a GGUF and its checkpoint on the same text."""

    kind: str
    """llama.cpp's name of the architecture, size and quantisation."""
    file_type: str
    """For example ``Q4_K_M``."""
    bits: float
    """Mean bits per weight."""
    n_tokens: int
    max_difference: float
    """Between logits."""
    mean_difference: float
    divergence: float
    agreement: float
    perplexity: float
    reference_perplexity: float
    same_tokens: bool
    """True if both tokenizers give the same ids."""

    @property
    def limits(self) -> Limits:
        if self.file_type in _LIMITS:
            return _LIMITS[self.file_type]
        named = self.file_type in file_types()
        size = plan.bits(self.file_type) if named else self.bits
        return next(limits for bits, limits in _LIMITS_BY_BITS if size >= bits)

    @property
    def failures(self) -> list[str]:
        """The differences that are larger than this quantisation explains."""
        limits, found = self.limits, []
        if not self.same_tokens:
            found.append("its tokenizer gives other token ids")
        if not self.divergence <= limits.divergence:
            over = f"above the limit of {limits.divergence:g}"
            found.append(f"the KL divergence is {self.divergence:.2g} nats, {over}")
        if not self.agreement >= limits.agreement:
            under = f"below the limit of {limits.agreement:.0%}"
            found.append(f"the most likely token agrees at {self.agreement:.1%}, {under}")
        return found


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The checkpoint's logits on a text."""

    text: str
    tokens: Sequence[int]
    logits: Floats
    """[n_tokens, n_vocab]."""


def reference(
    folder: Path, text: str = TEXT, *, n_tokens: int = N_TOKENS, trust_code: bool = False
) -> Reference:
    """Runs a checkpoint through transformers, in 32 bits on the CPU.

    Raises:
        ConvertError: transformers cannot load it.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"trust_remote_code": trust_code, "local_files_only": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", **options
        )
    except Exception as error:  # of a dozen kinds, most of them ValueError or OSError
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ConvertError(f"transformers cannot load {folder} ({why})") from error
    tokens = list(tokenizer(text)["input_ids"])[:n_tokens]
    if len(tokens) < 2:
        raise ConvertError("the text is too short; give at least two tokens")
    model.eval()
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0].float().numpy()
    return Reference(text=text, tokens=tokens, logits=logits)


def compare(
    path: Path,
    expected: Reference,
    *,
    n_threads: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Runs a GGUF on the same tokens and compares the logits.

    Raises:
        ModelError: the GGUF cannot be loaded; ConvertError: its vocabulary is too small.
    """
    n = len(expected.tokens)
    header = gguf_header.read(path)
    options = ModelOptions(
        n_ctx=n + 1,
        n_batch=BATCH,
        n_threads=n_threads,
        flash_attn=False,
        exact_kv=True,
        sidecar=None,
    )
    tally = _Tally()
    with Model(path, options) as model:
        n_vocab = min(expected.logits.shape[1], model.n_vocab)
        if max(expected.tokens) >= n_vocab:
            raise ConvertError(
                f"{path} has a vocabulary of {n_vocab} tokens, but the checkpoint has more; is it "
                "the right checkpoint?"
            )
        mine = encode(model, expected.text)
        kind = model.description
        for start in range(0, n, BATCH):
            piece = expected.tokens[start : start + BATCH]
            model.decode(piece, n_outputs=len(piece))
            for row in range(len(piece)):
                at = start + row
                following = expected.tokens[at + 1] if at + 1 < n else None
                logits = model.logits(row)[:n_vocab]
                tally.add(expected.logits[at, :n_vocab], logits, following)
            report(start + len(piece), n)
    return Comparison(
        kind=kind,
        file_type=_file_type(header),
        bits=_bits(header),
        n_tokens=n,
        max_difference=tally.largest,
        mean_difference=tally.difference / n,
        divergence=tally.divergence / n,
        agreement=tally.agreeing / n,
        perplexity=float(np.exp(tally.surprise[1] / (n - 1))),
        reference_perplexity=float(np.exp(tally.surprise[0] / (n - 1))),
        same_tokens=mine[:n] == list(expected.tokens),
    )


class _Tally:
    """Sums over positions."""

    def __init__(self) -> None:
        self.largest = self.difference = self.divergence = 0.0
        self.agreeing = 0
        self.surprise = np.zeros(2)

    def add(self, theirs: Floats, ours: Floats, following: int | None) -> None:
        """Adds one position: logits [n_vocab], and the next token of the text."""
        apart = np.abs(theirs - ours)
        self.largest = max(self.largest, float(apart.max()))
        self.difference += float(apart.mean())
        p, q = _log_softmax(theirs), _log_softmax(ours)
        self.divergence += float(np.sum(np.exp(p) * (p - q)))
        self.agreeing += int(theirs.argmax() == ours.argmax())
        if following is not None:
            self.surprise -= p[following], q[following]


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def _file_type(header: gguf_header.Header) -> str:
    number = header.metadata.get("general.file_type")
    return next((name for name, value in file_types().items() if value == number), "unknown")


def _bits(header: gguf_header.Header) -> float:
    """Mean bits per weight of the matrices."""
    matrices = [tensor for tensor in header.tensors.values() if len(tensor.shape) > 1]
    n_weights = sum(tensor.size for tensor in matrices)
    return 8 * sum(tensor.n_bytes for tensor in matrices) / max(1, n_weights)
