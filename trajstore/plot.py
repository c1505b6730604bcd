"""Pictures of a view: returns, lengths, one trajectory's steps, frames.

Invariant: a picture is a figure of its own; nothing of matplotlib's global state is touched unless a window is asked for.
What is thinned or averaged says so in the picture. Colours are those of Okabe and Ito (2008), which people with any colour
vision can tell apart.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

try:
    import matplotlib
    from matplotlib.figure import Figure, SubFigure
except ImportError as error:
    raise ImportError("plots need matplotlib: pip install 'trajstore[plot]'") from error

from trajstore.errors import SelectionError
from trajstore.interop.images import image_column, looks_like_images, picture_size, to_pictures
from trajstore.interop.panels import (
    GREY,
    PALE,
    PURPLE,
    Group,
    draw_histogram,
    draw_returns,
    draw_steps,
    group_rows,
    styled,
    whole_numbers,
)

if TYPE_CHECKING:
    from trajstore.schema import Column
    from trajstore.stored import Array
    from trajstore.trajectory import Trajectory
    from trajstore.view import View

Kind = Literal["overview", "returns", "lengths", "trajectory", "frames"]
_TAKEN: dict[str, tuple[str, ...]] = {  # which arguments mean something to which kind
    "overview": ("by", "x", "frames"),
    "returns": ("by", "x"),
    "lengths": (),
    "trajectory": ("trajectory", "columns"),
    "frames": ("trajectory", "columns", "rows", "frames"),
}
_BY_DEFAULT = {"by": None, "x": "id", "trajectory": None, "columns": None, "rows": 3, "frames": 8}
_SUFFIXES = ("png", "pdf", "svg")
_NO_WINDOWS = frozenset({"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"})
_WIDTH = 10.0  # inches
_DPI = 120
_MOST_PANELS = 8
_LARGEST_VECTOR = 256
_BRIEF_NOTE = "numbers are steps"
_FRAME_FONT = 8  # points
_CHARACTER = 0.62 * _FRAME_FONT / 72  # inches, about


class Picture(Figure):
    """A figure that notebooks show, also where pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        from io import BytesIO

        out = BytesIO()
        self.savefig(out, format="png")
        return out.getvalue()


def plot(
    view: View,
    kind: Kind = "overview",
    *,
    by: str | None = None,
    x: Literal["id", "created_at", "steps"] = "id",
    trajectory: int | Sequence[int] | None = None,
    columns: str | Sequence[str] | None = None,
    rows: int = 3,
    frames: int = 8,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
    show: bool = False,
) -> Figure:
    """A picture of a view; ``View.plot`` says what the arguments mean."""
    given = {"by": by, "x": x, "trajectory": trajectory, "columns": columns, "rows": rows, "frames": frames}
    check_taken(kind, [name for name, value in given.items() if not _is_default(name, value)])
    if not len(view):
        raise SelectionError("a picture of an empty view; choose a view with trajectories in it (see view.filter)")
    _check_target(path, show)
    names = [columns] if isinstance(columns, str) else columns
    wanted = [trajectory] if isinstance(trajectory, int | np.integer) else trajectory
    if kind == "trajectory" and wanted is not None and len(wanted) > 1:
        raise SelectionError(
            f"kind='trajectory' draws one trajectory, and trajectory={list(wanted)} are {len(wanted)}; draw them one by one"
        )
    figure = _new_figure(show)
    if kind == "overview":
        _overview(figure, view, by, x, frames, title)
    elif kind == "returns":
        figure.set_size_inches(_WIDTH, 5)
        table = _table(view)
        draw_returns(figure.subplots(), table, _places(table, x), group_rows(table, by), x, missing=_no_returns(view))
        _say(figure, title or f"Returns of {_counted(view)}")
    elif kind == "lengths":
        figure.set_size_inches(_WIDTH, 5)
        _lengths(figure.subplots(), _table(view))
        _say(figure, title or f"Lengths of {_counted(view)}")
    elif kind == "trajectory":
        _trajectory(figure, _chosen(view, wanted, 1), names, title)
    else:
        _frames(figure, view, _chosen(view, wanted, rows), names, frames, title)
    if path is not None:
        figure.savefig(path, dpi=_DPI)
    if show:
        _show(figure)
    return figure


def check_taken(kind: str, names: Iterable[str]) -> None:
    """Refuse what would be ignored.

    Args:
        kind: Of a picture.
        names: Arguments of ``plot`` that the caller gave.

    Raises:
        SelectionError: There is no such kind, or an argument means nothing to it.
    """
    if kind not in _TAKEN:
        raise SelectionError(f"kind={kind!r}, expected {', '.join(map(repr, _TAKEN))}")
    for name in names:
        if name not in _TAKEN[kind]:
            kinds = " and ".join(one for one, taken in _TAKEN.items() if name in taken)
            raise SelectionError(f"{name}= means nothing to kind={kind!r}, only to {kinds}; leave it out")


