"""JSON documents that carry their own hash.

Invariant: a document is accepted only if its ``sha256`` member is the hash of the canonical form of everything else
(sorted keys, no blanks, ASCII), so no flipped byte passes; its key names the document in every error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from trajstore.errors import CorruptionError, FormatVersionError
from trajstore.format.layout import FORMAT_VERSION


def canonical(document: Mapping[str, Any]) -> bytes:
    """The bytes that are hashed.

    Examples:
        >>> canonical({"b": 1, "a": "x"})
        b'{"a":"x","b":1}'
    """
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def seal(document: Mapping[str, Any]) -> bytes:
    """The document's bytes, with its hash as the member ``sha256``."""
    body = canonical(document)
    return body[:-1] + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}'


def unseal(data: bytes, *, key: str) -> dict[str, Any]:
    """The inverse of ``seal``.

    Args:
        data: The object's bytes.
        key: Names the document in errors.

    Raises:
        CorruptionError: Not JSON, or the hash does not hold.
        FormatVersionError: A document of a later format than this package knows.
    """
    try:
        document: dict[str, Any] = json.loads(data)
        found = document.pop("sha256")
        body = canonical(document)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptionError(f"{key} is not a trajstore document ({error!r}); restore it from a copy") from error
    if hashlib.sha256(body).hexdigest() != found:
        raise CorruptionError(f"{key} does not match its own sha256: its bytes were changed; restore it from a copy")
    version = document.get("format")
    if type(version) is not int or version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{key} has format {version}, this trajstore reads up to {FORMAT_VERSION}; upgrade trajstore"
        )
    return document
