"""The generator against its published test vectors, and the noise against its distribution."""

import pytest
import torch
from scipy import stats

from skipjack.kernels.noise import gumbel, philox


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of the Random123 library, philox4x32 with 10 rounds
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    assert philox(words(counter), words(key)) == words(expected)


def test_gumbel_noise_has_its_distribution() -> None:
    noise = gumbel(torch.tensor([1, 2, -5]), torch.tensor([0, 9, 100]), 50_000)
    assert stats.kstest(noise.double().numpy().ravel(), "gumbel_r").pvalue > 0.001
    assert noise.isfinite().all()


def test_noise_of_an_id_depends_on_seed_and_position_only() -> None:
    seed, position = torch.tensor([3, 3, 4]), torch.tensor([7, 8, 7])
    noise = gumbel(seed, position, 1003)
    for row in range(3):
        assert torch.equal(gumbel(seed[row : row + 1], position[row : row + 1], 77)[0], noise[row, :77])
    assert len({tuple(row[:8].tolist()) for row in noise}) == 3
