"""Kinds of sites: one table, which the documentation and the adapters follow."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import pytest

import lch_plugin as lch
from lch_plugin import sites
from lch_plugin.adapters.transformer_lens.attaching import BUILDERS
from lch_plugin.sites import KINDS, Kind, Options, Settings


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
