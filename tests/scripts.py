"""Scripts of `examples/` in processes of their own, offline, as small as they go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_small(script: Path, out: Path, *options: str) -> str:
    """Run a script with ``--small``; what it says on stdout. It has to end well."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "--small", "--out", str(out), *options],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
