"""Markdown while it is generated: complete blocks are printed once, the last one is redrawn.

Only the terminal's own sixteen colours are used, and no backgrounds.  This suits light and dark
terminals.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from pygments import token as kinds
from rich import markdown as rich_markdown
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.segment import Segment
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.theme import Theme

THEME = Theme(
    {
        "markdown.code": "cyan",
        "markdown.code_block": "none",
        "markdown.h1": "bold underline",
        "markdown.h2": "bold underline",
        "markdown.h3": "bold",
        "markdown.h4": "bold",
        "markdown.item.bullet": "dim",
        "markdown.item.number": "dim",
        "markdown.block_quote": "italic",
        "markdown.hr": "dim",
        "markdown.link": "underline",
        "markdown.link_url": "underline",
        "markdown.table.header": "bold",
        "markdown.table.border": "dim",
    }
)

CODE = ANSISyntaxTheme(
    {
        kinds.Comment: Style(dim=True, italic=True),
        kinds.Keyword: Style(color="magenta"),
        kinds.Operator.Word: Style(color="magenta"),
        kinds.Name.Function: Style(bold=True),
        kinds.Name.Class: Style(bold=True),
        kinds.Name.Decorator: Style(color="magenta"),
        kinds.Name.Builtin: Style(color="cyan"),
        kinds.Name.Tag: Style(color="magenta"),
        kinds.String: Style(color="green"),
        kinds.Number: Style(color="cyan"),
        kinds.Generic.Deleted: Style(color="red"),
        kinds.Generic.Inserted: Style(color="green"),
    }
)


class _Heading(rich_markdown.Heading):
    """A heading aligned left."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _CodeBlock(rich_markdown.CodeBlock):
    """A code block without a background; it is indented instead."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = Syntax(str(self.text).rstrip("\n"), self.lexer_name, theme=CODE, word_wrap=True)
        yield Padding(code, (0, 0, 0, 2))


class Markdown(rich_markdown.Markdown):
    """Markdown that keeps the model's line breaks and shows HTML as text."""

    elements: ClassVar = {
        **rich_markdown.Markdown.elements,
        "heading_open": _Heading,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.markup = text
        self.parsed = parse(text)


def parse(text: str) -> list[Token]:
    """Parses CommonMark with tables and strikethrough.  HTML is text; line breaks are kept."""
    parser = MarkdownIt().enable(["strikethrough", "table"]).disable(["html_block", "html_inline"])
    parser.inline.ruler.at("newline", _newline)
    return parser.parse(text)


def _newline(state: StateInline, silent: bool) -> bool:
    if state.src[state.pos] != "\n":
        return False
    if not silent:
        state.push("hardbreak", "br", 0)
    state.pos += 1
    return True


def split(text: str) -> tuple[list[str], str]:
    """The blocks that more text cannot change, and the last block."""
    starts = [
        token.map[0]
        for token in parse(text)
        if token.level == 0 and token.map and token.nesting >= 0
    ]
    *full, last = text.split("\n")
    lines = [*(f"{line}\n" for line in full), last]
    cuts = list(dict.fromkeys([0, *starts[1:]]))
    blocks = ["".join(lines[a:b]) for a, b in pairwise(cuts)]
    return [block for block in blocks if block.strip()], "".join(lines[cuts[-1] :])


def rendered(console: Console, renderable: Any, width: int | None = None) -> list[list[Segment]]:
    """A renderable's lines as segments, without trailing blanks.

    width: columns; None: the terminal's width.
    """
    options = console.options.update(width=width) if width else None
    lines = console.render_lines(renderable, options, pad=False)
    return [_without_end(line) for line in lines]


def _without_end(line: list[Segment]) -> list[Segment]:
    while line and not line[-1].text.strip():
        line = line[:-1]
    if line:
        text, style, control = line[-1]
        line = [*line[:-1], Segment(text.rstrip(), style, control)]
    return line
