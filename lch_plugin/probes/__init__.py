"""Probes: whether a direction among centroids tells true statements from false ones.

In the order of use::

    statements = lch.probes.read_statements("cities.csv")           # statement, label
    values = lch.probes.collect(model, statements.texts, layers=[6])  # by hook name, a row each
    probe = lch.probes.make_probe("mass-mean").fit(X, statements.labels)
    lch.probes.generalise(values_by_set, labels_by_set, probe)      # trained on one, tested on all

`lch_plugin.probes.run` does all of it for several sets and writes a page: ``lch probe``.

Probes are scikit-learn's, and `MassMeanProbe` is one more estimator in its interface. Accuracies
stand beside areas under the ROC curve, which do not depend on the threshold. Both come with those
of the same probe trained on shuffled labels, and with intervals over splits.
"""

from lch_plugin.probes.collecting import PARTS, Component, Token, collect, hook_names
from lch_plugin.probes.estimators import (
    PROBES,
    RANKINGS,
    MassMeanProbe,
    make_probe,
    mean_difference,
    sparse_probe,
)
from lch_plugin.probes.generalisation import (
    Generalisation,
    Interval,
    Score,
    generalise,
    over_seeds,
)
from lch_plugin.probes.report import check, run
from lch_plugin.probes.statements import Statements, check_apart, read_statements, sample

__all__ = [
    "PARTS",
    "PROBES",
    "RANKINGS",
    "Component",
    "Generalisation",
    "Interval",
    "MassMeanProbe",
    "Score",
    "Statements",
    "Token",
    "check",
    "check_apart",
    "collect",
    "generalise",
    "hook_names",
    "make_probe",
    "mean_difference",
    "over_seeds",
    "read_statements",
    "run",
    "sample",
    "sparse_probe",
]
