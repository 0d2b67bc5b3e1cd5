"""Text files that people name: what is taken for text, and what is said of what is not."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from swift_gguf.errors import SuiteError, SwiftError
from swift_gguf.native import deep_stack
from swift_gguf.text.text import read_prompt, read_template
from swift_gguf.text_files import MAX_BYTES, decode, read_text

MARK = b"\xef\xbb\xbf"


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(SwiftError) as caught:
        read_text(path, **options)  # type: ignore[arg-type]
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(MARK + "één\r\ntwo\rthree\n".encode())
    assert read_text(path) == "één\ntwo\nthree\n"
    path.write_bytes(MARK)
    assert read_text(path) == ""
    path.write_bytes("a\ufeffb".encode())  # inside, it is a character
    assert read_text(path) == "a\ufeffb"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_utf_16_is_refused_with_or_without_a_mark(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes("The capital of France is".encode(encoding))
    assert "not UTF-8" in refusal(path)
    assert "save it as UTF-8" in refusal(path)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"caf\xe9")
    assert refusal(path).endswith("is not UTF-8 text; save it as UTF-8")
    path.write_bytes(b"GGUF\3\0\0\0")
    assert "NUL" in refusal(path)
    assert "No such file" in refusal(tmp_path / "none")
    assert "Is a directory" in refusal(tmp_path)
    path.write_bytes(b"\xff")
    with pytest.raises(SuiteError):
        read_text(path, error=SuiteError)


def test_devices_are_not_read(tmp_path: Path) -> None:
    for device in ("/dev/zero", "/dev/null"):
        assert "not a regular file" in refusal(Path(device))


def test_no_more_is_read_than_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("a" * (1 << 20) + "b")
    assert "the limit is 1 MiB" in refusal(path, limit=1 << 20)
    assert len(read_text(path)) == 1 + (1 << 20)
    film = tmp_path / "film.mp4"
    with film.open("wb") as file:
        file.truncate(3 << 30)
    assert "if it is text" in refusal(film)  # 3 GiB, of which 64 MiB are looked at
    assert MAX_BYTES == 64 << 20


def test_pipes_are_read_where_they_may_be(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert "not a regular file" in refusal(path, pipes=False)  # and does not wait for a writer
    writer = threading.Thread(target=path.write_bytes, args=(MARK + b"from a pipe",))
    writer.start()
    assert read_text(path) == "from a pipe"
    writer.join()


def test_a_prompt_can_be_split_into_tokens(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("a" * deep_stack.MOST)
    assert len(read_prompt(path)) == deep_stack.MOST
    path.write_text("a" * deep_stack.MOST + "b")
    with pytest.raises(SwiftError, match=r"prompt\.txt is too long: it has 1048577 characters"):
        read_prompt(path)
    path.write_text("a" * 5 * deep_stack.MOST)
    with pytest.raises(SwiftError, match=r"prompt\.txt is too long: the limit is 4 MiB"):
        read_prompt(path)


def test_templates_are_text_or_such_files(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_bytes(MARK + b"{{ messages[0].content }}")
    assert read_template(str(path)) == "{{ messages[0].content }}"
    assert read_template("{{ 1 }}") == "{{ 1 }}"
    path.write_bytes("{{ 1 }}".encode("utf-16"))
    with pytest.raises(SwiftError, match=r"neither Jinja text nor a file .*UTF-16"):
        read_template(str(path))


def test_bytes_have_a_name() -> None:
    assert decode(MARK + b"x", "standard input") == "x"
    with pytest.raises(SwiftError, match="standard input is not UTF-8 text; save it as UTF-8"):
        decode(b"\xff", "standard input")
