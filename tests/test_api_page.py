"""docs/api.md names everything public with the defaults and ranges it has, and its examples run as they stand there."""

import ast
import asyncio
import inspect
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

import skipjack
from skipjack import AsyncStream, Engine, LayerPlan, RequestError, SamplingParams, Stats, Stream
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.save import save_checkpoint
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.loaders.weights import checkpoint_tensors

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
REQUIRED = inspect.Parameter.empty
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
CLASSES = [kind for name in skipjack.__all__ if isinstance(kind := getattr(skipjack, name), type)]
ERRORS = [kind for kind in CLASSES if issubclass(kind, Exception)]


class Table(NamedTuple):
    """A table of the page: what its columns are called, and its rows as dictionaries."""

    columns: list[str]
    rows: list[dict[str, str]]

    def column(self, name: str) -> list[str]:
        return [row[name] for row in self.rows]


def tables(heading: str) -> list[Table]:
    """Those between a heading and the next one."""
    (section,) = re.findall(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE)
    found: list[Table] = []
    for block in re.findall(r"(?:^\|.*\|\n)+", section, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        assert all(len(row) == len(head) for row in rows), f"{heading}: a row has more or fewer cells than the head"
        found.append(Table(head, [dict(zip(head, row, strict=True)) for row in rows]))
    return found


def names(cell: str) -> list[str]:
    """What a cell has in backticks."""
    return re.findall(r"`([^`]*)`", cell)


def name(cell: str) -> str:
    (found,) = names(cell)
    return found


def value(cell: str) -> object:
    """A default as it is written in a cell."""
    return REQUIRED if cell == "required" else ast.literal_eval(name(cell))


def defaults(rows: list[dict[str, str]], column: str) -> dict[str, object]:
    return {name(row[column]): value(row["default"]) for row in rows}


def parameters(function: Callable[..., Any]) -> dict[str, object]:
    """A function's parameters and their defaults."""
    return {key: one.default for key, one in inspect.signature(function).parameters.items() if key != "self"}


def public(kind: type) -> dict[str, object]:
    """Members of a class and its bases here; the fields of a dataclass have members only where they have a default."""
    own = [base for base in kind.__mro__ if base.__module__.startswith("skipjack.")]
    return {key: member for base in reversed(own) for key, member in vars(base).items() if not key.startswith("_")}


def shown(kind: type) -> set[str]:
    """Fields and properties of a class."""
    own = {field.name for field in fields(kind)} if is_dataclass(kind) else set[str]()
    return own | {key for key, member in public(kind).items() if not is_method(member)}


def methods(kind: type) -> dict[str, Callable[..., Any]]:
    return {key: getattr(kind, key) for key, member in public(kind).items() if is_method(member)}


def is_method(member: object) -> bool:
    return inspect.isroutine(member) and not isinstance(member, cached_property)


def test_every_public_name_is_on_the_page() -> None:
    headings = {part for line in re.findall(r"^##+ (.*)$", PAGE, re.MULTILINE) for part in re.split(r", | and ", line)}
    errors = {name(row["error"]) for row in tables("Errors")[0].rows}
    described = headings | errors | {"Stream", "AsyncStream"}
    assert set(skipjack.__all__) - {"__version__"} <= described
    assert "`skipjack.__version__`" in PAGE
    assert errors == {kind.__name__ for kind in ERRORS}


def test_every_class_is_held_against_the_page() -> None:
    """A class that is made public must be added to one of these tests."""
    assert {Engine, SamplingParams, LayerPlan, Stream, AsyncStream, *ERRORS, *RESULTS} == set(CLASSES)


def test_errors_have_the_bases_the_page_says() -> None:
    for row in tables("Errors")[0].rows:
        assert getattr(skipjack, name(row["error"])).__bases__[0].__name__ == name(row["base"])


@pytest.mark.parametrize(("function", "place"), [(Engine.load, "load"), (Engine, "Engine")])
def test_what_an_engine_is_made_with(function: Callable[..., Any], place: str) -> None:
    (table,) = tables("Engine.load and Engine")
    assert set(table.column("in")) == {"load", "Engine", "both"}
    rows = [row for row in table.rows if row["in"] in (place, "both")]
    assert defaults(rows, "parameter") == parameters(function)
    positional = [
        key for key, one in inspect.signature(function).parameters.items() if one.kind is not one.KEYWORD_ONLY
    ]
    assert positional == (["model"] if place == "load" else ["config", "weights"])


@pytest.mark.parametrize(
    ("function", "heading"),
    [
        (Engine.generate, "generate, stream, astream"),
        (Engine.stream, "generate, stream, astream"),
        (Engine.astream, "generate, stream, astream"),
        (Engine.score, "score"),
        (Engine.warm_up, "warm_up"),
        (Engine.close, "close"),
        (Engine.metrics, "metrics"),
    ],
)
def test_what_methods_of_an_engine_take(function: Callable[..., Any], heading: str) -> None:
    rows = [row for table in tables(heading)[:1] for row in table.rows]
    assert defaults(rows, "parameter") == parameters(function)


def test_every_method_of_an_engine_has_its_heading() -> None:
    headings = re.findall(r"^### (.*)$", PAGE, re.MULTILINE)
    described = {part for line in headings for part in line.split(", ")} | {"load"}
    assert set(methods(Engine)) <= described
    assert [name(cell) for cell in tables("generate, stream, astream")[1].column("method")] == [
        "generate",
        "stream",
        "astream",
    ]


def test_attributes_of_an_engine(synthetic: Callable[..., Engine]) -> None:
    (table,) = tables("Attributes")
    own = {key for key in vars(synthetic("tiny")) if not key.startswith("_")}
    assert sorted(map(name, table.column("attribute"))) == sorted(own | shown(Engine))


def test_attributes_are_readable_after_closing() -> None:
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    engine = Engine(config, synthetic_weights(config, 0, torch.float32))
    engine.close()
    for cell in tables("Attributes")[0].column("attribute"):
        getattr(engine, name(cell))


def test_fields_of_sampling_parameters() -> None:
    rows, properties = tables("SamplingParams")
    params = SamplingParams()
    assert defaults(rows.rows, "field") == {field.name: getattr(params, field.name) for field in fields(params)}
    assert set(map(name, properties.column("property"))) == shown(SamplingParams) - {f.name for f in fields(params)}
    assert not methods(SamplingParams)


def bounds() -> Iterator[Any]:
    for row in tables("SamplingParams")[0].rows:
        found = re.fullmatch(r"(from|above) `([^`]*)`(?: to `([^`]*)`)?", row["range"])
        if found:
            yield pytest.param(name(row["field"]), *found.groups(), id=name(row["field"]))


@pytest.mark.parametrize(("field", "word", "low", "high"), [*bounds()])
def test_ranges_of_sampling_parameters(field: str, word: str, low: str, high: str | None) -> None:
    """The ends are taken as the page says, and what is a little beyond them is refused."""
    whole = type(getattr(SamplingParams(), field)) is not float

    def number(text: str) -> Any:
        known = {"max_tokens": SamplingParams().max_tokens}
        found = eval(text, {"__builtins__": {}}, known)
        return found if whole else float(found)

    def refused(given: Any) -> None:
        with pytest.raises(RequestError, match=f"^{field}: expected"):
            SamplingParams(**{field: given})

    step = 1 if whole else 1e-7
    if word == "from":
        SamplingParams(**{field: number(low)})
        refused(number(low) - step)
    else:
        refused(number(low))
        SamplingParams(**{field: number(low) + step})
    if high is not None:
        SamplingParams(**{field: number(high)})
        refused(number(high) + step)


def test_ranges_that_are_no_numbers() -> None:
    """Those of the fields that the test above does not look at, and vLLM's defaults."""
    rows = tables("SamplingParams")[0].rows
    others = {name(row["field"]) for row in rows} - {param.id for param in bounds()}
    assert others == {"stop", "stop_token_ids", "ignore_eos", "logit_bias"}
    SamplingParams(stop=["a" * 1024] * 64, logit_bias={0: 100, 1: -100})
    for fields_ in ({"stop": ["a"] * 65}, {"stop": "a" * 1025}, {"logit_bias": {0: 100.1}}, {"logit_bias": {0: -101}}):
        with pytest.raises(RequestError):
            SamplingParams(**fields_)
    differing = {name(row["field"]): row["vLLM"] for row in rows if row["vLLM"]}
    nothing = dict.fromkeys(("stop", "stop_token_ids", "logit_bias"), "differs: None")
    assert differing == {"max_tokens": "differs: 16", "temperature": "differs: 1.0", **nothing}


RESULTS = [kind for kind in CLASSES if is_dataclass(kind) and kind not in (SamplingParams, LayerPlan)]


@pytest.mark.parametrize("kind", RESULTS, ids=lambda kind: kind.__name__)
def test_fields_of_results(kind: type) -> None:
    (table,) = tables(kind.__name__)
    assert sorted(map(name, table.column("field"))) == sorted(shown(kind))
    assert all(row["type"] and row["meaning"] for row in table.rows)
    assert not methods(kind)


def members(table: Table, column: str) -> dict[str, object]:
    """Names of a column, those of methods with their parameters as the code would tell them."""
    found: dict[str, object] = {}
    for written in (part for cell in table.column(column) for part in names(cell)):
        call = re.fullmatch(r"(\w+)\((.*)\)", written)
        if call is None:
            found[written] = None
            continue
        space: dict[str, Any] = {}
        exec(f"def given({call[2]}): pass", space)
        found[call[1]] = parameters(space["given"])
    return found


@pytest.mark.parametrize(("kind", "place"), [(Stream, 0), (AsyncStream, 1)])
def test_members_of_streams(kind: type, place: int) -> None:
    table = tables("Streams")[place]
    given = members(table, f"member of `{kind.__name__}`")
    assert given == {**dict.fromkeys(shown(kind)), **{key: parameters(one) for key, one in methods(kind).items()}}


def test_members_of_plans() -> None:
    (table,) = tables("LayerPlan")
    given = members(table, "member")
    called = {key: parameters(one) for key, one in methods(LayerPlan).items()}
    assert given == {**dict.fromkeys(shown(LayerPlan)), **called}
    marked = {name(row["member"]): row["meaning"] for row in table.rows if row["meaning"].startswith("field")}
    assert list(marked) == [field.name for field in fields(LayerPlan)]
    optional = {field.name: field.default for field in fields(LayerPlan) if field.default is not MISSING}
    assert {key: name(said) for key, said in marked.items() if "default" in said} == {
        key: repr(default) for key, default in optional.items()
    }


def test_statistics_of_a_request_are_as_the_page_says(synthetic: Callable[..., Engine]) -> None:
    """What is None, empty or 0, and when."""
    params = SamplingParams(max_tokens=6, ignore_eos=True, n=2, temperature=1.0, seed=2**64 - 1)
    engine = synthetic("tiny")
    plain, lossy, exited, drafted = (
        engine.generate([5, 6, 7, 5, 6, 7], params, method=method)
        for method in ("autoregressive", "static:skip=3", "layerskip:exit_layer=4,verify=false", "lookup")
    )
    for output in (plain, lossy, exited, drafted):
        stats = output.stats
        assert stats.completion_tokens == 2 + stats.accepted + stats.bonus == 12
        assert not any(isinstance(found, float) and math.isnan(found) for found in vars(stats).values())
        assert pickle.loads(pickle.dumps(output)) == output
        assert stats.other_s <= stats.decode_s
    assert plain.stats.weight_passes == exited.stats.weight_passes == 0.0 < lossy.stats.weight_passes
    assert plain.stats.tokens_per_weight_pass is None
    assert [len(output.stats.layers_per_token) for output in (plain, lossy, exited, drafted)] == [0, 6, 0, 0]
    assert plain.stats.mean_acceptance_length == lossy.stats.mean_acceptance_length == 1.0
    assert plain.stats.drafted_per_position == plain.stats.accepted_per_position == ()
    assert plain.stats.rounds == 10
    assert engine.generate([5], SamplingParams(max_tokens=1)).stats.decode_s == 0.0
    # Choice i is drawn with seed + i modulo 2**64.
    again = engine.generate([5, 6, 7, 5, 6, 7], SamplingParams(max_tokens=6, ignore_eos=True, temperature=1.0, seed=0))
    assert again.token_ids == plain.choices[1].token_ids


def test_rounds_of_the_device_are_timed_as_the_page_says() -> None:
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    with Engine(config, synthetic_weights(config, 0, torch.float32), graphs=True) as engine:
        stats = engine.generate([5], SamplingParams(max_tokens=4, ignore_eos=True)).stats
    assert stats.graph_rounds == stats.rounds == 3
    assert stats.draft_s == stats.verify_s == 0.0
    assert stats.other_s == stats.decode_s > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer of bytes and a chat template."""
    shape = synthetic_config("tiny") | {"max_position_embeddings": 1024}
    config = ModelConfig.parse(shape, "tiny")
    target = tmp_path_factory.mktemp("api") / "model"
    save_checkpoint(target, shape, checkpoint_tensors(synthetic_weights(config, 0, torch.float32, 0.3), config))
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(target / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
    (target / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return target


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For each engine that the test closes, whether all its pages were free by then."""
    found: list[bool] = []
    close = Engine.close

    def noted(engine: Engine) -> None:
        cache = engine._loaded()[1]
        found.append(engine._turn.take(lambda: cache.free_pages == cache.total_pages))
        close(engine)

    monkeypatch.setattr(Engine, "close", noted)
    yield found
    assert found == [True]


def run(example: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], dict[str, Any]]:
    """The lines it prints, and what it leaves."""
    (source,) = (text for text in EXAMPLES if example in text)
    assert source.count('"demo"') == 1
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source.replace('"demo"', repr(str(folder))), example, "exec"), space)
    return capsys.readouterr().out.splitlines(), space


