"""Tables in a terminal of any width.

Invariant: no number is ever cut or broken. Texts fold; if that is not enough, columns give way, and are named below.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trajstore.console import quantity

_FOLDED = 16  # characters that a text needs in a line, if it has as many; more in a wide terminal


def print_table(
    console: Console,
    cells: Mapping[str, Sequence[str]],
    *,
    texts: Collection[str] = (),
    right: Collection[str] = (),
    least: Sequence[str] = (),
    title: str | None = None,
    how: str = "--json shows all",
) -> None:
    """Print columns of equally many cells.

    Args:
        console: Where.
        cells: For each column, by the words in its header, its cells from top to bottom.
        texts: Columns that may fold.
        right: Columns that are set to the right.
        least: Columns that give way if there is no room, the first first; after these the others, from the last on. The
            first column stays.
        title: Above.
        how: How to see the columns that gave way.
    """
    names = list(cells)
    folded = max(_FOLDED, console.width // 3)
    widths = {
        name: _least_width([name, *cells[name]], folded) if name in texts else max(map(len, [name, *cells[name]]))
        for name in names
    }
    left = []
    yielding = [name for name in least if name in names[1:]]
    for name in (*yielding, *(name for name in reversed(names[1:]) if name not in yielding)):
        if sum(widths.values()) + 2 * len(widths) - 2 <= console.width:
            break
        left.append(name)
        del widths[name]
    # Lines between columns, if there is room for them.
    roomy = sum(widths.values()) + 3 * len(widths) + 1 <= console.width
    table = Table(title=title, title_justify="left")
    if not roomy:
        table.box, table.show_edge, table.pad_edge, table.padding = box.SIMPLE_HEAD, False, False, (0, 1, 0, 0)
    for name in widths:
        # What stays is to be read whole, also if the terminal is narrower than the only column.
        folds = name in texts or len(widths) == 1
        table.add_column(escape(name), justify="right" if name in right else "left", overflow="fold", no_wrap=not folds)
    for row in zip(*(cells[name] for name in widths), strict=True):
        table.add_row(*map(escape, row))
    console.print(table)
    print_left(console, left, how)


def print_left(console: Console, left: Sequence[str], how: str) -> None:
    """Name the columns that there was no room for; ``how`` says how to see them."""
    if left:
        named = f"{quantity(len(left), 'more column')}: {', '.join(left)}; {how}"
        console.print(escape(named), highlight=False)


def _least_width(texts: Sequence[str], folded: int) -> int:
    """That texts need in which no word is broken that has not more than ``folded`` characters."""
    return min(max((len(word) for text in texts for word in text.split()), default=0), folded)
