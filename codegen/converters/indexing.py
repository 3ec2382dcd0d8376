"""Reading by computed index. Every index is clipped into its axis: no read leaves the tensor."""

from __future__ import annotations

from typing import Any

from tvm import relax

from codegen.converters import shape_of
from codegen.kernels.gather import gather_rows

_INTEGERS = ("int8", "int16", "int32", "int64", "uint8")
_INJECTIVE = {"op_pattern": 2}


def _rows(importer: Any, table: Any, ids: Any) -> Any:
    return importer.block_builder.emit_te(
        gather_rows, table, ids, primfunc_name_hint="gather", primfunc_attrs=_INJECTIVE
    )


def convert_embedding(node: Any, importer: Any) -> Any:
    """``aten.embedding(table, ids)``."""
    return _rows(importer, importer.env[node.args[0]], importer.env[node.args[1]])


def convert_index_select(node: Any, importer: Any) -> Any:
    """``aten.index_select(x, dim, index)``."""
    x, index = importer.env[node.args[0]], importer.env[node.args[2]]
    axis = int(node.args[1]) % x.ty.ndim
    safe = index if axis == 0 else _wrapped(importer, index, shape_of(x)[axis])
    return _taken(importer, x, safe, axis)


def _taken(importer: Any, x: Any, index: Any, axis: int) -> Any:
    """Slices of `x` along `axis`, in the places of `index`'s axes."""
    if axis == 0:
        return _rows(importer, x, index)
    return importer.block_builder.emit(relax.op.take(x, index, axis, mode="clip"))


def _wrapped(importer: Any, index: Any, size: int) -> Any:
    """`index` with negative values counted from the end, clipped to 0 .. size-1."""
    bb, dtype = importer.block_builder, str(index.ty.dtype)
    zero, count, last = (relax.const(n, dtype) for n in (0, size, size - 1))
    negative = bb.emit(relax.op.less(index, zero))
    index = bb.emit(relax.op.where(negative, bb.emit(relax.op.add(index, count)), index))
    return bb.emit(relax.op.minimum(bb.emit(relax.op.maximum(index, zero)), last))


def convert_index(node: Any, importer: Any) -> Any:
    """``aten.index.Tensor(x, indices)`` with integer indices; None stands for a whole axis."""
    x, indices = importer.env[node.args[0]], node.args[1]
    saved: dict[Any, Any] = {}
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if len(given) == 1 and _whole(importer, given[0][1]):
        ((axis, index),) = given
        return _taken(importer, x, _wrapped(importer, importer.env[index], shape_of(x)[axis]), axis)
    for axis, index in enumerate(indices):
        if index is not None and _whole(importer, index):
            saved.setdefault(index, importer.env[index])
            importer.env[index] = _wrapped(importer, saved[index], shape_of(x)[axis])
    try:
        return importer._index_tensor(node)
    finally:
        importer.env.update(saved)


def _whole(importer: Any, index: Any) -> bool:
    return str(importer.env[index].ty.dtype) in _INTEGERS


def convert_gather(node: Any, importer: Any) -> Any:
    """``aten.gather(x, dim, index)``."""
    x, index = importer.env[node.args[0]], importer.env[node.args[2]]
    axis = int(node.args[1]) % x.ty.ndim
    safe = _wrapped(importer, index, shape_of(x)[axis])
    return importer.block_builder.emit(relax.op.gather_elements(x, safe, axis=axis))


def convert_select(node: Any, importer: Any) -> Any:
    """``aten.select(x, dim, index)``: a slice; TVM's own conversion reads outside for index -1."""
    bb, x = importer.block_builder, importer.env[node.args[0]]
    axis = int(node.args[1]) % x.ty.ndim
    index = int(node.args[2]) % shape_of(x)[axis]
    cut = bb.emit(relax.op.strided_slice(x, [axis], [index], [index + 1]))
    return bb.emit(relax.op.squeeze(cut, [axis]))


CONVERTERS = {
    "select.int": convert_select,
    "embedding.default": convert_embedding,
    "index_select.default": convert_index_select,
    "index.Tensor": convert_index,
    "gather.default": convert_gather,
}
