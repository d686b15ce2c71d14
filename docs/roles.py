"""A hook of mkdocs: what docstrings refer to by roles is shown by its name."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):<code>~?([^<]+)</code>")
SHORT = re.compile(r":(?:class|func|meth|mod|attr|data):<code>~[^<]*?(\w+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """``:class:`~sp_compile.config.CompileConfig``` becomes ``CompileConfig``, without a tilde its whole name."""
    return ROLE.sub(r"<code>\1</code>", SHORT.sub(r"<code>\1</code>", html))
