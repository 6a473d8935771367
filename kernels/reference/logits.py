"""What logits become before a token is chosen, and what is told of them afterwards, in PyTorch."""

import torch
from torch import Tensor

from ..values import Logprobs, Reshaping


def reshape_logits(logits: Tensor, how: Reshaping, length: Tensor, draft: Tensor) -> Tensor:
    """Logit bias, minimum length and penalties, in this order, as vLLM defines them: [S·n, V] → float32 [S·n, V].

    length int64 [S]: tokens before each sequence's newest. draft int64 [S, n, D]: the draft tokens between the newest
    one and each of its n rows, which count as if they stood in the answer; −1 stands for none.
    """
    sequences, n, _ = draft.shape
    scores, real = logits.float().view(sequences, n, -1) + how.bias[:, None], draft >= 0
    short = length[:, None] + 1 + real.sum(dim=2) < how.least[:, None]
    scores = scores.masked_fill(short[:, :, None] & how.forbidden[:, None], -torch.inf)
    times = how.times[:, None].repeat(1, n, 1).scatter_add_(2, draft.clamp(min=0), real.int())
    repetition, presence, frequency = (factor[:, None, None] for factor in how[:3])
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(how.prompt[:, None] | (times > 0), repeated, scores)
    return torch.where(times > 0, scores - (presence + frequency * times), scores).flatten(0, 1)


def logprobs(logits: Tensor, token: Tensor, active: Tensor, *, top: int) -> Logprobs:
    """Log-probabilities of `token` int64 [R] and of the `top` (≤ V) most likely ids of the rows of logits [R, V].

    Equal logits are told lowest id first. The results of rows that are not `active` bool [R] are undefined.
    """
    values = logits.float().log_softmax(dim=-1)
    bits = (logits.float() + 0.0).view(torch.int32)
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    ids = (rank - torch.arange(logits.shape[1], device=logits.device)).topk(top).indices
    chosen = torch.where(active, token, 0)[:, None]
    return Logprobs(values.gather(1, torch.cat([chosen, ids], dim=1)), ids.int())
