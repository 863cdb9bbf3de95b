"""Pages in headless Chromium: what a script finds there, and what the browser complains of."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def browse(page: Path, script: str, profile: Path, *, width: int = 1100) -> tuple[Any, str]:
    """What a script returns after the page's own has run, and what the console says.

    Args:
        page: an HTML file.
        script: body of a function whose value JSON can hold.
        profile: a directory for the browser's own files.
        width: of the window, in pixels.
    """
    copy = page.with_name(f"browsed-{page.name}")
    tail = f"<script>document.title = JSON.stringify((() => {{ {script} }})());</script></body>"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", tail), encoding="utf-8")
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-background-networking", "--disable-sync", "--enable-logging=stderr", "--v=0"),
        *(f"--window-size={width},900", f"--user-data-dir={profile}", "--dump-dom", copy.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    copy.unlink()
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title is not None
    said = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    text = title[1]
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&nbsp;", "\xa0"), ("&amp;", "&")):
        text = text.replace(entity, character)
    return json.loads(text), said
