"""Self-contained HTML pages: one look, scripts that a policy names, data that cannot break out. Knows no content.

The report of a run and the pages of `lexmill explain` are such pages. They load nothing from the network.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def page(
    *,
    title: str,
    body: str,
    styles: Sequence[str] = (),
    data: tuple[str, Any] | None = None,
    scripts: Sequence[str] = (),
) -> str:
    """One HTML document that needs no other file.

    Args:
        title: plain text.
        body: HTML; whatever is not ours in it went through `escaped`.
        styles: CSS after the common look.
        data: the id of a script element, and the JSON value that it holds for the scripts.
        scripts: JavaScript. Only these run: the content policy names their hashes.
    """
    allowed = " ".join(map(_script_hash, scripts)) or "'none'"
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        f"script-src {allowed}"
    )
    css = "\n".join([asset("lexmill", "page.css"), *styles])
    held = ""
    if data:
        held = f'<script type="application/json" id="{escaped(data[0])}">{script_json(data[1])}</script>\n'
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escaped(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
<style>
{css}</style>
</head>
<body>
{body}
{held}{"".join(f"<script>{script}</script>" for script in scripts)}
</body>
</html>
"""


def asset(package: str, name: str) -> str:
    """A text file from the `assets` folder of a package, such as ("lexmill.recipe", "report.css")."""
    return resources.files(package).joinpath("assets").joinpath(name).read_text("utf-8")


def escaped(value: Any) -> str:
    """Text as HTML, also inside quoted attributes; control characters become visible."""
    return html.escape(_CONTROL.sub("\ufffd", str(value)), quote=True)


def script_json(value: Any) -> str:
    """JSON that can stand inside <script>: only ASCII, and no `<` that could end or comment out the block."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _script_hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode()}'"
