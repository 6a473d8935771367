"""Verification of drafts: chains and trees against a walk in Python, and the cache moves after them."""

import torch

from skipjack.kernels.reference_verify import verify


def test_verify_accepts_the_longest_common_prefix() -> None:
    target = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 9, 7, 8], [0, 0, 0, 0], [5, 6, 7, 8]])
    draft = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7], [0, 0, 0], [4, 6, 7]])
    count, length = torch.tensor([3, 2, 3, 0, 3]), torch.tensor([10, 0, 7, 1, 2])
    verdict = verify(target, draft, count, length)
    assert verdict.accepted.tolist() == [3, 2, 1, 0, 0]
    assert verdict.token.tolist() == [8, 7, 9, 0, 5]
    assert verdict.length.tolist() == [14, 3, 9, 2, 3]
    assert verdict.path.tolist() == [[0, 1, 2, 3], [0, 1, 2, 2], [0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    empty = verify(target[:, :1], draft[:, :0], count * 0, length)
    assert empty.accepted.tolist() == [0] * 5
    assert empty.token.tolist() == target[:, 0].tolist()
    assert empty.path.tolist() == [[0]] * 5
