"""What has to hold before anything is scored."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lch_plugin.errors import InputError, ToolkitError


def check_evaluation(model: Any) -> None:
    """Refuse a model whose output is random, or depends on what else is in the batch.

    Raises:
        InputError: dropout or batch normalisation is in training mode.
    """
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        drops = isinstance(module, _DropoutNd) and module.p > 0
        if module.training and (drops or isinstance(module, _BatchNorm)):
            raise InputError(
                f"{name}, a {type(module).__name__}, is in training mode, so that scores would "
                "change from call to call or with the batch: call model.eval()."
            )


def captum_attr() -> Any:
    """``captum.attr``.

    Raises:
        ToolkitError: Captum is not installed.
    """
    try:
        from captum import attr
    except ImportError as error:
        raise ToolkitError(
            "comparing saliency methods needs Captum: pip install 'lch-plugin[saliency]'"
        ) from error
    return attr
