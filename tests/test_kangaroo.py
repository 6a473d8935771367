"""Kangaroo: the published drafts, computed by transformers in float64; its cache; and no token changed."""

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from skipjack import Engine, SamplingParams
from skipjack.kernels.ops import TORCH
from skipjack.loaders.adapter import adapter_config
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.errors import CheckpointError, ConfigError
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights, write_synthetic
from skipjack.loaders.weights import load_weights
from skipjack.runtime.adapter import Adapter
from skipjack.runtime.decode import prefill
from skipjack.runtime.errors import RequestError
from skipjack.runtime.methods import kangaroo, registry
from skipjack.runtime.methods.kangaroo import Kangaroo
from skipjack.runtime.model import Model
from skipjack.runtime.rows import one_sequence
from skipjack.runtime.sequence import Sequence
from skipjack.runtime.speculate import speculate
from skipjack.runtime.stepwise import at_once

EXIT = 5
PROMPTS = [[5, 9, 11, 300], [7], list(range(20, 50))]
# A model's own, and what the published adapters have beside it.
ROTATIONS = {"rotates as the model": {}, "rotates otherwise": {"rope_theta": 500.0}}


def write_adapter(folder: Path, target: Path, layers: int = 1, seed: int = 0, **fields: Any) -> Path:
    """An adapter for the Llama model in `target` that changes what is drafted, but not everything."""
    model = json.loads((target / "config.json").read_text())
    hidden, heads, kv_heads = (model[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    own = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 11008,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-4,
        "vocab_size": model["vocab_size"],
        "max_position_embeddings": 1024,
        "hidden_act": "silu",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(own | fields))
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator) / hidden**0.5

    norm = load_file(target / "model.safetensors")["model.norm.weight"]
    tensors = {"norm.weight": norm * (1 + drawn(hidden))}
    for layer in range(layers):
        lead, width = f"layers.{layer}.", hidden // heads * kv_heads
        tensors |= {
            f"{lead}input_layernorm.weight": 1 + drawn(hidden),
            f"{lead}self_attn.q_proj.weight": drawn(hidden, hidden, scale=2),
            f"{lead}self_attn.k_proj.weight": drawn(width, hidden, scale=2),
            f"{lead}self_attn.v_proj.weight": drawn(width, hidden),
            f"{lead}self_attn.o_proj.weight": drawn(hidden, hidden, scale=0.4),
        }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module", params=["GQA", "MHA"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama model whose late layers say little, so that drafts are accepted."""
    folder = tmp_path_factory.mktemp("target") / "m"
    if request.param == "GQA":
        write_synthetic(folder, "tiny-llama", seed=0, late_scale=0.1)
        return folder
    from skipjack.loaders.save import save_checkpoint
    from skipjack.loaders.weights import checkpoint_tensors

    fields = synthetic_config("tiny-llama") | {"num_key_value_heads": 4}
    config = ModelConfig.parse(fields, "MHA")
    save_checkpoint(folder, fields, checkpoint_tensors(synthetic_weights(config, 1, torch.float32, 0.1), config))
    return folder


