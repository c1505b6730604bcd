"""The JSON Schemas of a store's documents, as shipped in the wheel.

Invariant: a schema says what a document may hold beside what its hash says, that is whether its writer kept to the format;
``verify`` and the tests ask here, reading does not wait for it.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from trajstore.errors import CorruptionError

SCHEMA_NAMES = ("store", "snapshot", "page-index", "segment-table", "tag", "pin", "vacuum", "statistics")


def schemas_folder() -> Traversable:
    """Where the schemas are: in the installed package, or at the top of a checkout."""
    installed = resources.files("trajstore") / "schemas"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "schemas"


def load_schema(name: str) -> dict[str, Any]:
    """A JSON Schema.

    Args:
        name: One of ``SCHEMA_NAMES``.
    """
    if name not in SCHEMA_NAMES:
        raise ValueError(f"schema {name!r}, expected one of {', '.join(SCHEMA_NAMES)}")
    text = (schemas_folder() / f"{name}.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def validate(document: Any, name: str, *, key: str | None = None) -> None:
    """Hold a parsed document against its schema.

    Args:
        document: As ``json.loads`` gives it, with its ``sha256`` if it has one.
        name: One of ``SCHEMA_NAMES``.
        key: Names the document in errors.

    Raises:
        CorruptionError: It does not fit, with the path of the worst place (``$.manifests[0].rows``).

    Examples:
        >>> validate([{"object": "steps.arrow", "columns": ["a"], "rows": 3, "page_rows": 4, "codec": "lz4"}], "page-index")
        >>> validate([{"object": "steps.arrow", "columns": ["a"], "rows": 0, "page_rows": 4, "codec": "lz4"}], "page-index")
        Traceback (most recent call last):
        trajstore.errors.CorruptionError: page-index: $[0].rows: 0 is less than the minimum of 1
    """
    error = best_match(_validator(name).iter_errors(document))
    if error is not None:
        raise CorruptionError(f"{key or name}: {error.json_path}: {error.message}")


@lru_cache(maxsize=len(SCHEMA_NAMES))
def _validator(name: str) -> Draft202012Validator:
    schema = load_schema(name)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)
