"""torch, imported when it is first used: that takes seconds, which commands and whoever only appends or edits do not have.

Invariant: ``import trajstore`` imports no torch; what makes batches does, and it imports it by itself.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    import torch
else:

    class _Deferred:
        """A module whose attributes are looked up in it on first use, and are at hand from then on."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module(self._name), name)
            setattr(self, name, value)
            return value

    torch = _Deferred("torch")

__all__ = ["is_tensor", "torch"]


def is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    """Whether a value is a torch tensor; where nobody has imported torch, none is."""
    return "torch" in sys.modules and isinstance(value, torch.Tensor)