class Peer:
    """The method as published: transformers' modules in float64, a whole pass for every token, no cache."""

    def __init__(self, target: Path, adapter: Path) -> None:
        transformers = pytest.importorskip("transformers")
        from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding

        self.model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float64).eval()
        config = transformers.LlamaConfig.from_pretrained(adapter)
        config._attn_implementation = "eager"
        tensors = {name: tensor.double() for name, tensor in load_file(adapter / "model.safetensors").items()}
        self.layers = []
        for layer in range(config.num_hidden_layers):
            lead = f"layers.{layer}."
            parts = (
                ("input_layernorm.", LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)),
                ("self_attn.", LlamaAttention(config, layer)),
            )
            for name, module in parts:
                own = {key.removeprefix(lead + name): t for key, t in tensors.items() if key.startswith(lead + name)}
                module.double().load_state_dict(own)
            self.layers.append([module for _, module in parts])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps).double()
        self.norm.load_state_dict({"weight": tensors["norm.weight"]})
        self.rotary = LlamaRotaryEmbedding(config).double()

    def logits(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Those of a draft after every token, and those of the whole model: float64 [T, V] each."""
        exited: list[Tensor] = []
        layer = self.model.model.layers[EXIT - 1]
        hook = layer.register_forward_hook(
            lambda *call: exited.append(call[2][0] if isinstance(call[2], tuple) else call[2])
        )
        with torch.no_grad():
            whole = self.model(torch.tensor([tokens])).logits[0]
            hook.remove()
            (x,) = exited
            count = len(tokens)
            rotation = self.rotary(x, torch.arange(count)[None])
            unseen = torch.full((count, count), -torch.inf, dtype=torch.float64).triu(1)[None, None]
            for norm, attention in self.layers:
                x = x + attention(norm(x), position_embeddings=rotation, attention_mask=unseen)[0]
            return self.model.lm_head(self.norm(x))[0], whole

    def rounds(self, prompt: list[int], count: int, steps: int, threshold: float) -> list[tuple[list[int], int]]:
        """What every round drafts, and how much of it is accepted, until there are `count` tokens."""
        tokens, told = [*prompt, int(self.logits(prompt)[1][-1].argmax())], []
        while (left := len(prompt) + count - len(tokens)) > 0:
            draft: list[int] = []
            for _ in range(min(steps, left - 1)):
                probability = self.logits(tokens + draft)[0][-1].softmax(dim=-1)
                draft.append(int(probability.argmax()))
                if probability.max() < threshold:
                    break
            chosen = self.logits(tokens + draft)[1].argmax(dim=-1)[len(tokens) - 1 :].tolist()
            accepted = next((i for i, token in enumerate(draft) if token != chosen[i]), len(draft))
            tokens += [*draft[:accepted], chosen[accepted]]
            told.append((draft, accepted))
        return told


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_draft_logits_are_those_of_transformers(target: Path, tmp_path: Path, rotation: str, layers: int) -> None:
    """After a prompt in two parts, draft passes, one of two rows, and a row that was only cached."""
    folder = write_adapter(tmp_path / "a", target, layers, **ROTATIONS[rotation])
    config = ModelConfig.load(target)
    model = Model(config, load_weights(target, config, torch.float64), TORCH)
    adapter, cache = Adapter.of(model, str(folder)), model.new_cache(4)
    tokens = torch.randint(3, 500, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    pages, plan = cache.reserve(300), model.full.early_exit(EXIT)
    with torch.inference_mode():
        for first, end in ((0, 150), (150, 290)):
            rows = one_sequence(tokens[first:end], first, pages, TORCH.prefill_tile, model.device)
            stream = adapter.exit(model, cache, rows, plan)
            assert torch.equal(stream, model.forward(rows, cache, plan))
        found: dict[int, Tensor] = {}
        for first, end in ((290, 291), (291, 292), (292, 294), (295, 300)):
            if first == 295:
                skipped = one_sequence(tokens[294:295], 294, pages, TORCH.decode_tile, model.device)
                adapter.exit(model, cache, skipped, plan)
            rows = one_sequence(tokens[first:end], first, pages, TORCH.decode_tile, model.device)
            stream, hidden, norm = adapter.draft(model, cache, rows, plan)
            assert torch.equal(stream, model.forward(rows, cache, plan))
            found |= dict(enumerate(model.logits(hidden, norm=norm), start=first))
    expected = Peer(target, folder).logits(tokens)[0]
    assert sorted(found) == [290, 291, 292, 293, 295, 296, 297, 298, 299]
    for position, logits in found.items():
        # Rotations are float32 in either.
        assert (logits - expected[position]).abs().max() / expected.std() < 1e-5
    assert (expected - Peer(target, folder).logits(tokens)[1]).abs().max() > 0.1


@pytest.mark.parametrize(("steps", "threshold"), [(6, 0.6), (6, 0.2), (3, 0.0), (1, 1.0)])
def test_rounds_are_those_published(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, threshold: float
) -> None:
    folder = write_adapter(tmp_path / "a", target)
    config = ModelConfig.load(target)
    model = Model(config, load_weights(target, config, torch.float64), TORCH)
    told: list[tuple[list[int], int]] = []

    def observe(self: Kangaroo, model: Model, cache: Any, done: Any) -> float:
        count = int(done.draft.length[0])
        told.append((done.draft.tokens[0, :count].tolist(), int(done.verdict.accepted[0])))
        return 0.0

    monkeypatch.setattr(Kangaroo, "observe", observe)
    name = f"kangaroo:adapter={folder},exit_layer={EXIT},num_draft_tokens={steps},threshold={threshold}"
    method, cache, peer, seen = registry.parse(name).build(config), model.new_cache(2), Peer(target, folder), []
    at_once(method.prepare(model, None))
    for prompt in PROMPTS:
        params = SamplingParams(max_tokens=24, ignore_eos=True)
        sequence = Sequence(0, 0, prompt, params, 0, frozenset(), config.max_context, None)
        with torch.inference_mode(), cache.lent(sequence.max_length) as sequence.pages:
            prefill(model, cache, sequence, method)
            while sequence.finish_reason is None:
                speculate(model, cache, [sequence], method)
        expected = peer.rounds(prompt, 24, steps, threshold)
        assert told == expected
        seen += expected
        told.clear()
    # All of a draft was accepted, and not all of one; where there is a threshold, also of one that ended by it.
    assert any(accepted == len(draft) > 0 for draft, accepted in seen)
    assert any(accepted < len(draft) for draft, accepted in seen)
    if threshold:
        assert steps == 1 or any(0 < len(draft) < steps and accepted == len(draft) for draft, accepted in seen)
    else:
        assert any(len(draft) == steps for draft, _ in seen)


@pytest.mark.parametrize("graphs", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_are_those_of_plain_decoding(target: Path, tmp_path: Path, dtype: torch.dtype, graphs: bool) -> None:
    """Whatever the adapter is, of prompts in one part and in two, across pages."""
    one = write_adapter(tmp_path / "a", target)
    other = write_adapter(tmp_path / "b", target, layers=2, seed=1, rope_theta=300.0)
    config = ModelConfig.load(target)
    prompts = [*PROMPTS, [(7 * i) % 500 + 3 for i in range(601)], [9] * 250]
    drafted = accepted = 0
    with Engine(config, load_weights(target, config, dtype), graphs=graphs) as engine:
        for temperature in (0.0, 0.8):
            params = SamplingParams(max_tokens=20, temperature=temperature, seed=3, ignore_eos=True)
            plain = [engine.generate(prompt, params).token_ids for prompt in prompts]
            for options in (f"{one},exit_layer={EXIT}", f"{other},exit_layer={EXIT},threshold=0.1", f"{other}"):
                method = f"kangaroo:adapter={options}"
                for output, tokens in zip(engine.generate(prompts, params, method=method), plain, strict=True):
                    assert output.token_ids == tokens
                    assert output.stats.lossless
                    assert output.stats.notes == ()
                    assert (output.stats.graph_rounds > 0) == graphs
                    drafted, accepted = drafted + output.stats.drafted, accepted + output.stats.accepted
    assert 0 < accepted < drafted


def test_choices_of_one_prompt_draft_as_they_do_alone(target: Path, tmp_path: Path) -> None:
    """A copied prompt brings the adapter's keys along."""
    method = f"kangaroo:exit_layer={EXIT},threshold=0.1,adapter={write_adapter(tmp_path / 'a', target)}"
    config, prompt = ModelConfig.load(target), list(range(30, 330))
    with Engine(config, load_weights(target, config, torch.float32)) as engine:
        both = engine.generate(
            prompt, SamplingParams(max_tokens=24, n=2, temperature=0.8, seed=5, ignore_eos=True), method=method
        )
        alone = [
            engine.generate(
                prompt, SamplingParams(max_tokens=24, temperature=0.8, seed=seed, ignore_eos=True), method=method
            )
            for seed in (5, 6)
        ]
    assert [choice.token_ids for choice in both.choices] == [output.token_ids for output in alone]
    assert both.stats.drafted == sum(output.stats.drafted for output in alone)
    assert both.stats.accepted == sum(output.stats.accepted for output in alone) > 0


def test_no_pass_reads_a_hole(target: Path, tmp_path: Path, audit: Callable[[Engine], Any]) -> None:
    """Of the adapter's cache either: a draft accepted whole leaves its last token's keys for the next."""
    method = (
        f"kangaroo:exit_layer={EXIT},threshold=0,num_draft_tokens=3,adapter={write_adapter(tmp_path / 'a', target)}"
    )
    config = ModelConfig.load(target)
    with Engine(config, load_weights(target, config, torch.float32)) as engine:
        seen = audit(engine)
        outputs = engine.generate(
            PROMPTS, SamplingParams(max_tokens=30, temperature=0.5, seed=1, ignore_eos=True), method=method
        )
    assert any(output.stats.accepted_per_position[2] > 0 for output in outputs)
    assert len(seen.annexes) == 1
    assert seen.reads > 0


def test_an_adapter_is_loaded_once_and_goes_with_its_engine(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Adapter]] = []
    of = Adapter.__init__

    def noted(self: Adapter, *given: Any) -> None:
        made.append(weakref.ref(self))
        of(self, *given)

    monkeypatch.setattr(Adapter, "__init__", noted)
    folder, config = write_adapter(tmp_path / "a", target), ModelConfig.load(target)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with Engine(config, load_weights(target, config, torch.float32)) as engine:
        for layer in (2, 5):
            engine.generate(PROMPTS[0], params, method=f"kangaroo:adapter={folder},exit_layer={layer}")
        assert len(made) == 1
        engine.generate(PROMPTS[0], params, method=f"kangaroo:adapter={kangaroo.UNTRAINED},exit_layer=2")
        assert len(made) == 2
    del engine
    gc.collect()
    assert [adapter() for adapter in made] == [None, None]


