"""The peers: transformers' generate in its variants, a compiled decode loop, and llama.cpp."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch

from ..runtime.errors import RequestError, SkipjackError
from . import compiled_loop, llama_cpp
from .compiled_loop import CompiledLoop, Unavailable
from .llama_cpp import LlamaCpp

Generate = Callable[[list[int], int], list[int]]
PLAIN, LOOP, LLAMA_CPP = "transformers generate", "torch.compile loop", "llama.cpp"


@dataclass(frozen=True)
class Setting:
    """The early exit's layers, the lookup's draft length, torch.compile's mode ("eager" compiles nothing).

    What is not `timed` is not tuned either: that takes minutes.
    """

    exit_layer: int
    num_draft_tokens: int
    compile_mode: str
    timed: bool = True

    @property
    def loop_mode(self) -> str:
        """The mode the loop is compiled in."""
        return self.compile_mode if self.timed or not self.compile_mode.startswith("max-autotune") else "default"


def versions() -> dict[str, str | None]:
    """The peers' libraries' versions by the keys of a result; None for one that is not installed.

    Raises:
        SkipjackError: transformers is not.
    """
    try:
        llama_cpp = version_of("llama-cpp-python")
    except PackageNotFoundError:
        llama_cpp = None
    return {"transformers": str(_transformers().__version__), "llama_cpp_python": llama_cpp}


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' model of a folder, for greedy decoding that no end of text stops."""
    transformers = _transformers()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, do_sample=False)
    return model


def peers(model: Any, setting: Setting, max_context: int) -> dict[str, Callable[[], Generate]]:
    """How each peer is made ready; what is returned generates n tokens after a prompt.

    Static caches hold `max_context` positions, so that no prompt makes them compile again. Making a peer, or its first
    call, may raise: then it is not available here.
    """
    static = {"cache_implementation": "static", "max_cache_len": max_context}
    early, lookup = f"assistant_early_exit={setting.exit_layer}", f"prompt_lookup_num_tokens={setting.num_draft_tokens}"
    return {
        PLAIN: lambda: _generate(model, {}),
        "transformers static cache + compile": lambda: _generate(model, static, _compile_config(model)),
        f"transformers {early}": lambda: _generate(model, {"assistant_early_exit": setting.exit_layer}),
        f"transformers {lookup}": lambda: _generate(model, {"prompt_lookup_num_tokens": setting.num_draft_tokens}),
        f"{LOOP} ({setting.compile_mode})": lambda: CompiledLoop(model, max_context, setting.loop_mode),
        LLAMA_CPP: lambda: LlamaCpp(model, max_context),
    }


def expect_peers(parts: Sequence[str], setting: Setting, model_type: str) -> None:
    """Refuse parts of peers' names that select nothing, or only what cannot run a model of this type here.

    Raises:
        RequestError: one of `parts` is of no name, or of one that cannot run.
    """
    names = list(peers(None, setting, 0))
    if unknown := [part for part in parts if not any(part in name for name in names)]:
        raise RequestError(f"--peer: expected a part of one of {', '.join(names)}, got {', '.join(unknown)}")
    for part in parts:
        found = {name: _obstacle(name, model_type) for name in names if part in name}
        if all(found.values()):
            raise RequestError("--peer: " + "; ".join(f"{name} cannot run: {why}" for name, why in found.items()))


def _obstacle(name: str, model_type: str) -> str | None:
    if name == LLAMA_CPP:
        return llama_cpp.obstacle(model_type)
    return compiled_loop.obstacle(model_type) if name.startswith(LOOP) else None


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise SkipjackError("peers need transformers: pip install transformers") from error


def _generate(model: Any, options: dict[str, Any], compile_config: Any = None) -> Generate:
    config_class: Any = model.generation_config.__class__
    known: dict[str, Any] = config_class().__dict__
    # Older releases size a static cache by the longest call so far instead.
    missing = [name for name in options if name not in known and name != "max_cache_len"]
    if missing:
        raise Unavailable(f"this transformers has no {missing[0]}")
    extra = {"compile_config": compile_config} if compile_config is not None else {"disable_compile": True}
    options = {name: value for name, value in options.items() if name in known}

    def run(prompt: list[int], count: int) -> list[int]:
        config = config_class(pad_token_id=0, do_sample=False, max_new_tokens=count, **options, **extra)
        ids = torch.tensor([prompt], device=model.device)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return [int(token) for token in made[0, len(prompt) :].tolist()]

    return run


def _compile_config(model: Any) -> Any:
    """The configuration that has generate compile its decode step, which it otherwise does on GPUs only."""
    try:
        config = import_module("transformers").CompileConfig()
    except AttributeError:
        raise Unavailable("this transformers has no CompileConfig") from None
    if model.device.type == "cpu":
        if not hasattr(config, "_compile_all_devices"):
            raise Unavailable("this transformers compiles on GPUs only")
        config._compile_all_devices = True
        config.mode = "default"
    return config
