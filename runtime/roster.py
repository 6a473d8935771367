"""The methods of an engine, each of which is made ready before its first request."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch

from ..kernels.compilation import Watch
from .calibration import Encode
from .errors import RequestError
from .methods.base import Method
from .methods.policy import Policy
from .methods.registry import MethodSpec
from .model import Model
from .quantised import quantise
from .recent import Recent
from .stepwise import Stepwise, at_once

MAX_METHODS = 64


@dataclass(frozen=True, eq=False)
class Preparation:
    """A method that is being made ready."""

    method: Method
    steps: Stepwise[None]


class Roster:
    """The methods of an engine that are ready, its own among them, and those that are being made so.

    Everything here is called within a turn.
    """

    def __init__(self, model: Model, encode: Encode | None, watch: Watch, own: MethodSpec) -> None:
        self._model, self._encode, self._watch, self._own = model, encode, watch, own
        self.ready = Recent[MethodSpec, Method](MAX_METHODS, own)
        # Those that a request holds: what all of them gave up is forgotten.
        self._preparing = WeakValueDictionary[MethodSpec, Preparation]()

    def add(self, spec: MethodSpec, method: Method) -> None:
        """Make a method ready that there is already."""
        with self._watch, torch.inference_mode():
            at_once(self._preparation(method))
        self.ready[spec] = method

    def entering(self, spec: MethodSpec) -> Stepwise[Method]:
        """A method, made ready a step at a time; of several that ask for it, whoever comes takes the next step.

        Raises:
            RequestError: it does not run here.
        """
        while spec not in self.ready:
            preparation = self._begun(spec)
            if self._is_under_way(spec, preparation):
                yield
        return self.ready[spec]

    def get(self, spec: MethodSpec) -> Method:
        """A method, made ready now if it is not yet; raises as `entering`."""
        return at_once(self.entering(spec))

    def unlearned(self, spec: MethodSpec) -> Method:
        """A method to try things with, of which requests learn nothing."""
        own = self.get(spec)
        if isinstance(own, Policy):
            return own
        fresh = spec.build(self._model.config)
        at_once(self._preparation(fresh))
        return fresh

    def forget(self, spec: MethodSpec) -> None:
        """Make a method anew for the next request, which knows nothing of those before."""
        self.ready.pop(spec, None)

    def _begun(self, spec: MethodSpec) -> Preparation:
        found = self._preparing.get(spec)
        if found is None:
            self._expect_alike(spec)
            made = spec.build(self._model.config)
            found = Preparation(made, self._preparation(made))
        return found

    def _preparation(self, method: Method) -> Stepwise[None]:
        if method.quantised:
            yield from quantise(self._model)
        yield from method.prepare(self._model, self._encode)

    def _is_under_way(self, spec: MethodSpec, preparation: Preparation) -> bool:
        """Take a step; one that fails is begun anew by whoever asks next."""
        self._preparing.pop(spec, None)
        with self._watch, torch.inference_mode():
            for _ in preparation.steps:
                self._preparing[spec] = preparation
                return True
        self.ready[spec] = preparation.method
        return False

    def _expect_alike(self, spec: MethodSpec) -> None:
        if spec.edits or self._own.edits:
            raise RequestError(
                f"method {spec.name}: expected {self._own.name} as this engine was loaded: "
                f"{spec.name if spec.edits else self._own.name} edits the weights when they are loaded"
            )
