"""For mkdocs: docstrings name classes and types in backticks, and the API page shows them bare."""

import re


def on_page_content(html: str, **_) -> str:
    html = re.sub(r"\[(`|<code>)(?:~[\w.]*\.)?([\w.]+)(`|</code>)\]", r"\1\2\3", html)  # [`~flowsr.files.read_file`]
    return re.sub(r"<code>[^<\n]*`[^<\n]*</code>", lambda code: code[0].replace("`", ""), html)
