"""What mkdocs does beside its plugins."""

import re


def on_page_content(html: str, **_) -> str:
    """Docstrings name classes as diffusers does, [`~flowsr.files.read_file`]; a page shows `read_file`."""
    return re.sub(r"\[<code>(?:~[\w.]*\.)?([\w.]+)</code>\]", r"<code>\1</code>", html)
