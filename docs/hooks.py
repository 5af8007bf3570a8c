"""What mkdocs does not do by itself: docstrings name classes and functions as Sphinx does."""

import re

_ROLE = re.compile(r":(?:class|func|meth|attr):<code>~?(?:[\w.]*\.)?(\w+)</code>")


def on_page_content(html: str, **_: object) -> str:
    """Show ``:class:`~package.Name``` as ``Name``."""
    return _ROLE.sub(r"<code>\1</code>", html)
