"""Rounds as the device runs them alone: tensors of fixed shapes in, tensors out, and no question to the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.values import Grown, Logprobs, Progress, Reshaping, Verdict
from .adapter import draft_pass
from .batch import Batch, Draft, Exit, Sampling
from .cache import KVCache
from .methods.drafting import FIRST_DRAFT_STREAM, WIDTHS, siblings
from .model import Model
from .ngrams import GAP
from .quantised import drafter
from .recipe import Ngrams, Recipe, Steps
from .reshaping import neutral
from .rows import Lineage
from .sampling import Drawn, before, draw
from .speculate import close_up, decide, verify_pass


class State(NamedTuple):
    """What a round reads and what it leaves for the next one; S sequences, of which those with tokens left run.

    progress and prompt int64 [S] of the sequences; block_table int64 [S, W]; mask bool [2L], the sub-layers that draft;
    threshold float32 []; limit int64 [], the longest draft; sampling, [S] each; memory [S, …], what the recipe's steps
    remember; undrafted, the draft of a round that has none; text int32 [S, C], the tokens so far where drafts come from
    them, and remembered int32 [M], those of other texts with `ngrams.GAP` between them.
    The report is int64 [slots, S, k + 4], on the host, which reads it while later rounds run: accepted (-1: the
    sequence did not run), drafted, the depth of the draft, the token after the accepted ones, and the k draft tokens,
    of a tree those of its accepted path; every step of a policy has a slot [S, 4] of its own, drafted being the
    sub-layers that ran. With it go the logprobs [S, k + 1 or steps, …] of the tokens. `reshaping` and `logprobs` are
    there if the recipe has them.
    """

    progress: Progress
    prompt: Tensor
    block_table: Tensor
    mask: Tensor
    threshold: Tensor
    limit: Tensor
    sampling: Sampling
    memory: Tensor
    undrafted: Draft
    text: Tensor | None
    remembered: Tensor | None
    report: Tensor
    reshaping: Reshaping | None
    logprobs: Logprobs | None

    @staticmethod
    def empty(model: Model, recipe: Recipe, sequences: int, pages: int, rounds: int = 1) -> State:
        """A state in which nothing runs, with reports of so many `rounds`."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.device)

        temperature, top_p, min_p = (zeros(sequences, dtype=torch.float32) for _ in range(3))
        steps, vocabulary = recipe.steps or Steps(), model.config.vocab_size
        tokens, logprobs = steps.count if recipe.steps else recipe.num_draft_tokens + 1, None
        remember = recipe.ngrams.remember if recipe.ngrams else 0
        if recipe.logprobs is not None:
            values = zeros(sequences, tokens, 1 + recipe.logprobs, dtype=torch.float32)
            logprobs = Logprobs(values, zeros(sequences, tokens, recipe.logprobs, dtype=torch.int32))
        report = rounds * steps.count, sequences, 4 + (0 if recipe.steps else recipe.num_draft_tokens)
        return State(
            Progress.of(zeros(sequences), zeros(sequences), zeros(sequences)),
            zeros(sequences),
            zeros(sequences, pages),
            zeros(2 * model.config.num_layers, dtype=torch.bool),
            zeros(dtype=torch.float32),
            zeros(),
            Sampling(temperature, zeros(sequences), top_p, min_p, zeros(sequences)),
            steps.memory(model, sequences),
            Draft(zeros(sequences, 0), zeros(sequences)),
            zeros(sequences, pages * model.ops.page_size, dtype=torch.int32) if recipe.ngrams else None,
            torch.full((remember,), GAP, dtype=torch.int32, device=model.device) if remember else None,
            torch.zeros(report, dtype=torch.int64, pin_memory=model.device.type == "cuda"),
            neutral(sequences, vocabulary, model.device) if recipe.reshaped else None,
            logprobs,
        )

    def allow(self, left: Tensor) -> None:
        """Let the sequences append `left` int64 [S] tokens."""
        progress = self.progress
        progress.left.copy_(left)
        progress.room.copy_(left - 1)
        progress.alive.copy_(left > 0)
        progress.drafting.copy_(left > 1)

    def batch(self, model: Model) -> Batch:
        """The sequences as they stand, of which those with tokens left run."""
        last, length, _, room, alive, _, _ = self.progress
        return Batch([], last, length, room, self.prompt, self.block_table, model.ops.decode_tile, alive)