def _is_default(name: str, value: Any) -> bool:
    default = _BY_DEFAULT[name]
    return value is None or (isinstance(value, str | int) and value == default)  # an array is neither


def _overview(figure: Figure, view: View, by: str | None, x: str, frames: int, title: str | None) -> None:
    table = _table(view)
    groups = group_rows(table, by)
    images = image_column(view.common_columns)
    heights = [3.2, 2.6] + ([_strip_height(images, frames) + 0.3] if images else [])
    figure.set_size_inches(_WIDTH, sum(heights) + 0.6)
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    draw_returns(parts[0].subplots(), table, _places(table, x), groups, x, missing=_no_returns(view))
    left, right = parts[1].subplots(1, 2)
    _lengths(left, table)
    returns = table["reward_sum"].to_numpy(np.float64)
    if np.isfinite(returns).any():
        draw_histogram(right, returns, groups, label="return (sum of rewards)")
    else:
        styled(right).text(0.5, 0.5, "no returns", ha="center", va="center", transform=right.transAxes, color=GREY)
    if images:
        best = int(np.nanargmax(returns)) if np.isfinite(returns).any() else len(view) - 1
        which = "the highest return" if np.isfinite(returns).any() else "the newest"
        note = _strips(parts[2], [view[best]], images, frames)
        parts[2].suptitle(f"{images.path} of trajectory {view[best].id}, {which}{note}", fontsize=10)
    what = ", ".join(f"{column.path} {column.describe()}" for column in view.schema)
    _say(figure, title or f"{_counted(view)}, version {view.version}", what if len(what) < 150 else what[:147] + "...")


def _lengths(axes: Any, table: pd.DataFrame) -> None:
    terminated, truncated = table["terminated"].to_numpy(bool), table["truncated"].to_numpy(bool)
    ends = [
        Group("terminated", GREY, terminated),
        Group("truncated", PURPLE, truncated & ~terminated),
        Group("neither terminated\nnor truncated", PALE, ~terminated & ~truncated),
    ]
    used = tuple(group for group in ends if group.rows.any())
    draw_histogram(axes, table["length"].to_numpy(np.float64), used, label="length (steps)", whole=True)


def _trajectory(figure: Figure, chosen: list[Trajectory], names: Sequence[str] | None, title: str | None) -> None:
    one = chosen[0]
    columns = _step_columns(one, names)
    reward = names is None and any(column.path == "reward" for column in columns)
    figure.set_size_inches(_WIDTH, 1.2 + 1.75 * (len(columns) + reward))
    panels = figure.subplots(len(columns) + reward, 1, sharex=True, squeeze=False)[:, 0]
    drawn = 0
    for column in columns:
        draw_steps(panels[drawn], one[column.path][:], column.path)
        drawn += 1
        if reward and column.path == "reward":
            draw_steps(panels[drawn], np.cumsum(np.asarray(one["reward"][:], np.float64)), "return so far")
            drawn += 1
    end, style = _ending(one)
    for axes in panels:
        axes.axvline(one.length, **style)
    panels[0].annotate(
        end, (one.length, 1), xycoords=("data", "axes fraction"), xytext=(-4, 4), textcoords="offset points",
        ha="right", color=style["color"],
    )  # fmt: skip
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(whole_numbers())
    panels[-1].set_xlim(-0.02 * one.length - 0.5, 1.02 * one.length + 0.5)
    _say(figure, title or f"Trajectory {one.id}: {_summary(one)}", _fields(one))


def _frames(
    figure: Figure, view: View, chosen: list[Trajectory], names: Sequence[str] | None, frames: int, title: str | None
) -> None:
    column = _image_column(view, names)
    figure.set_size_inches(_WIDTH, 0.5 + len(chosen) * _strip_height(column, frames))
    note = _strips(figure, chosen, column, frames)
    _say(figure, title or f"{column.path} ({column.describe()}) at evenly spaced steps{note}")


def _strip_height(column: Column, frames: int) -> float:
    """Of a row of frames, inches."""
    height, width = picture_size(column)
    return float(np.clip((_WIDTH - 1.2) / max(frames, 1) * height / width, 0.9, 5)) + 0.3


