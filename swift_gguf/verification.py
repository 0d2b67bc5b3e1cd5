"""Which draft tokens the target agrees with: pure functions.

The rule keeps any sampler exact.  Let x_1 .. x_k be the draft and s_i the token the user's own
sampler draws from the target's distribution after x_1 .. x_{i-1}.  Go on while s_i = x_i:

    accepted = the longest prefix with s_i = x_i,   bonus = s_{accepted + 1}

Every s_i that is emitted was drawn by the sampler, in order, from the distribution plain decoding
would have shown it, so with the same seed the text is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def verify(
    draft: Sequence[int], *, sample: Callable[[int], int], is_eog: Callable[[int], bool]
) -> list[int]:
    """The tokens to emit: the accepted part of the draft, then the target's own next token.

    sample: draws from the target's output row i, where row i follows draft[:i].  It is called once
        a row, in order, and for no row that is not emitted: samplers have state.
    is_eog: after an end of generation nothing more is drawn.
    """
    emitted: list[int] = []
    for row in range(len(draft) + 1):
        token = sample(row)
        emitted.append(token)
        if row == len(draft) or token != draft[row] or is_eog(token):
            break
    return emitted
