"""Reads stores the way FORMAT.md shows, in a process that cannot import trajstore. Run by ``test_open_formats``.

Reads a pickled list of ``(store, {column: rows of the table to read it for})`` from the first argument, FORMAT.md from the
second, and pickles what it found to the third.
"""

import importlib.abc
import pickle
import re
import sys
from pathlib import Path


class _NoTrajstore(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == "trajstore":
            raise ImportError("this process reads stores without trajstore")


def plain(values, spec):
    """Bits without their type, as ``test_open_formats`` makes them of what was appended."""
    import numpy as np

    def leaf(array):
        while hasattr(array, "flatten") and "list" in str(array.type):
            array = array.flatten()
        if spec["dtype"] in ("string", "bytes"):
            return array.to_pylist()
        return np.ascontiguousarray(array.to_numpy(zero_copy_only=False)).tobytes()

    if isinstance(values, np.ndarray):
        return (list(values.shape), values.tobytes())
    values = values.combine_chunks()
    if spec["ragged"]:
        return [(len(one), leaf(one)) for one in (values[i].values for i in range(len(values)))]
    return leaf(values) if spec["dtype"] in ("string", "bytes") else ([len(values)], leaf(values))


def read(store, wanted, blocks):
    names = {"STORE": store}
    exec(blocks["table"], names)
    columns = {}
    for path, rows in wanted.items():
        for row in rows:
            names.update(ROW=row, COLUMN=path)
            exec(blocks["column"], names)
            columns[path, row] = plain(names["values"], names["spec"])
    return names["table"].to_pydict(), columns


def main(request, format_md, answer):
    sys.meta_path.insert(0, _NoTrajstore())
    text = Path(format_md).read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```python (\w+)\n(.*?)```", text, re.DOTALL))
    stores = pickle.loads(Path(request).read_bytes())
    found = [read(store, wanted, blocks) for store, wanted in stores]
    assert not any(name.split(".")[0] == "trajstore" for name in sys.modules)
    Path(answer).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