def _strips(figure: Figure | SubFigure, chosen: list[Trajectory], column: Column, frames: int) -> str:
    """A row of frames for each trajectory; what was done to the frames, for the title."""
    if frames < 1:
        raise SelectionError(f"frames={frames}, expected one or more")
    steps = [
        np.unique(np.linspace(0, one.length - 1 + column.extra, frames).round().astype(int)).tolist() for one in chosen
    ]
    pictures = to_pictures([one[column.path][s] for one, some in zip(chosen, steps, strict=True) for s in some])
    left = iter(pictures.frames)
    grid = figure.subplots(len(chosen), frames, squeeze=False)
    room = (_WIDTH - 1.2) / frames / _CHARACTER  # of a label, characters
    notes = [pictures.note] if pictures.note else []
    for one, some, line in zip(chosen, steps, grid, strict=True):
        labels, brief = _frame_labels(some, one.length, room)
        if brief and _BRIEF_NOTE not in notes:
            notes.append(_BRIEF_NOTE)
        for axes in line:
            axes.set_axis_off()
        for label, axes in zip(labels, line, strict=False):
            frame = next(left)
            axes.imshow(
                frame, cmap="gray", vmin=0, vmax=1, interpolation="nearest" if min(frame.shape[:2]) < 64 else None
            )
            place = {"x": 1.0, "ha": "right"} if brief else {}  # wider than its frame, the last would leave the picture
            axes.set_title(label, fontsize=_FRAME_FONT, pad=3, **place)
        line[0].annotate(
            f"trajectory {one.id}\n" + _summary(one).replace(", ", "\n"), (0, 0.5), xycoords="axes fraction",
            xytext=(-8, 0), textcoords="offset points", ha="right", va="center", fontsize=9,
        )  # fmt: skip
    return "".join(f"; {note}" for note in notes)


def _frame_labels(steps: Sequence[int], length: int, room: float) -> tuple[list[str], bool]:
    """What stands above frames, and whether it is numbers alone; some have no label if not even those fit.

    >>> _frame_labels([0, 7], 7, 12.0), _frame_labels([0, 50, 100], 100, 4.5), _frame_labels([0, 50, 100], 100, 2.0)
    ((['step 0', 'final (7)'], False), (['0', '50', '100'], True), (['0', '', '100'], True))
    """
    whole = [f"step {step}" if step < length else f"final ({step})" for step in steps]
    if max(map(len, whole)) < room:
        return whole, False
    every = int(np.ceil((len(str(steps[-1])) + 1) / room))  # a label takes as much as so many frames
    last = len(steps) - 1
    return [str(step) if (last - n) % every == 0 else "" for n, step in enumerate(steps)], True


def _no_returns(view: View) -> str:
    """Why there are none."""
    reward = view.schema.get("reward")
    if reward is not None and not reward.shape and not reward.is_variable:
        return "No returns: the sums of 'reward' are not finite in any of these trajectories that have it."
    return "No returns: they are sums of a scalar column named 'reward', which these trajectories lack."


def _table(view: View) -> pd.DataFrame:
    """The trajectory table; ``reward_sum`` is NaN where there is none."""
    table = view.to_pandas()
    return table.assign(reward_sum=table["reward_sum"].astype(np.float64))


def _places(table: pd.DataFrame, x: str) -> Array:
    """Where each trajectory is on the x axis."""
    if x == "id":
        ids = table.index.to_numpy()
        waiting = ids < 0  # not yet committed: they will be numbered on from the last
        return np.where(waiting, max(int(ids.max()), -1) + np.cumsum(waiting), ids)
    if x == "created_at":
        return np.asarray(table["created_at"].dt.tz_convert("UTC").dt.tz_localize(None))
    if x == "steps":
        return np.cumsum(table["length"].to_numpy())
    raise SelectionError(f"x={x!r}, expected 'id', 'created_at' or 'steps'")


def _chosen(view: View, ids: Sequence[int] | None, most: int) -> list[Trajectory]:
    """The trajectories of these ids, or ``most`` evenly spaced ones."""
    if most < 1:
        raise SelectionError(f"rows={most}, expected one or more")
    if ids is None:
        places = np.unique(np.linspace(0, len(view) - 1, most).round().astype(int)) if most > 1 else [0]
        return [view[int(place)] for place in places]
    found = {int(number): place for place, number in reversed(list(enumerate(view.ids)))}
    missing = [number for number in ids if number not in found]
    if missing or not len(ids):
        raise SelectionError(
            f"the view has no trajectory {missing[0] if missing else ids}; its ids are from {view.ids.min()} to "
            f"{view.ids.max()}"
        )
    return [view[found[int(number)]] for number in ids]


