"""What code writes into the pages is there as it would write it now."""

from __future__ import annotations

import subprocess
import sys


def test_the_parts_are_what_the_code_writes() -> None:
    """In a process of its own: with shapes checked at run time, no code travels to a server."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.docs", "--check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr.splitlines()[-1]
