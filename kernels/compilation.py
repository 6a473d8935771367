"""Compilations of this package's kernels, counted for whoever launches them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

PACKAGE = __name__.rpartition(".")[0]


class Watch:
    """Counts the kernels that are compiled for what a thread launches inside `with watch`.

    Kernels that lie in Triton's cache on disk count too: they are looked up and loaded. `refuse` is called with a
    kernel's name and what it was to be specialised on before it is compiled; what it raises goes to the launcher, and
    nothing is compiled. Kernels of other packages are not looked at. A watch that is not `enabled` does nothing, and
    does not import Triton.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.count = 0
        self.refuse: Callable[[str, str], None] | None = None

    def __enter__(self) -> Watch:
        if self.enabled:
            _HOOKS.enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            _HOOKS.leave()


class _Hooks:
    """Triton's hooks around a compilation, there while any thread is watched; those of others are called as before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._here = threading.local()
        self._entered = 0
        self._others: tuple[Any, Any] = (None, None)
        self._own = (self._before, self._after)

    def enter(self, watch: Watch) -> None:
        with self._lock:
            if not self._entered:
                runtime = _runtime()
                self._others = runtime.jit_cache_hook, runtime.jit_post_compile_hook
                runtime.jit_cache_hook, runtime.jit_post_compile_hook = self._own
            self._entered += 1
        self._watches.append(watch)

    def leave(self) -> None:
        self._watches.pop()
        with self._lock:
            self._entered -= 1
            if not self._entered:
                runtime = _runtime()
                # One that was set in the meantime stays.
                for name, own, other in zip(
                    ("jit_cache_hook", "jit_post_compile_hook"), self._own, self._others, strict=True
                ):
                    if getattr(runtime, name) is own:
                        setattr(runtime, name, other)

    @property
    def _watches(self) -> list[Watch]:
        """Those of this thread, the innermost last."""
        if not hasattr(self._here, "watches"):
            self._here.watches = list[Watch]()
        return self._here.watches

    def _before(self, **compilation: Any) -> bool | None:
        other = self._others[0]
        handled = other(**compilation) if other else None
        if not handled and self._watches and self._watches[-1].refuse and _is_ours(compilation):
            self._watches[-1].refuse(compilation["fn"].name, _specialised_on(compilation))
        return handled

    def _after(self, **compilation: Any) -> bool | None:
        if self._watches and _is_ours(compilation):
            self._watches[-1].count += 1
        other = self._others[1]
        return other(**compilation) if other else None


_HOOKS = _Hooks()


def _runtime() -> Any:
    from triton import knobs

    return knobs.runtime


def _is_ours(compilation: dict[str, Any]) -> bool:
    module = str(compilation["fn"].module)
    return module == PACKAGE or module.startswith(f"{PACKAGE}.")


def _specialised_on(compilation: dict[str, Any]) -> str:
    """Every parameter with its type, or its value, and whether it is divisible by 16; then how it is launched."""
    details = compilation["compile"]
    constants = {path[0]: value for path, value in details["constants"].items()}
    attributes: dict[tuple[int, ...], Any] = details["configs"][0]
    divisible = {path[0] for path, found in attributes.items() if found}
    parts: list[str] = []
    for i, (name, kind) in enumerate(cast("dict[str, str]", details["signature"]).items()):
        parts.append(f"{name}={constants[i]}" if i in constants else f"{name}: {kind}{'%16' if i in divisible else ''}")
    return ", ".join([*parts, f"num_warps={details['num_warps']}", f"num_stages={details['num_stages']}"])
