"""Rounds of an engine by what drafts in them, on random weights, and a lookup alone.

A round takes what its events say. Few tokens that random weights draft are accepted, and none ends a draft unless a
threshold ends them all: so each line shows what a kind of round costs. The models speak a few ids that all stand in
their prompt, or nothing would be looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ..kernels.ops import select
from ..loaders.synthetic import synthetic_weights
from ..runtime.engine import Engine
from ..runtime.request import Output, SamplingParams
from .clock import Spread, paired
from .gpu_setting import Setting
from .methods import PLAIN
from .step import Clock, Figure

SHAPES = ("135m", "1b")
TOKENS, DRY_TOKENS = 160, 3
PAIRS = 3
DRAFTED = 4
SKIPPED = 0.45
# No draft token is less likely than NEVER, or as likely as ALWAYS; with NO_SEARCH a skip set is read from masks.
NEVER, ALWAYS, NO_SEARCH = "threshold=1e-9", "threshold=1", "search_budget=1e-9"
SAMPLED = 0.8
# Tokens of a text, ids that it is made of, and tokens of other texts.
TEXTS, IDS, MEMORY = (1000, 16000), (50, 5000), 16384
SPOKEN = 32
CALLS, DRY_CALLS = 16, 1
Take = Callable[[], Output]


def rounds(setting: Setting) -> Iterator[Figure]:
    """Each kind of round, all in turn, and a lookup by what it asks for."""
    for shape in setting.named(SHAPES).values():
        with _engine(shape, setting) as engine:
            kinds = {
                f"round, {name}": partial(_run, engine, method, temperature, DRY_TOKENS if setting.dry else TOKENS)
                for name, (method, temperature) in _kinds(engine.config.num_layers).items()
            }
            notes = {name: _note(run()) for name, run in kinds.items()}
            timed = {} if setting.dry else {name: partial(_seconds, run) for name, run in kinds.items()}
            samples = paired(timed, PAIRS)
            for name, note in notes.items():
                spread = Spread.of(samples[name]) if samples else None
                times = (spread.median, spread.p10, spread.p90) if spread else (None, None, None)
                yield Figure(name, shape, 0, *times, 0, 0, None, note)
    yield from lookups(setting)


def lookups(setting: Setting) -> Iterator[Figure]:
    """`lookup` of one sequence, its text in the cache."""
    clock, calls = Clock(setting.device, setting.dry), DRY_CALLS if setting.dry else CALLS
    kinds = {
        "5 tokens, the newest match": (5, None, False, False),
        "5 tokens, votes": (5, 100, False, False),
        "5 tokens, votes and other texts": (5, 100, True, False),
        "tree of 12": (12, 100, True, True),
        "tree of 64": (64, 100, True, True),
        "64 tokens, 16 votes": (64, 16, False, False),
    }
    for length in TEXTS[:1] if setting.dry else TEXTS:
        for ids in IDS[:1] if setting.dry else IDS:
            for name, kind in kinds.items():
                times = clock.times(_lookup(setting.device, length, ids, kind, calls), calls)
                yield Figure(
                    f"lookup, {name}", f"{length} tokens", 0, *times, 4 * length, 4 * length, None, f"{ids} ids"
                )


def _engine(shape: str, setting: Setting) -> Engine:
    config = setting.config(shape)
    weights = synthetic_weights(config, 0, setting.dtypes[0], device=setting.device)
    weights.head[SPOKEN:] /= 64  # No score of these is the highest, and none of their bytes is zero.
    return Engine(config, weights, backend="torch" if setting.dry else "triton", cache_tokens=4096)


def _kinds(layers: int) -> dict[str, tuple[str, float]]:
    """The method and the temperature of each kind of round."""
    skipped = range(1, layers - 1, 2)[: round(SKIPPED * (layers - 2))]
    names = "+".join(map(str, skipped))
    fixed, masked = f"swift:skip_attention={names},skip_mlp={names}", f"swift:{NO_SEARCH}"
    drafts, kept = f"num_draft_tokens={DRAFTED}", f"{DRAFTED} drafts by {layers - len(skipped)} of {layers} layers"
    tree = "lookup:choose=likeliest,tree=true,num_draft_tokens"
    return {
        "plain": (PLAIN, 0.0),
        kept: (f"{fixed},{drafts},threshold=0", 0.0),
        f"{kept}, a threshold": (f"{fixed},{drafts},{NEVER}", 0.0),
        f"{DRAFTED} drafts, masks": (f"{masked},{drafts},{NEVER}", 0.0),
        f"{DRAFTED} drafts, masks, all end after one token": (f"{masked},{drafts},{ALWAYS}", 0.0),
        f"{kept}, in eight bits": (f"{fixed},{drafts},threshold=0,draft_weights=int8", 0.0),
        f"{DRAFTED} drafts by all layers in eight bits": (f"quantized:{drafts}", 0.0),
        "plain, sampled": (PLAIN, SAMPLED),
        f"{kept}, a threshold, sampled": (f"{fixed},{drafts},{NEVER}", SAMPLED),
        f"{kept}, all end after one token, sampled": (f"{fixed},{drafts},{ALWAYS}", SAMPLED),
        "lookup of 7": ("lookup:num_draft_tokens=7", 0.0),
        "tree of 12": (f"{tree}=12", 0.0),
        "tree of 40": (f"{tree}=40", 0.0),
    }


def _run(engine: Engine, method: str, temperature: float, tokens: int) -> Output:
    params = SamplingParams(max_tokens=tokens, temperature=temperature, seed=3, ignore_eos=True)
    return engine.generate([5 * i % SPOKEN for i in range(SPOKEN)], params, method=method)


def _seconds(run: Take) -> float:
    stats = run().stats
    return stats.decode_s / stats.rounds


def _note(output: Output) -> str:
    stats = output.stats
    return f"{stats.rounds} rounds, {stats.graph_rounds} alone, {stats.drafted} drafted, {stats.accepted} accepted"


def _lookup(
    device: torch.device, length: int, ids: int, kind: tuple[int, int | None, bool, bool], calls: int
) -> Callable[[], None]:
    drafted, votes, other, tree = kind
    generator, ops = torch.Generator().manual_seed(1), select("triton")
    text = torch.randint(ids, (1, length), generator=generator, dtype=torch.int32).to(device)
    memory = torch.randint(ids, (MEMORY,), generator=generator, dtype=torch.int32).to(device) if other else None
    last, room = (torch.full((1,), value, device=device) for value in (length - 1, drafted))

    def run() -> None:
        for _ in range(calls):
            ops.lookup(text, last, room, max_ngram=3, num_draft_tokens=drafted, votes=votes, memory=memory, tree=tree)

    return run
