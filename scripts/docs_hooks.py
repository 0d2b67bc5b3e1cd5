"""For mkdocs: replaces links into the source tree, which do not work on the site, by their text."""

from __future__ import annotations

import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+)[^)]*\)")


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    folders = page.file.src_uri.count("/")

    def words(link: re.Match[str]) -> str:
        leaves_docs = link[2].count("../") > folders
        return link[1] if leaves_docs else link[0]

    return LINK.sub(words, markdown)
