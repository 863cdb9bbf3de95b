"""What tests of circuits share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

F64 = torch.float64


@pytest.fixture
def in_float64():
    """No float32 in models of float64: the norms of some HuggingFace families go there and back."""

    class Stay(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if args and isinstance(args[0], Tensor) and args[0].dtype == F64:
                if func is Tensor.float:
                    return args[0]
                args = tuple(F64 if a is torch.float32 else a for a in args)
                kwargs = {k: F64 if a is torch.float32 else a for k, a in kwargs.items()}
            return func(*args, **kwargs)

    with Stay():
        yield
