"""What changed between two checkpoints of one model, by function: where, and on which inputs.

Every component gets the *same* input in both models, the one that it has in the first. So a
component that did not change gives exactly the same, however much changed before it, and the
difference is exactly 0. What is compared:

- **Centroids** ``J^T v``, through one cotangent (all ones: the paper's), and through ``n`` random
  ones. For ``v`` with identity covariance ``E |dJ^T v|^2 = |dJ|_F^2``, so that the mean over them
  estimates how much the whole Jacobian changed, ``|dJ|_F / |J|_F``. Numerator and denominator are
  unbiased, the root of their ratio nearly so; its standard error is a jackknife over the ``n``.
  Where outputs at several positions depend on one input, as in attention, ``J`` is the sum of the
  Jacobians of all of them, as in every centroid here.
- **Outputs** on the same inputs.
- **Activations**: the outputs of each model on inputs of its own, as in an ordinary comparison of
  activations. They differ in everything after the first change.
- **Weights**: the norm of the difference of a component's parameters. They know no inputs.

All are relative to the first model: root of the sum of squares over all tokens of the difference,
over the same of the first model.
"""

from lch_plugin.diff.comparing import compare
from lch_plugin.diff.differences import ComponentDifference, Differences, InputDifference

__all__ = ["ComponentDifference", "Differences", "InputDifference", "compare"]
