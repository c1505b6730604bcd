"""How a view was chosen, so that it can be chosen again.

Invariant: only what is chosen by a rule is kept, never by position: a later view has other positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trajstore.view import View


@dataclass(frozen=True)
class Follows:
    """How to take a view again.

    Attributes:
        latest: All trajectories now; with True, after looking for commits of others.
        steps: What was chosen of them, one after the other: method of ``View`` and its arguments.
    """

    latest: Callable[[bool], View]
    steps: tuple[tuple[str, tuple[Any, ...], Mapping[str, Any]], ...] = ()

    def view(self, refresh: bool) -> View:
        """The view as it would be taken now."""
        view = self.latest(refresh)
        for method, arguments, variables in self.steps:
            view = getattr(view, method)(*arguments, **variables)
        return view
