"""Triton's interpreter made quicker, with products that round as matrix units do: for tests and dry runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np


def mend() -> None:
    """Let the interpreter's dot sum in float64, and spare it work that has no effect; nothing without Triton.

    It calls NumPy's float32 product, which on some processors rounds a row by the shape of the whole block: a property
    of that library that a matrix instruction does not have, and that tests of row invariance would report.

    It puts its functions into triton.language for every function that a kernel calls, not once a launch, copies the
    arguments of each, and computes whether integers overflow, for an assertion that is off.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    module: Any = interpreter
    language, patch, compiled, cast = (
        module.tl,
        module._patch_lang,
        module.tl.range,
        module.InterpreterBuilder.cast_impl,
    )
    both = SimpleNamespace(__globals__={"tl": language, "core": language.core})

    def create_dot(self: object, a: Any, b: Any, d: Any, *_: object) -> object:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(d.data.dtype)
        return module.TensorHandle(product + d.data, d.dtype.scalar)

    def patch_once(function: object) -> Any:
        return patch(both) if language.range is compiled else module._LangPatchScope()

    def cast_impl(self: object, src: Any, dst_type: Any) -> object:
        match src.dtype.scalar.name, dst_type.scalar.name:
            case "bf16", "fp32":
                data = (src.data.astype(np.uint32) << 16).view(np.float32)
            case "fp32", "bf16":
                data = (src.data.view(np.uint32) >> 16).astype(np.uint16)
            case _:
                return cast(self, src, dst_type)
        return module.TensorHandle(data, dst_type.scalar)

    def patch_attr(owner: object, name: str, member: Any, builder: object, scope: Any) -> None:
        def call(*args: Any, **options: Any) -> Any:
            options["_semantic"] = semantic
            return member(*args, **options)

        scope.set_attr(owner, name, call)

    semantic = module.TritonSemantic(module.interpreter_builder)
    module.InterpreterBuilder.create_dot, module.InterpreterBuilder.cast_impl = create_dot, cast_impl
    module._patch_attr, module._patch_lang = patch_attr, patch_once
    module.interpreter_builder.options = module.InterpreterOptions(sanitize_overflow=False)
    _remember_types(module)


def _remember_types(module: Any) -> None:
    """What is said of a type is worked out once for each, not for every value: most of a program's time."""
    core, semantic = module.tl.core, module.TritonSemantic
    block, tensor = core.block_type, core.tensor
    new_block, broadcast = block.__init__, semantic.broadcast_impl_value
    blocks: dict[tuple[object, ...], dict[str, Any]] = {}

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *getattr(shape, "values", shape))
        if key not in blocks:
            new_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key], element_ty=element_ty)

    @cache
    def shape_of(*sizes: int) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(int(np.prod(sizes)))

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_of(*type.shape) if type.is_block() else shape_of()

    def broadcast_unequal(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block() and one.shape.values == other.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def same(equal: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return lambda self, other: self is other or equal(self, other)

    def by_name(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        known: dict[str, Any] = {}

        def of(kind: Any) -> Any:
            if kind.name not in known:
                known[kind.name] = function(kind)
            return known[kind.name]

        return of

    block.__init__, tensor.__init__ = init_block, init_tensor
    for kind in (core.dtype, core.pointer_type, block):
        kind.__eq__ = same(kind.__eq__)
    semantic.broadcast_impl_value = broadcast_unequal
    semantic.computation_type_impl = cache(semantic.computation_type_impl)
    module._get_np_dtype = by_name(module._get_np_dtype)
