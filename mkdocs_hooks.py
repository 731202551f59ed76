"""What mkdocs does to each page beyond its plugins: it doesn't know the Sphinx roles of docstrings."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>~?(?:layersample\.)?([^<]+)</code>")


def on_page_content(html: str, **kwargs: Any) -> str:
    """Leave the name of a Sphinx role, and not the role."""
    return _ROLE.sub(r"<code>\1</code>", html)
