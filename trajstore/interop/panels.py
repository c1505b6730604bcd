"""Single panels of a picture: values over trajectories, histograms, values over steps.

Invariant: a panel says in words what it left out or averaged. At most a few thousand marks are drawn, however many values
there are.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.ticker import MaxNLocator

from trajstore.errors import SelectionError
from trajstore.stored import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito, "Color universal design" (2008).
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#666666",
)
_COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, PURPLE)
OTHERS, PALE = "#999999", "#c8c8c8"
_MOST_DOTS = 4000
_MOST_POINTS = 2000  # of a line
_BINS = 40
_MOST_LINES = 6
_MOST_GROUPS = 5
_FEW_DOTS = 100
_LEGEND_WIDTH = 24  # characters
_LONGEST_NAME = 72  # characters
_MOST_TICKS = 6  # for which there is room below half a picture
_MOST_LEVELS = 20  # different integers that still are choices rather than amounts


@dataclass(frozen=True, eq=False)
class Group:
    """Trajectories that are drawn in one colour.

    Attributes:
        name: For the legend.
        colour: Of matplotlib.
        rows: ``(n,)`` bool: which.
        field: What they have in common: the title of the legend.
    """

    name: str
    colour: str
    rows: Array
    field: str = ""


def group_rows(table: pd.DataFrame, by: str | None) -> tuple[Group, ...]:
    """Trajectories by the values of a field: each of the most frequent, numbers in ranges, and the rest.

    Raises:
        SelectionError: No such field.
    """
    if by is None:
        return (Group("", BLUE, np.ones(len(table), bool)),)
    if by not in table:
        raise SelectionError(f"by={by!r} is not a field of the trajectories; the fields are {', '.join(table.columns)}")
    values = table[by]
    numbers = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    if (numbers or pd.api.types.is_datetime64_any_dtype(values)) and values.nunique() > _MOST_GROUPS:
        ranges = pd.qcut(values, 4, duplicates="drop", precision=2)
        categories = list(ranges.cat.categories)
        # pandas begins the first range below the least value, and rounds.
        ends = [values.min(), *(one.right for one in categories[:-1]), values.max()]
        known = [
            (f"{_edge(low)} to {_edge(high)}", (ranges == one).to_numpy(bool))
            for low, high, one in zip(ends[:-1], ends[1:], categories, strict=True)
        ]
    else:
        counts = values.value_counts()  # most frequent first
        shown = counts.index[:_MOST_GROUPS]
        ordered = sorted(shown) if numbers else list(shown)
        names = _legend_names([str(one) for one in ordered])
        known = [(name, (values == one).fillna(False).to_numpy(bool)) for name, one in zip(names, ordered, strict=True)]
    groups = [Group(name, _COLOURS[n], rows, by) for n, (name, rows) in enumerate(known)]
    absent = values.isna().to_numpy(bool)
    rest = ~np.logical_or.reduce([absent, *(group.rows for group in groups)])
    if rest.any():
        groups.append(Group(f"{values.nunique() - len(groups)} others", OTHERS, rest, by))
    return (*groups, *([Group("none", "black", absent, by)] if absent.any() else []))


def _edge(value: Any) -> str:
    return str(value) if isinstance(value, pd.Timestamp) else f"{value:.6g}"


def _legend_names(texts: Sequence[str]) -> list[str]:
    r"""In lines for the legend; the middle of very long ones is left out, unless that makes two of them alike.

    >>> _legend_names(["put the red cube into the bowl", "wait"])
    ['put the red cube into\nthe bowl', 'wait']
    """
    half = _LONGEST_NAME // 2
    short = [text if len(text) <= _LONGEST_NAME else f"{text[:half]}\u2026{text[-half:]}" for text in texts]
    chosen = short if len(set(short)) == len(texts) else texts
    return [textwrap.fill(text, _LEGEND_WIDTH) for text in chosen]


def draw_returns(
    axes: Axes, table: pd.DataFrame, places: Array, groups: Sequence[Group], x: str, *, missing: str
) -> None:
    """Return of each trajectory as a dot, and their running mean.

    Args:
        axes: Where.
        table: The trajectory table; ``reward_sum`` is NaN where there is none.
        places: ``(n,)`` on the x axis.
        groups: Colours.
        x: What is on the x axis.
        missing: What to write if there are no returns.
    """
    styled(axes)
    returns = table["reward_sum"].to_numpy(np.float64)
    known = np.isfinite(returns)
    if not known.any():
        axes.text(0.5, 0.5, missing, ha="center", va="center", transform=axes.transAxes, color=GREY)
        return
    every = -(-int(known.sum()) // _MOST_DOTS)
    order = np.argsort(places, kind="stable")
    window = int(np.clip(known.sum() // (5 * len(groups)), 1, 100))
    few = known.sum() <= _FEW_DOTS
    for group in groups:
        rows = order[(known & group.rows)[order]]
        axes.scatter(
            places[rows[::every]], returns[rows[::every]], s=25 if few else 9, alpha=0.8 if few else 0.35,
            color=group.colour, linewidths=0, rasterized=True, label=group.name if window == 1 else None,
        )  # fmt: skip
        if window > 1:
            means = pd.Series(returns[rows]).rolling(window, min_periods=min(window, 5)).mean().to_numpy()
            points = np.unique(np.linspace(0, max(len(rows) - 1, 0), _MOST_POINTS).astype(int))[: len(rows)]
            name = group.name or f"mean of the last {window}"
            axes.plot(places[rows[points]], means[points], color=group.colour, linewidth=2, label=name)
    notes = [f"lines: mean of the last {window}"] * (window > 1 and len(groups) > 1)
    notes += [f"dots: every {_ordinal(every)} trajectory"] * (every > 1)
    notes += [f"{(~known).sum():,} of {len(known):,} have no finite return"] * bool((~known).any())
    axes.set_ylabel("return (sum of rewards)")
    axes.set_xlabel(
        {
            "id": "trajectory (number in the store)",
            "created_at": "appended at (UTC)",
            "steps": "steps taken, in this view",
        }[x]
    )
    if x == "created_at":
        locator = AutoDateLocator()  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    else:
        axes.xaxis.set_major_locator(whole_numbers())
        axes.xaxis.set_major_formatter("{x:,.0f}")
    _legend(axes, groups[0].field)
    _note(axes, "; ".join(notes))


def draw_histogram(axes: Axes, values: Array, groups: Sequence[Group], *, label: str, whole: bool = False) -> None:
    """How many trajectories have which value, stacked by group, and the median.

    Args:
        axes: Where.
        values: ``(n,)`` float; NaN is left out.
        groups: Colours.
        label: What the values are, with their unit.
        whole: They are whole numbers: bins hold whole numbers of them.
    """
    styled(axes)
    known = np.isfinite(values)
    edges = _edges(values[known], whole)
    parts = [values[known & group.rows] for group in groups]
    axes.hist(
        parts, bins=edges.tolist(), stacked=True, color=[group.colour for group in groups], edgecolor="white", linewidth=0.4,
        label=[group.name for group in groups],
    )  # fmt: skip
    median = float(np.median(values[known]))
    axes.axvline(median, color="black", linestyle="--", linewidth=1.2, label=f"median {median:.4g}")
    integer = whole or bool((values[known] == np.round(values[known])).all())
    axes.xaxis.set_major_locator(MaxNLocator(nbins=_MOST_TICKS, integer=integer, steps=[1, 2, 5, 10]))
    axes.set_xlabel(label)
    axes.set_ylabel("trajectories")
    axes.yaxis.set_major_locator(whole_numbers())
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _legend(axes, groups[0].field)


def draw_steps(axes: Axes, values: Any, label: str) -> None:
    """Values over steps: choices as dots, amounts as lines, many of them as a heat map.

    Args:
        axes: Where.
        values: ``(steps,)`` or ``(steps, n)``, NumPy or torch.
        label: What they are.
    """
    styled(axes)
    array = values if isinstance(values, np.ndarray) else values.float().numpy()
    array = array.reshape(len(array), -1)
    axes.set_ylabel(label)
    unknown = int((~np.isfinite(array.astype(np.float64)).all(axis=1)).sum())
    if unknown:
        axes.set_title(f"NaN or infinite in {unknown:,} of {len(array):,} rows", loc="left", fontsize=8, color=GREY)
    if array.shape[1] > _MOST_LINES:
        _draw_heat(axes, array)
        return
    choices = array.dtype.kind in "iub" and len(np.unique(array)) <= _MOST_LEVELS
    rare = array.shape[1] == 1 and 2 * np.count_nonzero(array) < len(array) <= _MOST_POINTS
    for entry in range(array.shape[1]):
        line = array[:, entry].astype(np.float64)
        name = str(entry) if array.shape[1] > 1 else None
        if choices:
            every = -(-len(line) // _MOST_DOTS)
            shown = np.arange(0, len(line), every)
            axes.plot(shown, line[shown], "|", markersize=9, color=_COLOURS[entry], label=name, rasterized=True)
            _note(axes, f"every {_ordinal(every)} step" if every > 1 else "")
        elif rare:
            axes.axhline(0, color=_COLOURS[0], linewidth=0.8)
            where = np.flatnonzero(line)
            axes.vlines(where, 0, line[where], color=_COLOURS[0], linewidth=1.2)
            axes.plot(where, line[where], ".", color=_COLOURS[0], markersize=6)
        elif len(line) <= _MOST_POINTS:
            markers = {"marker": ".", "markersize": 4} if len(line) <= 100 else {}
            axes.plot(line, color=_COLOURS[entry], linewidth=1.2, label=name, **markers)  # type: ignore[arg-type]
        else:
            each = -(-len(line) // (_MOST_POINTS // 4))
            starts = np.arange(0, len(line), each)
            sizes = np.diff(np.append(starts, len(line)))
            axes.fill_between(
                starts, np.minimum.reduceat(line, starts), np.maximum.reduceat(line, starts), alpha=0.3,
                color=_COLOURS[entry], linewidth=0,
            )  # fmt: skip
            axes.plot(starts, np.add.reduceat(line, starts) / sizes, color=_COLOURS[entry], linewidth=1.2, label=name)
            _note(axes, f"range and mean of {each} steps each")
    if choices:
        levels = np.unique(array).astype(np.float64)
        axes.set_yticks(levels if len(levels) <= 8 else levels[:: -(-len(levels) // 8)])
        axes.set_ylim(levels.min() - 0.5, levels.max() + 0.5)
    _legend(axes)


def _draw_heat(axes: Axes, array: Array) -> None:
    """Entries as rows, steps as columns."""
    each = -(-len(array) // _MOST_POINTS)
    starts = np.arange(0, len(array), each)
    sizes = np.diff(np.append(starts, len(array)))[:, None]
    means = np.add.reduceat(array.astype(np.float64), starts, axis=0) / sizes
    image = axes.imshow(
        means.T, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest",
        extent=(-0.5, len(array) - 0.5, -0.5, array.shape[1] - 0.5),
    )  # fmt: skip
    axes.figure.colorbar(image, ax=axes, pad=0.01)
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(whole_numbers())
    _note(axes, f"mean of {each} steps each" if each > 1 else "")


def styled(axes: Axes) -> Axes:
    """Axes with a light grid and no frame above and on the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    return axes


def _edges(values: Array, whole: bool) -> Array:
    low, high = float(values.min()), float(values.max())
    whole = whole or bool((values == np.round(values)).all())
    if whole:
        each = max(1, int(np.ceil((high - low + 1) / _BINS)))
        edges: Array = np.arange(low - 0.5, high + each + 0.5, each)
        pad = 1 if len(edges) < 4 else 0  # one bar alone would fill the panel
        return np.concatenate([edges[0] - np.arange(pad, 0, -1), edges, edges[-1] + np.arange(1, pad + 1)])
    return np.linspace(low, high, _BINS + 1)


def whole_numbers() -> MaxNLocator:
    """Ticks at whole numbers only."""
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def _legend(axes: Axes, title: str = "") -> None:
    if any(axes.get_legend_handles_labels()[1]):
        axes.legend(
            title=title or None,
            title_fontsize=8,
            alignment="left",
            fontsize=8,
            frameon=False,
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
            borderaxespad=0.2,
        )


def _note(axes: Axes, text: str) -> None:
    if text:
        axes.annotate(
            text,
            (1, 1),
            xycoords="axes fraction",
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=GREY,
        )


def _ordinal(n: int) -> str:
    ending = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n:,}{ending}"
