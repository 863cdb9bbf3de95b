"""Centroid alignment: measured while a network trains, and trained towards.

Centroid alignment is ``cos(mu(x), x)``. A network whose Jacobian has rank one and points along
the data has, for what it says, the smallest Jacobian, and so the most robust one. Delayed
generalisation (grokking) goes with a late rise of alignment, and a penalty on the Jacobian brings
it forward (Walker et al., "GrokAlign", arXiv 2506.12284).

Modules, each knowing those before it: `runs`, a pass through which a component can be
differentiated; `measures`; `penalties`, terms of a loss; `monitor`, measures over a training run;
`callbacks`, for loops that others wrote.
"""

from lch_plugin.alignment.callbacks import TrainerMonitor, lightning_monitor
from lch_plugin.alignment.measures import (
    Measurement,
    centroid_alignment,
    effective_rank,
    first_component_share,
    jacobian,
    measure,
)
from lch_plugin.alignment.monitor import Monitor
from lch_plugin.alignment.penalties import (
    alignment_loss,
    jacobian_penalty,
    squared_jacobian_norm,
)
from lch_plugin.alignment.runs import Run, run

__all__ = [
    "Measurement",
    "Monitor",
    "Run",
    "TrainerMonitor",
    "alignment_loss",
    "centroid_alignment",
    "effective_rank",
    "first_component_share",
    "jacobian",
    "jacobian_penalty",
    "lightning_monitor",
    "measure",
    "run",
    "squared_jacobian_norm",
]
