"""SAELens' notices and bars about what is meant so here, kept off the screen; nothing else is."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType

from sae_lens import logger
from sae_lens.training import activation_scaler, multi_sae_trainer, sae_trainer

# Models and texts are always passed in; texts are tokenised as they are read; and samples, which
# SAELens compares with tokens, are whole texts.
_SAID = ("You just passed in a",)
_WARNED = (
    "The training dataset contains fewer samples",
    "Dataset is not tokenized",
    r"\s*This SAE has non-empty model_from_pretrained_kwargs",
)
# Bars that move every hundred steps, beside ours.
_WITH_BARS: tuple[ModuleType, ...] = (activation_scaler, multi_sae_trainer, sae_trainer)


class _NotAsMeant(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_SAID)


@contextmanager
def saelens_quiet() -> Iterator[None]:
    """While open, SAELens says nothing of what this package means it to do, and draws no bars.

    All its other warnings come through, and all its errors.
    """
    saying = _NotAsMeant()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        for message in _WARNED:
            warnings.filterwarnings("ignore", message)
        for module in _WITH_BARS:
            tqdm = vars(module)["tqdm"]
            stack.callback(setattr, module, "tqdm", tqdm)
            vars(module)["tqdm"] = partial(tqdm, disable=True)
        logger.addFilter(saying)
        stack.callback(logger.removeFilter, saying)
        yield