def _step_columns(one: Trajectory, names: Sequence[str] | None) -> list[Column]:
    """Columns to draw over steps; by default reward and actions, or else whatever is small."""
    schema = one._view.schema
    if names is not None:
        columns = [column for name in names for column in schema.select(name) if column.path in one.columns]
        wrong = [column for column in columns if not _is_drawable(column)]
        if wrong or not columns:
            what = f"column {wrong[0].path!r} is {wrong[0].describe()}" if wrong else f"no column of {list(names)}"
            hint = "; kind='frames' shows images" if wrong and looks_like_images(wrong[0]) else ""
            raise SelectionError(
                f"{what}, expected numbers or vectors of at most {_LARGEST_VECTOR}, of trajectory {one.id}{hint}"
            )
        return columns
    drawable = [column for column in (schema[path] for path in one.columns) if _is_drawable(column)]
    usual = [c for c in drawable if c.path == "reward" or c.path.split("/")[0] in ("action", "actions")]
    if not drawable:
        raise SelectionError(
            f"trajectory {one.id} has no column of numbers or small vectors; it has {list(one.columns)}"
        )
    return sorted(usual, key=lambda c: c.path != "reward") or drawable[:_MOST_PANELS]


def _is_drawable(column: Column) -> bool:
    if column.is_variable or column.dtype.startswith(("complex", "datetime64", "timedelta64")):
        return False
    return len(column.shape) <= 1 and int(np.prod(column.shape)) <= _LARGEST_VECTOR


def _image_column(view: View, names: Sequence[str] | None) -> Column:
    if names is None:
        column = image_column(view.common_columns)
        if column is None:
            found = ", ".join(f"{c.path} {c.describe()}" for c in view.common_columns)
            raise SelectionError(
                f"no column that all trajectories have looks like images, (H, W) or (H, W, channels); they have {found}"
            )
        return column
    columns = [column for name in names for column in view.schema.select(name)]
    if len(columns) != 1 or not looks_like_images(columns[0]):
        found = ", ".join(f"{column.path} {column.describe()}" for column in columns)
        raise SelectionError(
            f"columns={list(names)} are {found}; expected one column of images, (H, W) or (H, W, channels)"
        )
    return columns[0]


def _ending(one: Trajectory) -> tuple[str, dict[str, Any]]:
    if one.terminated:
        return "terminated", {"color": "black", "linestyle": "-", "linewidth": 1.5}
    if one.truncated:
        return "truncated", {"color": "black", "linestyle": "--", "linewidth": 1.5}
    return "neither terminated nor truncated", {"color": GREY, "linestyle": ":", "linewidth": 1.5}


def _summary(one: Trajectory) -> str:
    parts = [f"{one.length:,} steps".replace(",", "\u2009")]
    if one.reward_sum is not None:
        parts.append(f"return {one.reward_sum:.4g}" if np.isfinite(one.reward_sum) else "no finite return")
    if one.terminated or one.truncated:
        parts.append("terminated" if one.terminated else "truncated")
    return ", ".join(parts)


def _fields(one: Trajectory) -> str:
    text = ", ".join(f"{name}={value}" for name, value in one.metadata.items() if not isinstance(value, bytes))
    return text if len(text) < 150 else text[:147] + "..."


def _counted(view: View) -> str:
    plural = "y" if len(view) == 1 else "ies"
    return f"{len(view):,} trajector{plural}, {view.num_steps:,} steps"


def _say(figure: Figure, title: str, below: str = "") -> None:
    """A title, and a smaller line of what else to know."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    if below:
        figure.supxlabel(below, x=0.01, ha="left", fontsize=8, color=GREY)


def _new_figure(show: bool) -> Figure:
    if not show:
        return Picture(layout="constrained")
    from matplotlib import pyplot

    return pyplot.figure(FigureClass=Picture, layout="constrained")


def _show(figure: Figure) -> None:
    from matplotlib import pyplot

    pyplot.show()
    pyplot.close(figure)


def _check_target(path: str | os.PathLike[str] | None, show: bool) -> None:
    """Before anything is read and drawn."""
    if path is not None:
        suffix = os.path.splitext(os.fspath(path))[1].removeprefix(".").lower()
        if suffix not in _SUFFIXES:
            known = ", ".join(f".{name}" for name in _SUFFIXES)
            raise SelectionError(f"path={os.fspath(path)!r} ends in none of {known}; name the picture so")
    if show:
        backend = str(matplotlib.get_backend())
        if backend.lower() in _NO_WINDOWS:
            raise SelectionError(
                f"show=True, but matplotlib's backend here is {backend!r}, which opens no windows; pass path='picture.png' "
                "instead"
            )