def test_an_untrained_adapter_is_told(synthetic: Callable[..., Engine]) -> None:
    method = f"kangaroo:adapter={kangaroo.UNTRAINED}"
    stats = synthetic("tiny").generate([5], SamplingParams(max_tokens=3), method=method).stats
    assert stats.notes == (kangaroo.NO_TRAINING,)
    assert stats.layers_kept == 2


@pytest.mark.parametrize("shape", ["tiny-bloom", "tiny-qwen3", "tiny-smollm3", "tiny-mistral"])
def test_other_families_have_adapters_too(synthetic: Callable[..., Engine], shape: str) -> None:
    engine, params = synthetic(shape, torch.float32, 0.1), SamplingParams(max_tokens=24, ignore_eos=True)
    method = f"kangaroo:adapter={kangaroo.UNTRAINED},exit_layer={EXIT},threshold=0.1"
    for prompt, output in zip(PROMPTS, engine.generate(PROMPTS, params, method=method), strict=True):
        assert output.token_ids == engine.generate(prompt, params).token_ids
        assert output.stats.drafted > 0


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("kangaroo", "option adapter expects the folder of a trained adapter, .* got none"),
        ("kangaroo:adapter=untrained,exit_layer=8", "exit_layer expects 1 to 7, got 8"),
        ("kangaroo:adapter=untrained,exit_layer=0", "exit_layer expects 1 to 512, got 0"),
        ("kangaroo:adapter=untrained,num_draft_tokens=0", "num_draft_tokens expects 1 to 64"),
        ("kangaroo:adapter=untrained,threshold=2", "threshold expects 0 to 1, got 2.0"),
    ],
)
def test_options_are_checked(synthetic: Callable[..., Engine], method: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        synthetic("tiny").generate(PROMPTS[0], method=method)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 128}, r"config\.json: hidden_size: expected the model's 64, found 128"),
        ({"num_attention_heads": 8}, r"config\.json: num_attention_heads: expected the model's 4, found 8"),
        ({"num_key_value_heads": 1}, r"config\.json: num_key_value_heads: expected the model's \d, found 1"),
        ({"head_dim": 32}, r"config\.json: head_dim: expected the model's 16, found 32"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            r"config\.json: rope_scaling: expected a scaling that does not follow a text's length, found dynamic",
        ),
        ({"attention_bias": True}, r"config\.json: attention_bias: expected false"),
        ({"model_type": "mistral", "architectures": None}, r"config\.json: model_type: expected 'llama'"),
        ({"num_hidden_layers": "1"}, r"config\.json: num_hidden_layers"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    target: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = write_adapter(tmp_path / "a", target)
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(own | fields))
    with pytest.raises(ConfigError, match=message):
        adapter_config(folder, ModelConfig.load(target))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": None}, r"norm\.weight: expected shape \[64\], found no such tensor"),
        (
            {"layers.0.self_attn.o_proj.weight": None},
            r"o_proj\.weight: expected shape \[64, 64\], found no such tensor",
        ),
        (
            {"layers.0.self_attn.q_proj.weight": torch.zeros(64, 32)},
            r"model\.safetensors: layers\.0\.self_attn\.q_proj\.weight: expected shape \[64, 64\] by config\.json, "
            r"found \[64, 32\]",
        ),
        (
            {"layers.0.mlp.up_proj.weight": torch.zeros(128, 64)},
            r"model\.safetensors: .*layers\.0\.mlp\.up_proj\.weight.*: expected no such tensor in an adapter",
        ),
        ({"norm.weight": torch.full((64,), torch.nan)}, r"model\.safetensors: norm\.weight: expected finite numbers"),
        ({"norm.weight": torch.zeros(64, dtype=torch.int64)}, r"norm\.weight.*dtype: expected one of"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    target: Path, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    folder = write_adapter(tmp_path / "a", target)
    tensors = load_file(folder / "model.safetensors") | change
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
    config = ModelConfig.load(target)
    with (
        pytest.raises(CheckpointError, match=message),
        Engine(config, load_weights(target, config, torch.float32)) as engine,
    ):
        engine.generate(PROMPTS[0], method=f"kangaroo:adapter={folder},exit_layer=2")


def test_what_is_not_there_or_pickled_is_refused_before_weights_are_read(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("skipjack.runtime.engine.load_weights", refuse)
    with pytest.raises(ConfigError, match="nowhere: expected the folder of an adapter, found nothing"):
        Engine.load(target, method=f"kangaroo:adapter={tmp_path / 'nowhere'}")
    folder = write_adapter(tmp_path / "a", target)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"found pytorch_model\.bin: pickled weights can run code"):
        Engine.load(target, method=f"kangaroo:adapter={folder}")
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json"):
        Engine.load(target, method=f"kangaroo:adapter={folder}")


def test_rotary_buffers_of_old_checkpoints_are_ignored(target: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", target)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}, folder / "model.safetensors")
    assert adapter_config(folder, ModelConfig.load(target)).num_layers == 1
