"""Evaluate a node in NumPy, for the operators that scales, sizes and normalizations are made of.

Only small tensors are evaluated: the file may be hostile, and no value in it may cost much memory or time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

LARGEST = 1 << 20  # elements of a result
Array = np.ndarray
_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Max": np.maximum,
    "Min": np.minimum,
}
_UNARY: dict[str, Callable[[Array], Array]] = {
    "Sqrt": np.sqrt,
    "Neg": np.negative,
    "Abs": np.abs,
    "Exp": np.exp,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Identity": lambda x: x,
    "Reciprocal": lambda x: 1 / x,
    "Relu": lambda x: np.maximum(x, 0),
    "Not": np.logical_not,
}
_REDUCE: dict[str, Callable[..., Array]] = {
    "ReduceMean": np.mean,
    "ReduceSum": np.sum,
    "ReduceMax": np.max,
    "ReduceMin": np.min,
    "ReduceProd": np.prod,
    "ReduceL2": lambda x, axis, keepdims: np.sqrt(np.sum(x * x, axis=axis, keepdims=keepdims)),
    "ReduceSumSquare": lambda x, axis, keepdims: np.sum(x * x, axis=axis, keepdims=keepdims),
}
OPERATORS = {
    *_BINARY,
    *_UNARY,
    *_REDUCE,
    "Div",
    "Pow",
    "Cast",
    "Reshape",
    "Unsqueeze",
    "Squeeze",
    "Flatten",
    "Transpose",
    "Expand",
    "Concat",
    "Gather",
    "Slice",
    "Shape",
    "Size",
    "Clip",
    "InstanceNormalization",
    "GroupNormalization",
}
# What numpy raises for values of wrong shapes; an attribute of another type raises TypeError.
ERRORS = ValueError, TypeError, IndexError, KeyError, OverflowError, ZeroDivisionError, AttributeError, MemoryError


def evaluate(node: NodeProto, values: Sequence[Array | None], *, rounded: bool = True) -> Array | None:
    """The first output of a node; None where the operator is not supported, or the result not defined.

    rounded   False ignores Casts between float types
    """
    if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
        return None
    try:
        with np.errstate(all="ignore"):
            result = _evaluate(node, list(values), rounded)
    except ERRORS:
        return None
    return None if result is None or result.size > LARGEST else np.asarray(result)


def _evaluate(node: NodeProto, values: list[Array | None], rounded: bool) -> Array | None:
    kind = node.op_type
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    first = values[0] if values else None
    if first is None:
        return None
    second = values[1] if len(values) > 1 else None
    if kind in _UNARY:
        return _UNARY[kind](first)
    if kind in _REDUCE:
        axes = attributes.get("axes") if second is None else [int(axis) for axis in second.reshape(-1)]
        over = tuple(axes) if axes else tuple(range(first.ndim))
        return np.asarray(_REDUCE[kind](first, axis=over, keepdims=bool(attributes.get("keepdims", 1))))
    if kind == "Cast":
        return _cast(first, attributes["to"], rounded)
    if kind in ("Shape", "Size"):
        sizes = first.shape[attributes.get("start", 0) : attributes.get("end")]
        return np.asarray(sizes if kind == "Shape" else first.size, np.int64)
    if kind in ("Transpose", "Flatten"):
        axis = attributes.get("axis", 1) % (first.ndim + 1)
        return (
            first.transpose(attributes.get("perm"))
            if kind == "Transpose"
            else first.reshape(int(np.prod(first.shape[:axis])), -1)
        )
    if kind == "Squeeze":
        removed = attributes.get("axes") if second is None else [int(axis) for axis in second.reshape(-1)]
        return np.squeeze(first, tuple(removed) if removed else None)
    if kind == "Unsqueeze":
        return np.expand_dims(
            first, tuple(attributes["axes"] if second is None else [int(a) for a in second.reshape(-1)])
        )
    if kind == "Clip":
        low, high = second, values[2] if len(values) > 2 else None
        low, high = attributes.get("min", low), attributes.get("max", high)
        return first if low is None and high is None else np.clip(first, low, high)
    if kind == "Concat":
        parts = [value for value in values if value is not None]
        return np.concatenate(parts, attributes["axis"]) if len(parts) == len(values) else None
    if second is None:
        return None
    return _evaluate_binary(kind, attributes, first, second, values[2:])


def _evaluate_binary(
    kind: str, attributes: dict[str, Any], first: Array, second: Array, rest: list[Array | None]
) -> Array | None:
    if kind in ("Reshape", "Expand"):
        sizes = [int(size) for size in second.reshape(-1)]
        if kind == "Expand":
            shape = np.broadcast_shapes(first.shape, tuple(sizes))
            return np.broadcast_to(first, shape) if np.prod(shape, dtype=float) <= LARGEST else None
        kept = 0 if attributes.get("allowzero", 0) else 1
        return first.reshape([first.shape[axis] if size == 0 and kept else size for axis, size in enumerate(sizes)])
    if kind == "Gather":
        return np.take(first, second.astype(np.int64), attributes.get("axis", 0))
    if kind == "Slice":
        if any(value is None for value in rest) or not rest:
            return None
        return _slice(first, second, [value for value in rest if value is not None])
    if kind in ("InstanceNormalization", "GroupNormalization"):
        return _normalize(kind, attributes, first, second, rest[0])
    if np.prod(np.broadcast_shapes(first.shape, second.shape), dtype=float) > LARGEST:
        return None
    if kind == "Pow":
        return np.power(first, second.astype(first.dtype) if first.dtype.kind == "f" else second)
    if kind == "Div":
        whole = first.dtype.kind in "iu"
        return np.trunc(first / second).astype(first.dtype) if whole else first / second
    result: Array | None = _BINARY[kind](first, second)
    for value in rest:  # Max and Min take any number of inputs
        result = None if value is None or result is None else _BINARY[kind](result, value)
    return result


def _slice(first: Array, starts: Array, rest: list[Array]) -> Array:
    ends = rest[0].reshape(-1)
    axes = rest[1].reshape(-1) if len(rest) > 1 else np.arange(len(ends))
    steps = rest[2].reshape(-1) if len(rest) > 2 else np.ones(len(ends), np.int64)
    slices = [slice(None)] * first.ndim
    for start, end, axis, step in zip(starts.reshape(-1), ends, axes, steps):
        stop: int | None = int(end)
        if step < 0 and int(end) < -first.shape[int(axis)]:
            stop = None
        slices[int(axis)] = slice(int(start), stop, int(step))
    return first[tuple(slices)]


def _normalize(kind: str, attributes: dict[str, Any], x: Array, scale: Array, shift: Array | None) -> Array | None:
    """GroupNormalization, or InstanceNormalization, which has one channel in each group."""
    if shift is None or x.ndim < 2:
        return None
    groups = attributes["num_groups"] if kind == "GroupNormalization" else x.shape[1]
    flat = x.reshape(x.shape[0], groups, -1)
    flat = (flat - flat.mean(-1, keepdims=True)) / np.sqrt(
        flat.var(-1, keepdims=True) + attributes.get("epsilon", 1e-5)
    )
    whole = flat.reshape(x.shape)
    along = (1, x.shape[1]) + (1,) * (x.ndim - 2)
    scale, shift = (np.repeat(value, x.shape[1] // value.size) for value in (scale, shift))
    return whole * scale.reshape(along) + shift.reshape(along)


def _cast(value: Array, to: int, rounded: bool) -> Array:
    wanted = helper.tensor_dtype_to_np_dtype(to)
    floats = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
    return value if not rounded and to in floats and value.dtype.kind == "f" else value.astype(wanted)
