"""Whether the values of a tensor in a file are what its type and sizes say."""

from __future__ import annotations

import math

from onnx import TensorProto

# Bits of one number, and the field that holds it where it is not written as raw bytes.
_FIELDS = {
    TensorProto.FLOAT: (32, "float_data"),
    TensorProto.DOUBLE: (64, "double_data"),
    TensorProto.INT64: (64, "int64_data"),
    TensorProto.UINT64: (64, "uint64_data"),
    TensorProto.UINT32: (32, "uint64_data"),
    TensorProto.INT32: (32, "int32_data"),
    TensorProto.COMPLEX64: (64, "float_data"),
    TensorProto.COMPLEX128: (128, "double_data"),
    **dict.fromkeys(
        (TensorProto.INT16, TensorProto.UINT16, TensorProto.FLOAT16, TensorProto.BFLOAT16), (16, "int32_data")
    ),
    **dict.fromkeys(
        (
            TensorProto.INT8,
            TensorProto.UINT8,
            TensorProto.BOOL,
            TensorProto.FLOAT8E4M3FN,
            TensorProto.FLOAT8E4M3FNUZ,
            TensorProto.FLOAT8E5M2,
            TensorProto.FLOAT8E5M2FNUZ,
        ),
        (8, "int32_data"),
    ),
    **dict.fromkeys(
        (TensorProto.INT4, TensorProto.UINT4, getattr(TensorProto, "FLOAT4E2M1", TensorProto.INT4)), (4, "int32_data")
    ),
}


def tensor_fault(tensor: TensorProto) -> str:
    """Why a tensor has no values that can be read, or an empty string."""
    if tensor.data_location == TensorProto.EXTERNAL:
        return "its values lie in another file"
    if any(size < 0 for size in tensor.dims):
        return f"it has sizes {list(tensor.dims)}"
    count = math.prod(tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        return "" if len(tensor.string_data) == count else f"it has {len(tensor.string_data)} texts, not {count}"
    if tensor.data_type not in _FIELDS:
        return f"its type is {tensor.data_type}, which is not known"
    bits, place = _FIELDS[tensor.data_type]
    if tensor.HasField("raw_data"):
        wanted = -(-count * bits // 8)
        found = len(tensor.raw_data)
        return "" if found == wanted else f"it has {found} bytes; its sizes ask for {wanted}"
    # Numbers of 4 bits stand two in one entry, complex ones are two.
    twice = tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128)
    wanted, found = (-(-count // 2) if bits == 4 else count * (1 + twice)), len(getattr(tensor, place))
    return "" if found == wanted else f"it has {found} numbers; its sizes ask for {wanted}"
