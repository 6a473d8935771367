"""The methods of an engine, each of which is made ready before its first request."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.compilation import Watch
from .calibration import Encode
from .errors import RequestError
from .methods.base import Method
from .methods.policy import Policy
from .methods.registry import MethodSpec
from .model import Model
from .recent import Recent
from .stepwise import Stepwise

MAX_METHODS = 64


@dataclass(frozen=True, eq=False)
class Preparation:
    """A method that is being made ready."""

    method: Method
    steps: Stepwise[None]


class Roster:
    """The methods that are ready, `own` being that of the engine, and those that are being made so.

    Everything here is called within a turn. Whoever asks for a method takes the next step of its preparation, also one
    that somebody else began and gave up.
    """

    def __init__(self, model: Model, encode: Encode | None, watch: Watch, spec: MethodSpec, own: Method) -> None:
        self._model, self._encode, self._watch, self._own = model, encode, watch, spec
        self.ready = Recent[MethodSpec, Method](MAX_METHODS, spec)
        self._preparing = Recent[MethodSpec, Preparation](MAX_METHODS, spec)
        self._preparing[spec] = Preparation(own, own.prepare(model, encode))

    def advance(self, spec: MethodSpec) -> Method | None:
        """A method that is ready; else None, after a step of its preparation.

        Raises:
            RequestError: it does not run here.
        """
        if spec in self.ready:
            return self.ready[spec]
        if spec not in self._preparing:
            self._expect_alike(spec)
            made = spec.build(self._model.config)
            self._preparing[spec] = Preparation(made, made.prepare(self._model, self._encode))
        return self._step(spec)

    def get(self, spec: MethodSpec) -> Method:
        """A method, made ready now if it is not yet; raises as `advance`."""
        while (method := self.advance(spec)) is None:
            pass
        return method

    def unlearned(self, spec: MethodSpec) -> Method:
        """A method to try things with, of which requests learn nothing."""
        own = self.get(spec)
        if isinstance(own, Policy):
            return own
        fresh = spec.build(self._model.config)
        for _ in fresh.prepare(self._model, self._encode):
            pass
        return fresh

    def forget(self, spec: MethodSpec) -> None:
        """Make a method anew for the next request, which knows nothing of those before."""
        self.ready.pop(spec, None)

    def _step(self, spec: MethodSpec) -> Method | None:
        # One whose step fails is begun anew by whoever asks next.
        preparation = self._preparing.pop(spec)
        with self._watch, torch.inference_mode():
            for _ in preparation.steps:
                self._preparing[spec] = preparation
                return None
        self.ready[spec] = preparation.method
        return preparation.method

    def _expect_alike(self, spec: MethodSpec) -> None:
        if spec.edits or self._own.edits:
            raise RequestError(
                f"method {spec.name}: expected {self._own.name} as this engine was loaded: "
                f"{spec.name if spec.edits else self._own.name} edits the weights when they are loaded"
            )