def device_round(model: Model, cache: KVCache, state: State, recipe: Recipe) -> None:
    """Draft, verify and commit, as `speculate` does, in place in `state`.

    The tokens are those of `speculate`: the same passes over the same rows. A sequence drafts no more than it has room
    for; rows past its draft belong to no sequence.
    """
    batch = state.batch(model)
    draft, lineage = _draft(model, cache, batch, state, recipe)
    width = 1 + draft.tokens.shape[1]
    path = batch.last[:, None]
    if width > 1 and (recipe.reshaped or recipe.logprobs is not None):
        path = torch.cat([path, draft.tokens], dim=1)
    verdict: Verdict | None = None
    with model.mark("verify", len(batch), len(batch) * width):
        hidden = verify_pass(model, cache, batch, draft, lineage, recipe.target)
        rule, position = _noise(state, batch, width, lineage) if recipe.sampled else (None, None)
        # Tiles of rows without a node of a large tree read no head either.
        real = _real(draft.length, width) if batch.sparse(draft, lineage) else None
        chosen = draw(model, hidden, rule, position, real, reshape=_reshape(model, state, batch, path, lineage))
        if width > 1:
            scores = None if chosen.scores is None else chosen.scores.view(len(batch), width, -1)
            warped = state.sampling if recipe.rejection else None
            verdict = decide(model, batch, draft, chosen.token.view(len(batch), width), scores, warped, lineage)
            if lineage is not None:
                close_up(model, cache, batch, verdict, lineage)
    with model.mark("commit", len(batch), len(batch) * width):
        if state.logprobs is not None:
            _tell_round(model, state, draft, path, verdict, lineage, chosen)
        model.ops.commit(
            None if verdict is None else verdict.accepted,
            chosen.token if verdict is None else verdict.token,
            draft.length,
            draft.tokens,
            state.progress,
            state.report,
            None if lineage is None or verdict is None else verdict.path,
            None if lineage is None else lineage.depth,
            None if state.reshaping is None else state.reshaping.times,
            state.text,
        )


def device_steps(model: Model, cache: KVCache, state: State, steps: Steps, sampled: bool) -> None:
    """A token after the other for every sequence from the passes of a policy, as `decode`, in place in `state`."""
    batch = state.batch(model)
    for number in range(steps.count):
        with model.mark("verify", len(batch), len(batch)):
            hidden, ran = steps.step(model, cache, batch, state.memory, number)
            rule = state.sampling if sampled else None
            reshape = _reshape(model, state, batch, batch.last[:, None], newest=True)
            drawn = draw(model, hidden, rule, batch.length + 1, batch.alive, reshape=reshape)
        with model.mark("commit", len(batch), len(batch)):
            if state.logprobs is not None and batch.alive is not None:
                told = Logprobs(*(part[:, number : number + 1] for part in state.logprobs))
                _tell(model, drawn.logits, drawn.token[:, None], batch.alive[:, None], told)
            times = None if state.reshaping is None else state.reshaping.times
            model.ops.commit(None, drawn.token, ran, None, state.progress, state.report, times=times)


def _draft(model: Model, cache: KVCache, batch: Batch, state: State, recipe: Recipe) -> tuple[Draft, Lineage | None]:
    """A chain from the text, or a chain or tree, and where its rows stand, of `num_draft_tokens` steps.

    A sequence that has stopped drafting has no rows in the rest of them.
    """
    if not recipe.num_draft_tokens:
        return state.undrafted, None
    if recipe.ngrams is not None and state.text is not None:
        return _looked_up(model, batch, state.text, state.remembered, recipe.ngrams, recipe.num_draft_tokens)
    if recipe.max_nodes:
        return _tree(model, cache, batch, state, recipe)
    return _chain(model, cache, batch, state, recipe), None


