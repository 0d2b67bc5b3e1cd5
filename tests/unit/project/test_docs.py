"""What is written: links lead somewhere, commands exist, the site builds, pictures are whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import click
import pyte
import pytest

import record_demo
from lab.__main__ import EXPERIMENTS
from swift_gguf.cli import COMMANDS

ROOT = Path(__file__).parents[3]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "native/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"swift-gguf ([a-z]+)\b([^`|#\n]*)")
FLAG = re.compile(r"(?<![\w-])--?[a-z][\w-]*")

pages = pytest.mark.parametrize("page", PAGES, ids=NAMES)


@pages
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    assert missing == []


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    files = r"\b((?:native|scripts|tests)/[\w./-]*\w|swift_gguf/[\w/]+\.py)"
    named = re.findall(files, _code(page.read_text()))
    assert [path for path in named if not (ROOT / path).exists()] == []


@pages
def test_experiments_exist(page: Path) -> None:
    named = re.findall(r"scripts/lab ([a-z]+)", _code(page.read_text()))
    assert set(named) <= EXPERIMENTS.keys()


def test_rooms_of_the_house_exist() -> None:
    named = re.findall(
        r"`((?:native|swift_gguf|tests|scripts|docs)/[\w./]*)`", PAGES[1].read_text()
    )
    assert len(named) > 30
    assert [path for path in named if not (ROOT / path).exists()] == []


@pages
def test_commands_and_flags_exist(page: Path) -> None:
    unknown = []
    for name, rest in COMMAND.findall(_code(page.read_text())):
        if name not in COMMANDS:
            unknown.append(f"swift-gguf {name}")
            continue
        flags = set(FLAG.findall(re.sub(r"""(["']).*?\1|<.*""", "", rest)))
        unknown += [f"{name} {flag}" for flag in flags - _flags(name)]
    assert unknown == []


def _code(text: str) -> str:
    """Indented and fenced blocks, and spans in backquotes; lines that go on are joined."""
    text = text.replace("\\\n", " ")
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    .*$", text, re.MULTILINE)
    return "\n".join([*fenced, *indented, *re.findall(r"`([^`\n]+)`", text)])


def _flags(name: str) -> set[str]:
    module, attribute, _ = COMMANDS[name]
    command = getattr(import_module(f"swift_gguf.cli.{module}"), attribute)
    parameters = command.get_params(click.Context(command))
    known = {
        flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    return known | {"--debug", "-h"}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1050  # with the table of servers


@pages
def test_prose_fits_a_screen(page: Path) -> None:
    """Lines of at most 100 characters; tables, code and pictures may be wider."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "    ", "!["))]
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize(
    "picture", sorted((ROOT / "docs").rglob("*.svg")), ids=lambda path: path.name
)
def test_pictures_are_whole(picture: Path) -> None:
    root = ElementTree.parse(picture).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("viewBox")


def test_the_recording_is_small_and_shows_a_chat() -> None:
    picture = ROOT / "docs" / "demo.svg"
    assert picture.stat().st_size < 60_000
    text = "".join(ElementTree.parse(picture).getroot().itertext())
    assert "swift-gguf chat" in text
    assert "tok/s" in text


def test_type_hints_are_for_others_too() -> None:
    assert (files("swift_gguf") / "py.typed").is_file()


# -- the recorder ----------------------------------------------------------------------------------


class Fed:
    """A terminal of three lines, and its recording."""

    def __init__(self) -> None:
        self.screen = pyte.HistoryScreen(record_demo.COLUMNS, 3, history=100, ratio=0.5)
        self.recording = record_demo.Recording()
        self._stream = pyte.Stream(self.screen)

    def feed(self, text: str, after: float) -> None:
        self._stream.feed(record_demo.without_dim(text))
        self.recording.add(self.screen, after)

    def svg(self) -> ElementTree.Element:
        return ElementTree.fromstring(record_demo.draw(self.recording, "a <title>"))


def texts(svg: ElementTree.Element) -> Iterator[tuple[str, dict[str, str]]]:
    """Each text that is drawn, and when it is shown or hidden."""
    space = "{http://www.w3.org/2000/svg}"
    for text in svg.iter(f"{space}text"):
        timing = text.find(f"{space}set")
        if timing is not None:
            yield "".join(text.itertext()), dict(timing.attrib)


def test_a_recording_shows_each_line_for_its_time() -> None:
    terminal = Fed()
    terminal.feed("one <&", 0.5)
    terminal.feed(" two", 0.25)
    shown = dict(texts(terminal.svg()))
    assert shown["one <&"]["begin"] == "m.begin+0.50s"
    assert shown["one <&"]["dur"] == "0.25s"
    assert (shown["one <& two"]["to"], shown["one <& two"]["dur"]) == ("none", "0.75s")


def test_a_recording_scrolls_instead_of_drawing_anew() -> None:
    terminal = Fed()
    for line in "abcde":
        terminal.feed(f"{line}\r\n", 0.25)
    svg = terminal.svg()
    assert sorted(text for text, _ in texts(svg)) == list("abcde")
    move = next(svg.iter("{http://www.w3.org/2000/svg}animateTransform"))
    tops = [
        float(value.split()[1]) / -record_demo.CELL_H for value in move.get("values", "").split(";")
    ]
    assert tops == [0, 1, 2, 3]


def test_a_recording_cuts_pauses_and_says_so() -> None:
    terminal = Fed()
    terminal.feed("a", 0.5)
    terminal.feed("b", 9.0)
    assert terminal.recording.seconds == 0.5 + record_demo.LONGEST_PAUSE_S
    assert terminal.recording.cut_s == 9.0 - record_demo.LONGEST_PAUSE_S


def test_a_recording_keeps_styles() -> None:
    terminal = Fed()
    terminal.feed("\x1b[1mbold\x1b[0m \x1b[2mdim\x1b[0m \x1b[38;2;1;2;3mown\x1b[0m", 0.1)
    spans = {span.text: span for span in terminal.svg().iter("{http://www.w3.org/2000/svg}tspan")}
    assert spans["bold"].get("class") == "b"
    assert spans["dim"].get("style") == f"fill:{record_demo.COLOURS['brightblack']}"
    assert spans["own"].get("style") == "fill:#010203"
