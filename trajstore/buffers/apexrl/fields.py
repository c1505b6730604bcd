"""``Field``: one named value of a transition, a tensor or a (nested) dict of tensors, and how it is checked.

Invariant: ``Field.rows`` returns tensors whose names, shapes and dtypes are those of the field, or raises and has changed
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from trajstore.errors import (
    ColumnShapeError,
    ColumnTypeError,
    MissingColumnError,
    SelectionError,
    UnknownColumnError,
)
from trajstore.names import flatten, nest
from trajstore.schema import Column

# Of one step's value: (48,), 48 for short, or for dict observations a dict of them.
Shapes: TypeAlias = "int | Iterable[int] | Mapping[str, Shapes]"
# A tensor, or a dict of them shaped as the field is.
Values: TypeAlias = Any


@dataclass(frozen=True)
class Field:
    """One named value of a transition.

    Attributes:
        name: Its public name, ``"observations"``.
        shapes: Shape of one step's value by flat name: ``{"observations": (4,)}``, or ``{"observations/image": (8, 8, 3)}``.
        dtypes: By flat name; None takes the dtype of what is given first.
        declared: The dtypes are the user's word: what is given is converted to them, if they can hold the values. Otherwise
            they are those of what was given first, and fractions are refused where these were whole numbers.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype | None]
    declared: bool = True

    @classmethod
    def of(cls, name: str, shape: Shapes, dtype: torch.dtype | Mapping[str, Any] | None) -> Field:
        """A field from the arguments of a buffer's constructor.

        Args:
            name: Its public name.
            shape: Of one step's value: a shape, or a (nested) dict of shapes.
            dtype: For all of it, or a dict as ``shape`` is; None takes the dtype of what is given first.

        Raises:
            ColumnShapeError: Not a shape.
            SelectionError: A dict of dtypes whose keys are others than those of the shapes.
        """
        nested = flatten({name: shape})
        shapes = {path: _shape(path, found) for path, found in nested.items()}
        given = flatten({name: dtype}) if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
        if given.keys() != shapes.keys():
            raise SelectionError(
                f"{name}: dtypes of {sorted(given)} for shapes of {sorted(shapes)}; expected the same keys"
            )
        return cls(name, shapes, given)

    @property
    def columns(self) -> list[Column]:
        """As columns of a ring."""
        return [
            Column(path=path, dtype=str(self.dtypes[path]).removeprefix("torch."), shape=shape)
            for path, shape in self.shapes.items()
        ]

    @property
    def is_nested(self) -> bool:
        """Whether values are dicts."""
        return self.name not in self.shapes

    def zeros(self, *leading: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Tensors ``[*leading, *shape]`` by flat name, once the dtypes are settled."""
        return {p: torch.zeros(*leading, *s, dtype=self.dtypes[p], device=device) for p, s in self.shapes.items()}

    def leading(self, value: Values) -> tuple[int, ...]:
        """``()`` of one step's value, ``(n,)`` of a batch, found at the first of its tensors.

        Raises:
            ColumnShapeError: Neither.
        """
        path, tensor = next(iter(self._leaves(value).items()))
        shape, found = self.shapes[path], tuple(tensor_of(path, tensor).shape)
        leading = found[: len(found) - len(shape)]
        if found[len(leading) :] != shape or len(leading) > 1:
            raise ColumnShapeError(
                f"{path} has shape {found}, expected {shape} of one step or (n, *{shape}) of a batch"
            )
        return leading

    def rows(self, value: Values, leading: tuple[int, ...], devices: Devices) -> dict[str, torch.Tensor]:
        """The tensors ``[*leading, *shape]`` of a value by flat name, checked and of the field's dtypes.

        Args:
            value: A tensor or a dict of them; arrays, lists and numbers are made into tensors.
            leading: ``()``, ``(n,)`` or ``(num_envs,)``.
            devices: What holds the tensors of one call to one device.

        Raises:
            ColumnShapeError: Another shape; one more dimension of 1 is taken for numbers (``(n, 1)`` for ``(n,)``).
            ColumnTypeError: A dtype that the field's cannot hold, or another device than the tensors before.
            MissingColumnError: A key of the dict is missing, or the value is None.
            UnknownColumnError: A key too many.
        """
        found = {}
        for path, given in self._leaves(value).items():
            tensor = devices.tensor(path, given)
            shape, dtype = self.shapes[path], self.dtypes[path]
            expected = (*leading, *shape)
            if tensor.shape != expected:
                if shape or tuple(tensor.shape) != (*leading, 1):
                    raise ColumnShapeError(f"{path} has shape {tuple(tensor.shape)}, expected {expected}")
                tensor = tensor.squeeze(-1)
            if dtype is not None and tensor.dtype is not dtype:
                tensor = self._converted(path, tensor, dtype)
            found[path] = tensor
        return found

    def _converted(self, path: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The same values in the field's dtype; a float may be rounded to another float."""
        if tensor.is_complex() <= dtype.is_complex and (self.declared or torch.can_cast(tensor.dtype, dtype)):
            converted = tensor.to(dtype)
            if dtype.is_floating_point or dtype.is_complex or torch.equal(converted.to(tensor.dtype), tensor):
                return converted
        if self.declared:
            raise ColumnTypeError(
                f"{path} is {tensor.dtype} with values that {dtype}, named when the buffer was made, cannot hold; name "
                "another dtype there, or convert the values"
            )
        raise ColumnTypeError(
            f"{path} is {tensor.dtype}, and {dtype} was given first, which cannot hold it; convert it, or name the dtype "
            "when making the buffer"
        )

    def nested(self, flat: Mapping[str, Any]) -> Values:
        """This field of a flat mapping: what lies under its name, or a dict of it."""
        if not self.is_nested:
            return flat[self.name]
        return nest({path: flat[path] for path in self.shapes})[self.name]

    def _leaves(self, value: Values) -> dict[str, Any]:
        if value is None:
            raise MissingColumnError(f"{self.name} is missing (None); pass values of shape {self.described}")
        if not isinstance(value, Mapping):
            if self.is_nested:
                raise ColumnTypeError(f"{self.name} is a {type(value).__name__}, expected a dict {self.described}")
            return {self.name: value}
        leaves = flatten({self.name: value})
        unknown, missing = leaves.keys() - self.shapes.keys(), self.shapes.keys() - leaves.keys()
        if unknown:
            raise UnknownColumnError(f"{sorted(unknown)[0]} is not one of {sorted(self.shapes)}; leave it out")
        if missing:
            raise MissingColumnError(f"{sorted(missing)[0]} is missing; {self.name} need {sorted(self.shapes)}")
        return leaves

    @property
    def described(self) -> str:
        """Its shape or shapes, for messages."""
        return str(dict(self.shapes) if self.is_nested else self.shapes[self.name])


class Devices:
    """Makes tensors of one call's values, all on one device: that of the first tensor, or ``default``.

    Args:
        default: For numbers, lists and arrays before the first tensor.
    """

    def __init__(self, default: torch.device) -> None:
        self._default = default
        self._first: tuple[str, torch.device] | None = None

    def tensor(self, path: str, value: Any) -> torch.Tensor:
        """The value as a tensor without gradient.

        Raises:
            ColumnTypeError: On another device than the tensors before, or no numbers.
        """
        if not isinstance(value, torch.Tensor):
            return tensor_of(path, value, device=self._first[1] if self._first else self._default)
        if self._first is None:
            if value.device.type == "meta":
                raise ColumnTypeError(f"{path} is on the device 'meta', which holds no values; pass a real tensor")
            self._first = path, value.device
        elif value.device != self._first[1]:
            raise ColumnTypeError(
                f"{path} is on {value.device}, {self._first[0]} is on {self._first[1]}; move them to one device"
            )
        return value.detach()


def tensor_of(path: str, value: Any, *, device: torch.device | None = None) -> torch.Tensor:
    """The value as a tensor; one that is a tensor stays where it is, whatever ``device`` says.

    Raises:
        MissingColumnError: None.
        ColumnTypeError: Something else that is no numbers.
    """
    if isinstance(value, torch.Tensor):
        return value
    if value is None:
        raise MissingColumnError(f"{path} is missing (None); pass a tensor")
    try:
        return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ColumnTypeError(f"{path} is a {type(value).__name__}, expected a tensor or numbers: {e}") from e


def settled(field: Field, dtype_of: Callable[[str], torch.dtype]) -> Field:
    """The field with the dtypes that were left open, which from then on refuse what they cannot hold."""
    if all(dtype is not None for dtype in field.dtypes.values()):
        return field
    dtypes = {path: dtype or dtype_of(path) for path, dtype in field.dtypes.items()}
    return Field(field.name, field.shapes, dtypes, declared=False)


def mapped(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """What ``function`` makes of a tensor, or of every tensor of a (nested) dict; None stays None."""
    if isinstance(value, Mapping):
        return {key: mapped(inner, function) for key, inner in value.items()}
    return None if value is None else function(value)


def _shape(path: str, shape: Any) -> tuple[int, ...]:
    try:
        dimensions = tuple(shape) if isinstance(shape, Iterable) else (shape,)
        numbers = tuple(int(n) for n in dimensions)
    except (TypeError, ValueError):
        numbers = (-1,)
        dimensions = ()
    if numbers != dimensions or any(n < 1 for n in numbers):
        raise ColumnShapeError(f"the shape of {path} is {shape!r}, expected dimensions of at least 1, (48,) say")
    return numbers
