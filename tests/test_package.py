"""The package as it is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lch_plugin as lch
from tests.toolkits import HAS_SAES


def test_the_mathematics_comes_without_the_toolkits() -> None:
    code = (
        "import sys, lch_plugin; lch_plugin.centroid; "
        "print([m for m in ('transformer_lens', 'sae_lens', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_every_public_name_resolves_and_others_do_not() -> None:
    for name in lch.__all__:
        if HAS_SAES or name != "saes":
            assert getattr(lch, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lch.no_such_name