def _looked_up(
    model: Model, batch: Batch, text: Tensor, remembered: Tensor | None, ngrams: Ngrams, count: int
) -> tuple[Draft, Lineage | None]:
    with model.mark("draft", len(batch), 0, 0):
        found = model.ops.lookup(
            text,
            batch.length,
            batch.room,
            max_ngram=ngrams.longest,
            num_draft_tokens=count,
            votes=ngrams.votes,
            memory=remembered,
            tree=ngrams.tree,
        )
    draft = Draft(found.tokens, found.drafted, parent=found.parent)
    return draft, None if found.depth is None or found.path is None else Lineage(found.depth, found.path)


def _chain(model: Model, cache: KVCache, batch: Batch, state: State, recipe: Recipe) -> Draft:
    room, going, count = batch.room, state.progress.drafting, None
    if recipe.limited:
        room = torch.minimum(room, state.limit)
        going = room > 0
    drafted = torch.empty(len(batch), recipe.num_draft_tokens, dtype=torch.int64, device=batch.device)
    tokens, streams, scores = [batch.last, *drafted.unbind(1)], list[Tensor](), list[Tensor]()
    threshold = state.threshold if recipe.confident else None
    for step in range(recipe.num_draft_tokens):
        with model.mark("draft", len(batch), len(batch), step):
            hidden, drawn = _step(model, cache, batch, state, recipe, tokens[: step + 1], going)
            streams.append(hidden)
            if recipe.rejection and drawn.scores is not None:
                scores.append(torch.where(going[:, None], drawn.scores, 0))
            count, going = model.ops.extend(
                count, going, room, drawn.token, drawn.value, drawn.log_sum_exp, threshold, tokens[step + 1]
            )
    assert count is not None
    draft = Draft(drafted, count, scores=torch.stack(scores, dim=1) if scores else None)
    if not recipe.reuse:
        return draft
    return draft._replace(exit=Exit(recipe.plan.span[1] // 2, torch.stack(streams, dim=1), recipe.adapter))


def _tree(model: Model, cache: KVCache, batch: Batch, state: State, recipe: Recipe) -> tuple[Draft, Lineage]:
    """As `grow` of the host: siblings at every depth, of which the first is expanded."""
    tree, tokens = Grown.bare(batch.room, recipe.max_nodes, recipe.num_draft_tokens), [batch.last]
    scores, threshold = list[Tensor](), state.threshold if recipe.confident else None
    for step in range(recipe.num_draft_tokens):
        with model.mark("draft", len(batch), len(batch), step):
            _, drawn = _step(model, cache, batch, state, recipe, tokens, tree.going)
            if recipe.rejection and drawn.scores is not None:
                scores.append(torch.where(tree.going[:, None], drawn.scores, 0))
            model.ops.branch(tree, batch.room, drawn.token, drawn.value, drawn.log_sum_exp, threshold, widths=WIDTHS)
            tokens.append(drawn.token[:, 0].clamp(min=0))
    draft = Draft(tree.token, tree.count, parent=tree.parent, scores=torch.stack(scores, dim=1) if scores else None)
    return draft, Lineage(tree.depth, tree.path)


def _step(
    model: Model,
    cache: KVCache,
    batch: Batch,
    state: State,
    recipe: Recipe,
    tokens: list[Tensor],
    going: Tensor,
) -> tuple[Tensor, Drawn]:
    """A draft's pass over the last of `tokens` int64 [S], the first being the newest: its streams [S, H] and draws.

    Of no use is anything where a draft is not `going` bool [S].
    """
    tree, step = recipe.max_nodes > 0, len(tokens) - 1
    rows = batch.drafted(
        tokens[-1], step, going, gated=recipe.confident or tree, mask=state.mask if recipe.masked else None
    )
    part = drafter(model, recipe.quantised)
    stream, hidden, norm = draft_pass(part, cache, rows, recipe.plan, recipe.adapter)
    rule, position = (state.sampling, batch.length + step + 1) if recipe.sampled else (None, None)
    drawn = draw(
        part,
        hidden,
        rule,
        position,
        going,
        recipe.vocabulary,
        FIRST_DRAFT_STREAM + step if recipe.rejection else 0,
        count=siblings(part, recipe.vocabulary) if tree else None,
        reshape=_reshape(model, state, batch, torch.stack(tokens, dim=1), newest=True) if recipe.reshaped else None,
        confidence=recipe.confident or tree,
        norm=norm,
    )
    return stream, drawn


def _noise(state: State, batch: Batch, width: int, lineage: Lineage | None) -> tuple[Sampling, Tensor]:
    """The sampling of each of `width` rows a sequence, and the position of the token after each."""
    depth = torch.arange(width, device=batch.device) if lineage is None else lineage.depth
    rule = Sampling(*(field.repeat_interleave(width) for field in state.sampling))
    return rule, (batch.length[:, None] + depth + 1).flatten()


def _real(count: Tensor, width: int) -> Tensor:
    """Which of `width` rows a sequence are its newest token or of the `count` int64 [S] after it: bool [S·width]."""
    return (torch.arange(width, device=count.device) <= count[:, None]).flatten()


def _reshape(
    model: Model, state: State, batch: Batch, path: Tensor, lineage: Lineage | None = None, *, newest: bool = False
) -> Callable[[Tensor], Tensor] | None:
    """What the logits of the columns of path int64 [S, J], or of its `newest`, become; None: they stay as they are."""
    if state.reshaping is None:
        return None
    if newest:
        draft = path[:, None, 1:]
    elif lineage is None:
        draft = before(path, torch.arange(path.shape[1], device=path.device).expand(path.shape))
    else:
        draft = before(path, lineage.depth, lineage)
    return partial(model.ops.reshape_logits, how=state.reshaping, length=batch.length, draft=draft)


def _tell_round(
    model: Model,
    state: State,
    draft: Draft,
    path: Tensor,
    verdict: Verdict | None,
    lineage: Lineage | None,
    chosen: Drawn,
) -> None:
    """Logprobs of what a round gives each sequence: accepted draft tokens and the one after them."""
    assert state.logprobs is not None
    alive, logits = state.progress.alive[:, None], chosen.logits
    if verdict is None:
        _tell(model, logits, chosen.token[:, None], alive, state.logprobs)
        return
    tokens = draft.tokens
    if lineage is not None and logits is not None:
        rows = verdict.path[:, : state.logprobs.ids.shape[1]]
        tokens = path.gather(1, rows[:, 1:])
        each = torch.arange(len(path), device=path.device)[:, None]
        logits = logits.view(*path.shape, -1)[each, rows].flatten(0, 1)
    place, accepted = torch.arange(tokens.shape[1] + 1, device=path.device), verdict.accepted[:, None]
    given = torch.where(place < accepted, functional.pad(tokens, (0, 1)), verdict.token[:, None])
    _tell(model, logits, given, (place <= accepted) & alive, state.logprobs)


def _tell(model: Model, logits: Tensor | None, token: Tensor, given: Tensor, told: Logprobs) -> None:
    """Logprobs of token int64 [S, n] into `told` where it was `given` bool [S, n]; the logits [S·n, V] they came of."""
    top = told.ids.shape[2]
    if logits is not None:
        found = model.ops.logprobs(logits, token.flatten().clamp(min=0), given.flatten(), top=top)
        for target, source in zip(told, found, strict=True):
            target.copy_(source.view(target.shape))
