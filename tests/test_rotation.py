"""Every lossless method, by rotation over draft length, batch, dtype, tree and skip set, against plain decoding."""

from collections.abc import Callable

import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.bench.exact import BATCHES, METHODS, cell


@pytest.mark.parametrize("part", range(8))
def test_every_cell_gives_the_tokens_of_plain_decoding(synthetic: Callable[..., Engine], part: int) -> None:
    temperature = 0.8 if part // 2 % 2 else 0.0
    generator = torch.Generator().manual_seed(part)
    params = SamplingParams(max_tokens=24, temperature=temperature, top_p=0.95, seed=part, ignore_eos=True)
    engine = synthetic("tiny", (torch.float32, torch.bfloat16)[part % 2], 0.2)
    for number in range(len(METHODS) * part, len(METHODS) * (part + 1)):
        lengths = torch.randint(1, 40, (BATCHES[number % 3],), generator=generator).tolist()
        prompts = [torch.randint(3, 500, (length,), generator=generator).tolist() for length in lengths]
        plain = [output.token_ids for output in engine.generate(prompts, params)]
        outputs = engine.generate(prompts, params, method=cell(number, 8))
        assert [output.token_ids for output in outputs] == plain, cell(number, 8)
        assert outputs[0].stats.lossless
        for output in outputs:
            assert 1 + output.stats.accepted + output.stats.bonus == 24
