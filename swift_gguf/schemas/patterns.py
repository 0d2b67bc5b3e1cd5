"""Translates regular expressions of JSON Schema (ECMA-262) to llguidance's dialect (Rust's).

Validators use different dialects: Python's ``\\d`` matches the digits of every script, ECMAScript's
only ten.  The translated pattern matches only what all of them match.
"""

from __future__ import annotations

import re

_NARROW = {"d": "0-9", "w": "0-9A-Za-z_", "s": r" \t\n\r\f\v"}
_WIDE = {"d": r"\p{Nd}", "w": r"\p{L}\p{M}\p{N}\p{Pc}", "s": r"\s\x1c-\x1f\x{85}\x{feff}"}
"""Digits, word characters and blanks: those of all dialects, and those of any dialect."""
_TOKEN = re.compile(
    r"""\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}
    | \\[pP]\{[^}]*\} | \\u\{[0-9a-fA-F]+\} | \\u[0-9a-fA-F]{4} | \\x[0-9a-fA-F]{2} | \\c[A-Za-z]
    | \\. | \(\?<?[=!] | .""",
    re.DOTALL | re.VERBOSE,
)
_COUNT = re.compile(r"\{[0-9]+(,[0-9]*)?\}")
_META = frozenset(r"\.+*?()|[]{}^$#&-~")
"""Characters that a backslash makes literal in Rust's dialect (``\\<`` is a word boundary)."""

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP = (
    "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"  # of four
)
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    rf"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_HEX = "[0-9a-fA-F]"
FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "uuid": f"^{_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}}$",
}
"""Formats as patterns that clients can parse; llguidance's own allow February 29 in every year."""
KNOWN_FORMATS = frozenset(("duration", "email", "hostname", "ipv4", "ipv6", "uri"))
"""Other formats that llguidance checks; the rest are annotations, as in the specification."""


def to_rust(pattern: str) -> str:
    """A pattern in Rust's dialect that matches the same texts, or fewer.

    Unknown syntax stays as it is, and llguidance refuses it.

    Raises:
        ValueError: it has a look-around, a word boundary or a reference to a group, which no
            automaton can match.
    """
    out: list[str] = []
    opened = ""  # "[" or "[^" inside a class
    skip_to = 0
    for match in _TOKEN.finditer(pattern):
        token = match.group()
        if match.start() < skip_to:
            continue
        if token[0] == "\\" and len(token) > 1:
            out.append(_escape(token, opened))
        elif token.startswith("(?"):
            if not opened:
                raise ValueError("a look-around")
            out.append(token)
        elif opened:
            if token in "[&~" or (token == "-" and out[-1] == "-"):
                token = f"\\{token}"  # in Rust, these begin a nested class or a set operation
            elif token == "]" and out[-1] != opened:
                opened = ""
            out.append(token)
        elif token == "[":
            opened = "[^" if pattern.startswith("[^", match.start()) else "["
            skip_to = match.start() + len(opened)
            out.append(opened)
        elif token == ".":
            out.append(r"[^\n\r\x{2028}\x{2029}]")
        elif token == "{" and not _COUNT.match(pattern, match.start()):
            out.append(r"\{")
        else:
            out.append(token)
    return "".join(out)


def _escape(token: str, opened: str) -> str:
    kind, rest = token[1], token[2:]
    if kind.lower() in _NARROW:
        is_positive = kind.islower()
        characters = (_NARROW if is_positive != (opened == "[^") else _WIDE)[kind.lower()]
        return f"[{'' if is_positive else '^'}{characters}]"  # Rust allows nested classes
    if kind in "pP" or rest.startswith("{"):
        return token
    if kind in "ux" and rest:
        code = int(rest[:4], 16)
        if len(rest) > 4:  # a surrogate pair
            code = 0x10000 + ((code & 0x3FF) << 10) + (int(rest[6:], 16) & 0x3FF)
        return f"\\x{{{code:x}}}"
    if kind == "c" and rest:
        return f"\\x{{{ord(rest) % 32:x}}}"
    if kind == "0":
        return r"\x{0}"
    if kind == "b" and opened:
        return r"\x{8}"
    if kind in "bBk" or kind in "123456789":
        raise ValueError("a word boundary" if kind in "bB" else "a reference to a group")
    if kind == "Z":  # Python's name for the end
        return "$"
    if kind.isalnum():
        return token
    return f"\\{kind}" if kind in _META else kind