def test_there_are_four_examples() -> None:
    assert len(EXAMPLES) == 4


@pytest.mark.usefixtures("closed")
def test_the_example_of_a_batch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, space = run("several = ", folder, capsys)
    assert lines[-1].startswith("method: unknown method 'swfit', expected one of adaskip, auto, ")
    assert len(space["outputs"]) == 3
    assert isinstance(space["outputs"][0].stats, Stats)
    assert len({tuple(choice.token_ids) for choice in space["several"].choices}) == 3


@pytest.mark.usefixtures("closed")
def test_the_example_of_a_stream(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,), space = run("Once upon", folder, capsys)
    assert line == f"abort {len(space['output'].token_ids)}"
    assert len(space["output"].token_ids) < 200
    assert space["text"] == space["output"].text


@pytest.mark.usefixtures("closed")
def test_the_example_of_an_exposition(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every field of `Metrics` once, with the kind the page says, by the grammar of the format."""
    lines, _ = run("exposition", folder, capsys)
    kinds = dict[str, str]()
    for kind_line, sample in zip(lines[::2], lines[1::2], strict=True):
        kind = re.fullmatch(r"# TYPE ([a-z_]+) (counter|gauge)", kind_line)
        found = re.fullmatch(r"([a-z_]+) [0-9.e+-]+", sample)
        assert kind is not None
        assert found is not None
        assert kind[1] == found[1]
        assert kind[1].endswith("_total") == (kind[2] == "counter")
        kinds[kind[1].removeprefix("skipjack_").removesuffix("_total")] = kind[2]
    assert kinds == {name(row["field"]): row["kind"] for row in tables("Metrics")[0].rows if row["kind"]}
    assert "skipjack_requests_finished_total 1" in lines


@pytest.mark.usefixtures("closed")
def test_the_example_of_a_handler(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ends by itself; the second is at its deadline when it begins; the third is cancelled."""
    wait_for, given = asyncio.wait_for, list[float]()

    def sooner(work: Any, seconds: float) -> Any:
        given.append(seconds)
        return wait_for(work, 600 if seconds > 1 else 0.01)

    monkeypatch.setattr(asyncio, "wait_for", sooner)
    (line,), _ = run("create_task", folder, capsys)
    whole, cut = ast.literal_eval(line)
    assert not whole.endswith(" …")
    assert cut.endswith(" …")
    assert given == [60.0, 0.2, 60.0]
