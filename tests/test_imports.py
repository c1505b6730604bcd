"""Imports run one way, fsspec stays behind the storage layer, and the public face is what it says."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import trajstore

PACKAGE = Path(trajstore.__file__).parent

# A module may import from its own layer and from those before it.
LAYERS = [
    {"errors", "names", "deferred", "schema", "stored", "values", "progress"},
    {"format"},
    {"storage"},
    {"read", "write"},
    {"sample"},
    {"feed"},
    {"edit"},
    {"interop"},
    {"trajectory", "follows", "sampling"},
    {"view", "mix", "plot"},
    {"versioned"},
    {"editing"},
    {"store"},
    {"opening"},
    {"arrange", "console", "report", "report_history", "tables", "gym", "buffers"},
    {"demo"},
    {"cli"},
]

# Methods that other layers call.
NOT_FOR_USERS = {"source", "supply", "steps_arrow"}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if "schemas" not in path.parts)


def part_of(path):
    if path.name == "__main__.py":
        return "cli"  # a command, wherever it lies
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path):
    """Every module that a file imports at run time."""
    found = []

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node):
            if ast.unparse(node.test) == "TYPE_CHECKING":
                for inner in node.orelse:
                    self.visit(inner)
                return
            self.generic_visit(node)

        def visit_Import(self, node):
            found.extend(alias.name for alias in node.names)

        def visit_ImportFrom(self, node):
            assert node.level == 0, f"{path}: relative import"
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)

    Visitor().visit(ast.parse(path.read_text()))
    return found


def layer_of(part):
    for number, layer in enumerate(LAYERS):
        if part in layer:
            return number
    raise AssertionError(f"{part} has no place in the layers: give it one")


def test_imports_run_one_way():
    wrong = []
    for path in modules():
        part = part_of(path)
        if part == "__init__":
            continue
        for name in imported_modules(path):
            if not name.startswith("trajstore."):
                continue
            target = name.split(".")[1]
            is_module = (PACKAGE / target).exists() or (PACKAGE / f"{target}.py").exists()
            if is_module and (layer_of(target) > layer_of(part) or {target, part} == {"read", "write"}):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_only_storage_imports_fsspec():
    users = {
        part_of(path)
        for path in modules()
        if any(n.split(".")[0] in ("fsspec", "s3fs", "gcsfs") for n in imported_modules(path))
    }
    assert users == {"storage"}


def test_format_touches_no_file():
    for path in modules():
        if part_of(path) == "format" and path.name != "schemas.py":  # which reads files that the package ships
            assert not {"os", "pathlib", "io", "tempfile", "shutil"} & {n.split(".")[0] for n in imported_modules(path)}


def test_public_names_exist_and_are_pinned():
    for name in trajstore.__all__:
        assert hasattr(trajstore, name)
    errors = {n for n in vars(trajstore.errors) if n.endswith("Error") and not n.startswith("_")}
    assert errors <= set(trajstore.__all__)
    assert set(trajstore.__all__) - errors == {
        "open",
        "merge",
        "split",
        "Store",
        "View",
        "Trajectory",
        "TrajectoryColumn",
        "Episode",
        "TrajectoryRef",
        "Loader",
        "LoaderStats",
        "CacheStats",
        "future",
        "Mix",
        "mix",
        "Column",
        "Schema",
        "__version__",
        "Statistics",
        "ColumnStatistics",
        "Normalization",
        "ColumnNormalization",
        "StoreUsage",
        "Diff",
        "Report",
        "Compacted",
        "Vacuumed",
    }


def test_what_public_methods_return_is_public():
    for holder in (
        trajstore.Store,
        trajstore.View,
        trajstore.Trajectory,
        trajstore.Loader,
        trajstore.Mix,
        trajstore.Episode,
    ):
        for name, member in inspect.getmembers(holder):
            function = member.fget if isinstance(member, property) else member
            if name.startswith("_") or not inspect.isfunction(function) or name in NOT_FOR_USERS:
                continue
            returned = str(function.__annotations__.get("return"))
            for word in re.findall(r"[\w.]+", returned):
                found = vars(sys.modules[function.__module__]).get(word)
                if inspect.isclass(found) and found.__module__.startswith("trajstore."):
                    assert word in trajstore.__all__, f"{holder.__name__}.{name} returns {returned}"


def test_every_error_is_in_the_tree_that_the_docstring_draws():
    drawn = trajstore.errors.__doc__
    for name, value in vars(trajstore.errors).items():
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, trajstore.TrajstoreError)
            assert name in drawn


def test_importing_starts_no_thread_and_needs_no_extra():
    code = (
        "import sys, threading\n"
        "for name in ('gymnasium', 's3fs', 'matplotlib', 'tensordict'): sys.modules[name] = None\n"
        "import trajstore\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_who_makes_no_batch_waits_for_no_torch(tmp_path):
    code = """
import sys
import numpy as np
import trajstore

for n in range(2):
    with trajstore.open(f"{sys.argv[1]}/{n}", mode="x") as store:
        store.append({"obs": np.zeros((5, 2), np.float32), "action": [1, 2, 3, 4]}, terminated=True, task="pick")
        with store.begin(task="pick") as episode:
            for _ in range(3):
                episode.add(obs=np.ones(2, np.float32), action=1)
            episode.end(final={"obs": np.ones(2, np.float32)})
        store.tag("paper")
trajstore.merge([f"{sys.argv[1]}/0", f"{sys.argv[1]}/1"], f"{sys.argv[1]}/both")
with trajstore.open(f"{sys.argv[1]}/both", mode="a") as store:
    store.compact()
view = trajstore.open(f"{sys.argv[1]}/both").trajectories
assert view[0]["obs"].shape == (5, 2) and view.read("action").shape == (14,)
view.filter("task == 'pick'").to_pandas()
assert trajstore.open(f"{sys.argv[1]}/both").verify(deep=True).ok
assert "torch" not in sys.modules
assert trajstore.Loader.__name__ == "Loader" and "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


def test_commands_that_only_look_wait_for_no_torch(tmp_path):
    with trajstore.open(tmp_path, mode="a") as store:
        store.append({"action": [1, 2, 3]}, terminated=True)
    code = """
import sys
sys.argv = ["trajstore", *sys.argv[1:]]
from trajstore.cli import main
try:
    main()
finally:
    assert "torch" not in sys.modules, "torch"
"""
    for words in (["--help"], ["info", str(tmp_path)]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
