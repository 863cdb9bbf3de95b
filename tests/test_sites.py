"""Kinds of sites: one table, which the documentation and the adapters follow."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

import lch_plugin as lch
from lch_plugin import sites
from lch_plugin.adapters.transformer_lens.attaching import BUILDERS
from lch_plugin.cotangents import Logit, Random
from lch_plugin.sites import KINDS, Kind, Options, Settings
from tests.docs import capabilities


def test_the_table_in_words_is_the_table() -> None:
    assert sites.__doc__ is not None
    rows = [
        f"| `{name}` | `{kind.hook}` | {kind.reads} | {kind.writes} |"
        for name, kind in KINDS.items()
    ]
    assert [line for line in sites.__doc__.splitlines() if line.startswith("| `")] == rows


def test_every_kind_has_a_name_for_types_and_a_builder() -> None:
    assert tuple(KINDS) == get_args(Kind)
    in_blocks = {name for name, kind in KINDS.items() if kind.layers == "list"}
    assert BUILDERS.keys() == in_blocks


@pytest.mark.parametrize("name", KINDS)
def test_the_hook_point_of_a_kind_is_called_as_its_record_says(name: Kind) -> None:
    kind = KINDS[name]
    layers = {"list": 2, "ends": (1, 2), "none": None}[kind.layers]
    site = lch.Site(name, layers, 3 if kind.is_indexed else None, cotangent=Random(0))
    letters = {".L": ".2", ".J": ".2", "_I": "_1", "_J": "_3", "_H": "_3"}
    expected = kind.hook
    for letter, number in letters.items():
        expected = expected.replace(letter, number)
    with lch.attach(lch.load_demo_model(), site=site) as handle:
        assert handle.centroid_names == [expected]


def test_the_documentation_has_every_kind() -> None:
    page = (Path(lch.__file__).parents[1] / "docs" / "reference" / "sites.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|", page, re.MULTILINE)
    assert dict(rows) == {name: kind.hook for name, kind in KINDS.items()}
    assert tuple(KINDS) == capabilities.KINDS


def test_a_logit_is_of_what_writes_to_the_residual_stream() -> None:
    for name, kind in KINDS.items():
        if kind.residual is None:
            layers = (0, 1) if kind.layers == "ends" else None
            with pytest.raises(lch.InputError, match="residual stream"):
                lch.attach(lch.load_demo_model(), site=lch.Site(name, layers, cotangent=Logit(3)))


def test_options_are_the_settings_but_for_the_cotangent() -> None:
    assert {f.name for f in fields(Settings)} - {"cotangent"} == set(Options.__annotations__)


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_decides_what_a_site_may_be(kind: Kind) -> None:
    record = KINDS[kind]
    layers = {"list": None, "ends": (0, 1), "none": None}[record.layers]
    index = 0 if record.is_indexed else None
    for linearization in ("jacobian", "detached"):
        if linearization in record.linearizations:
            lch.Site(kind, layers, index, linearization=linearization)
        else:
            with pytest.raises(lch.InputError, match="one linearisation"):
                lch.Site(kind, layers, index, linearization=linearization)
    if record.has_local:
        lch.Site(kind, layers, index, radius=0.1)
    else:
        with pytest.raises(lch.InputError, match="a local centroid is offered"):
            lch.Site(kind, layers, index, radius=0.1)
    if record.mixes_positions:
        lch.Site(kind, layers, index, output_positions=-1)
    else:
        with pytest.raises(lch.InputError, match="does not mix positions"):
            lch.Site(kind, layers, index, output_positions=-1)
    with pytest.raises(lch.InputError, match="index="):
        lch.Site(kind, layers, None if record.is_indexed else 0)
