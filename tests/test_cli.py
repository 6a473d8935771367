import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from skipjack.runtime.commands import cli
from skipjack.runtime.errors import RequestError
from skipjack.runtime.request import Choice, Chunk, Output, Piece, SamplingParams, Stats
from skipjack.runtime.warm_up import WarmUp

REPORT_FIELDS = {
    "token_ids", "text", "finish_reason", "method", "lossless", "numerics", "backend", "seed",
    "usage", "timing", "speculative", "layers", "startup",
}  # fmt: skip
NESTED_FIELDS = {
    "usage": {"prompt_tokens", "completion_tokens"},
    "timing": {"prefill_s", "decode_s", "tokens_per_s", "draft_s", "verify_s", "search_s", "other_s"},
    "speculative": {
        "rounds",
        "graph_rounds",
        "drafted", "accepted", "acceptance_rate", "mean_acceptance_length", "bonus",
        "drafted_per_position", "accepted_per_position",
    },
    "layers": {"kept", "of", "executed_skips"},
    "startup": {"load_s", "compilations", "warm_up"},
}  # fmt: skip
WORDS = ["one", " two", " three"]


class FakeStream:
    def __init__(self, output: Output, pieces: list[Piece], interrupt: bool) -> None:
        self.outputs: list[Output] = []
        self.closed = False
        self._steps = self._run(output, pieces, interrupt)

    def _run(self, output: Output, pieces: list[Piece], interrupt: bool) -> Iterator[Chunk]:
        for i, piece in enumerate(pieces):
            yield Chunk(0, 0, (piece,), "length" if i + 1 == len(pieces) else None)
            if interrupt:
                os.kill(os.getpid(), signal.SIGINT)
        self.outputs = [output]

    def __iter__(self) -> Iterator[Chunk]:
        return self._steps

    def __next__(self) -> Chunk:
        return next(self._steps)

    def close(self) -> None:
        self.closed = True


class FakeEngine:
    """Answers "one two three" to anything; what it was asked is kept in `asked`."""

    made: "list[FakeEngine]"
    tokenizer: object | None = SimpleNamespace(
        fewest_tokens=lambda text: 0,
        encode=lambda text, add_special_tokens: [1, 2, 3, 4],
        render=lambda messages: "\n".join(message["content"] for message in messages),
    )
    load_s = 1.5
    compilations = 0
    warmed_up: WarmUp | None = None
    config = SimpleNamespace(vocab_size=512, max_context=64)
    cache_note: str | None = None
    interrupt = False
    differ = False

    def __init__(self, model: str, options: dict) -> None:
        self.model_path = Path(model)
        self.backend = "torch (fake)"
        self.options = options
        self.method = options["method"]
        self.asked: list[tuple] = []
        self.closed = False

    @classmethod
    def load(cls, model: str, **options: object) -> "FakeEngine":
        if options["method"] == "nonsense":
            raise RequestError("method: expected one of autoregressive, swift, got\n'nonsense'")
        if check := options.pop("check"):
            check(cls.config, cls.tokenizer)
        cls.made.append(cls(model, options))
        return cls.made[-1]

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def warm_up(self, *, sequences: int, context: int | None) -> WarmUp:
        self.warmed_for = sequences, context
        self.warmed_up = WarmUp(5, 2, 0.25)
        return self.warmed_up

    def _answer(self, method: str | None) -> tuple[Output, list[Piece]]:
        name = method or self.method
        speculative = name != "autoregressive"
        ids = [7, 8, 9 if speculative and self.differ else 10]
        text = "".join(WORDS) if self.tokenizer else None
        stats = Stats(
            name,
            True,
            self.backend,
            0,
            4,
            3,
            decode_s=0.5,
            rounds=2,
            drafted=2,
            accepted=1,
            layers=30,
            layers_kept=15.5,
        )
        pieces = [
            Piece(t, w if self.tokenizer else "", speculative and t == 8) for t, w in zip(ids, WORDS, strict=True)
        ]
        return Output([1, 2, 3, 4], (Choice(text, ids, "length"),), stats), pieces

    def generate(self, prompt: object, params: SamplingParams, *, method: str | None = None) -> Output:
        self.asked.append((prompt[:], params))
        return self._answer(method)[0]

    def stream(self, prompt: object, params: SamplingParams, *, method: str | None = None) -> FakeStream:
        self.asked.append((prompt[:], params))
        return FakeStream(*self._answer(method), self.interrupt)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    class Fresh(FakeEngine):
        made: "list[FakeEngine]" = []  # noqa: RUF012

    module = ModuleType("skipjack.runtime.engine")
    module.Engine = Fresh
    monkeypatch.setitem(sys.modules, "skipjack.runtime.engine", module)
    return Fresh


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path)


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line a mistake prints."""
    assert cli.run(arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    return one_line(streams.err)


def one_line(errors: str) -> str:
    assert errors.startswith("error: ")
    assert errors.endswith("\n")
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
    return errors


def assert_report(report: dict) -> None:
    assert set(report) == REPORT_FIELDS
    for name, fields in NESTED_FIELDS.items():
        assert set(report[name]) == fields


class TestGenerate:
    def test_prints_the_text_alone(self, engine, folder, capsys) -> None:
        assert cli.run(["generate", folder, "hello"]) == 0
        streams = capsys.readouterr()
        assert streams.out == "one two three\n"
        assert streams.err == ""
        assert engine.made[0].closed

    def test_prints_ids_without_a_tokenizer(self, engine, folder, capsys) -> None:
        engine.tokenizer = None
        assert cli.run(["generate", folder, "--prompt-ids", "1, 2,3"]) == 0
        assert cli.run(["generate", folder, "--prompt-ids", "1,2,3", "--stream"]) == 0
        assert capsys.readouterr().out == "7,8,10\n7,8,10\n"
        assert engine.made[0].asked[0][0] == [1, 2, 3]

    def test_json_is_one_object_with_the_documented_fields(self, engine, folder, capsys) -> None:
        assert cli.run(["generate", folder, "hello", "--json", "--method", "swift"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert_report(report)
        assert report["text"] == "one two three"
        assert report["speculative"]["mean_acceptance_length"] == 1.5
        assert report["layers"] == {"kept": 15.5, "of": 30, "executed_skips": 0}

    def test_json_text_is_null_without_a_tokenizer(self, engine, folder, capsys) -> None:
        engine.tokenizer = None
        assert cli.run(["generate", folder, "--prompt-ids", "1", "--json", "--stream"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert all(line["text"] is None for line in lines)

    def test_a_json_stream_is_a_line_a_chunk_and_the_report(self, engine, folder, capsys) -> None:
        assert cli.run(["generate", folder, "hello", "--json", "--stream"]) == 0
        *chunks, report = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [token for chunk in chunks for token in chunk["token_ids"]] == report["token_ids"]
        assert [chunk["finish_reason"] for chunk in chunks] == [None, None, "length"]
        assert_report(report)

    def test_a_warm_up_is_of_what_the_request_can_reach(self, engine, folder, capsys) -> None:
        for tokens, context in (("5", 8), ("500", 64)):
            line = ["generate", folder, "--prompt-ids", "1,2,3", "--max-tokens", tokens, "--json"]
            assert cli.run([*line, "--warm-up"]) == 0
            streams = capsys.readouterr()
            assert engine.made[-1].warmed_for == (1, context)
            assert streams.err == "warm-up: 5 kernels compiled, 2 graphs captured, 0.2 s\n"
            assert json.loads(streams.out)["startup"]["warm_up"] == {"compilations": 5, "graphs": 2, "seconds": 0.25}
            assert cli.run(line) == 0
            streams = capsys.readouterr()
            assert streams.err == ""
            assert json.loads(streams.out)["startup"]["warm_up"] is None

    def test_a_request_that_is_refused_loads_nothing(self, engine, folder, capsys) -> None:
        assert "600" in refusal(capsys, "generate", folder, "--prompt-ids", "1,600", "--warm-up")
        assert engine.made == []

    def test_options_reach_the_engine(self, engine, folder) -> None:
        line = "--max-tokens 5 --temperature 0.5 --top-p 0.9 --top-k 40 --min-p 0.1 --seed 3 --stop a --stop b"
        rest = "--ignore-eos --device cpu --dtype bfloat16 --backend torch --method swift:skip_ratio=0.4"
        chosen = [*line.split(), *rest.split(), "--numerics", "fast", "--cache-tokens", "600"]
        assert cli.run(["generate", folder, "hello", *chosen]) == 0
        made = engine.made[0]
        assert made.asked == [("hello", SamplingParams(5, 0, 0.5, 0.9, 40, 0.1, 3, ("a", "b"), ignore_eos=True))]
        made.options.pop("progress")
        expected = {"method": "swift:skip_ratio=0.4", "device": "cpu", "dtype": "bfloat16", "backend": "torch"}
        expected |= {"numerics": "fast", "cache_tokens": 600, "max_sequences": 16, "prefix_caching": False}
        assert made.options == expected

    def test_a_cache_smaller_than_the_context_is_told_beside_the_answer(self, engine, folder, capsys) -> None:
        engine.cache_note = "the KV cache holds 2048 tokens"
        assert cli.run(["generate", folder, "hello", "--json"]) == 0
        streams = capsys.readouterr()
        assert streams.err == "the KV cache holds 2048 tokens\n"
        assert_report(json.loads(streams.out))

    @pytest.mark.parametrize("command", ["generate", "chat"])
    def test_the_cache_has_an_option(self, engine, folder, monkeypatch, command) -> None:
        feed(monkeypatch, b"")
        assert cli.run([command, folder, "--cache-tokens", "77", *(["x"] if command == "generate" else [])]) == 0
        options = engine.made[0].options
        assert (options["cache_tokens"], options["prefix_caching"]) == (77, command == "chat")

    def test_reads_the_prompt_from_a_pipe_or_a_file(self, engine, folder, tmp_path, monkeypatch) -> None:
        feed(monkeypatch, "käse\n\n".encode())
        assert cli.run(["generate", folder, "-"]) == 0
        (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfline\r\n")
        assert cli.run(["generate", folder, "--prompt-file", str(tmp_path / "prompt.txt")]) == 0
        assert [made.asked[0][0] for made in engine.made] == ["käse\n", "line"]


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["hello", "--max-tokens", "-1"], "max_tokens"),
            (["hello", "--max-tokens", "many"], "--max-tokens"),
            (["hello", "--temperature", "-0.5"], "temperature"),
            (["hello", "--temperature", "nan"], "temperature"),
            (["hello", "--top-p", "0"], "top_p"),
            (["hello", "--top-k", "-2"], "top_k"),
            (["hello", "--min-p", "2"], "min_p"),
            (["hello", "--seed", "-1"], "seed"),
            (["hello", "--stop", ""], "stop"),
            (["hello", "--dtype", "int4"], "--dtype"),
            (["hello", "--device", "tpu"], "--device"),
            (["hello", "--nonsense"], "--nonsense"),
            (["hello", "more"], "more"),
            ([], "got none"),
            (["hello", "--prompt-ids", "1"], "got 2"),
            (["-", "--prompt-file", "f", "--prompt-ids", "1"], "got 3"),
            (["--prompt-ids", "1,two"], "'two'"),
            (["--prompt-ids", "1,-2"], "'-2'"),
            (["--prompt-ids", "1.5"], "'1.5'"),
            (["--prompt-ids", ""], "''"),
            (["--prompt-file", "absent.txt"], "absent.txt"),
        ],
    )
    def test_is_refused_before_a_model_is_loaded(self, engine, folder, capsys, arguments, named) -> None:
        assert named in refusal(capsys, "generate", folder, *arguments)
        assert engine.made == []

    @pytest.mark.parametrize("command", ["generate", "chat", "inspect"])
    def test_a_missing_folder_is_named(self, capsys, command) -> None:
        prompt = ["hello"] if command == "generate" else []
        assert "'no/such/folder'" in refusal(capsys, command, "no/such/folder", *prompt)

    def test_an_error_of_the_engine_is_one_line(self, engine, folder, capsys) -> None:
        assert "'nonsense'" in refusal(capsys, "generate", folder, "hello", "--method", "nonsense")

    def test_a_prompt_that_is_not_utf8(self, folder, capsys, monkeypatch) -> None:
        feed(monkeypatch, b"ab\xff")
        assert "0xff at 2" in refusal(capsys, "generate", folder, "-")

    @pytest.mark.parametrize("arguments", [["nonsense"], ["generate"], ["--nonsense"], ["demo", "extra"]])
    def test_usage(self, capsys, arguments) -> None:
        refusal(capsys, *arguments)

    def test_a_missing_folder_is_found_without_torch(self) -> None:
        asked = "from skipjack.runtime.commands import cli; cli.run(['generate', 'absent', 'x'])"
        script = f"import sys; {asked}; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert "torch" not in done.stdout.split()


class TestEndings:
    def test_ctrl_c_exits_130_without_a_traceback(self, engine, folder, capsys) -> None:
        engine.interrupt = True
        # Tests that run in the background inherit a shell's order to ignore it.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            assert cli.run(["generate", folder, "hello", "--stream"]) == 130
        finally:
            signal.signal(signal.SIGINT, before)
        assert "Traceback" not in capsys.readouterr().err
        assert engine.made[0].closed

    @pytest.mark.parametrize(("handler", "code"), [("default_int_handler", 130), ("SIG_IGN", 0)])
    def test_ctrl_c_while_commands_are_imported_is_no_traceback(self, handler: str, code: int) -> None:
        """A shell's order to ignore it, as of a job in the background, holds."""
        script = f"""if True:
            import os, signal, sys
            signal.signal(signal.SIGINT, signal.{handler})
            class Finder:
                def find_spec(self, name, *_):
                    if name == "typer":
                        os.kill(os.getpid(), signal.SIGINT)
            sys.meta_path.insert(0, Finder())
            from skipjack.runtime.commands.entry import main
            sys.argv[1:] = ["--version"]
            main()"""
        done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
        assert (done.returncode, done.stderr) == (code, b"")

    @pytest.mark.parametrize("module", ["torch.torch_version", "numba.core.lowering"])
    def test_ctrl_c_while_pytorch_or_numba_is_imported_raises_nothing_there(self, module: str) -> None:
        """PyTorch's libraries end the process when an exception comes through them, and Python makes others of some."""
        pytest.importorskip(module.partition(".")[0])
        script = f"""if True:
            import os, signal, sys
            signal.signal(signal.SIGINT, signal.default_int_handler)
            class Finder:
                def find_spec(self, name, *_):
                    if name == "{module}":
                        try:
                            os.kill(os.getpid(), signal.SIGINT)
                        except KeyboardInterrupt:
                            sys.stderr.write("raised")
                            raise
            sys.meta_path.insert(0, Finder())
            from skipjack.runtime.commands.entry import main
            sys.argv[1:] = ["doctor"]
            main()"""
        done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
        assert (done.returncode, done.stderr) == (130, b"")

    @pytest.mark.parametrize("arguments", ["['doctor', '--json']", "['doctor']"])
    def test_a_reader_that_left_is_no_error(self, arguments: str) -> None:
        script = f"import sys; from skipjack.runtime.commands.cli import main; sys.argv[1:] = {arguments}; main()"
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run([sys.executable, "-c", script], check=False, stdout=writing, stderr=subprocess.PIPE)
        os.close(writing)
        assert (done.returncode, done.stderr) == (141, b"")

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
    @pytest.mark.parametrize("arguments", ["['--version']", "['doctor', '--json']", "['doctor']"])
    def test_an_output_that_cannot_be_written_is_one_line(self, arguments) -> None:
        script = f"import sys; from skipjack.runtime.commands.cli import main; sys.argv[1:] = {arguments}; main()"
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-c", script], check=False, stdout=full, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (2, b"error: standard output: No space left on device\n")

    def test_a_closed_output_is_one_line(self) -> None:
        script = "import sys; from skipjack.runtime.commands.cli import main; sys.argv[1:] = ['--version']; main()"
        shell = ["sh", "-c", '"$0" -c "$1" >&-', sys.executable, script]
        done = subprocess.run(shell, check=False, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (2, b"error: standard output: it is closed\n")

    @pytest.mark.parametrize(("closed", "arguments"), [("2>&-", "doctor --json"), ("<&-", "generate absent -")])
    def test_other_streams_may_be_closed(self, closed: str, arguments: str) -> None:
        """Nobody sees what an absent standard error is told; an absent standard input is empty."""
        script = (
            f"import sys; from skipjack.runtime.commands.cli import main; sys.argv[1:] = {arguments.split()}; main()"
        )
        done = subprocess.run(
            ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, script], check=False, capture_output=True
        )
        if closed == "2>&-":
            assert (done.returncode, done.stderr) == (0, b"")
            assert json.loads(done.stdout)
        else:
            assert done.returncode == 2
            assert b"error: MODEL: expected a model folder" in done.stderr
            assert b"Traceback" not in done.stderr

    def test_version_and_help(self, capsys) -> None:
        from skipjack import __version__

        assert cli.run(["--version"]) == 0
        assert capsys.readouterr().out == f"skipjack {__version__}\n"
        for arguments in (["--help"], ["-h"], [], ["generate", "--help"]):
            assert cli.run(arguments) == 0
            assert "Usage" in capsys.readouterr().out


class TestAddedCommands:
    def test_are_listed_and_imported_only_when_invoked(self, monkeypatch, capsys) -> None:
        import typer

        added = typer.Typer()
        loaded = []

        @added.command()
        def shout(word: str) -> None:
            typer.echo(word.upper())

        entry = SimpleNamespace(
            name="shout", module="elsewhere", value="elsewhere:app", load=lambda: loaded.append(1) or added
        )
        monkeypatch.setattr(cli, "entry_points", lambda group: [entry] if group == "skipjack.commands" else [])
        assert cli.run(["--help"]) == 0
        assert "elsewhere" in capsys.readouterr().out
        assert loaded == []
        assert cli.run(["shout", "fish"]) == 0
        assert capsys.readouterr().out == "FISH\n"

    def test_that_cannot_be_imported_are_refused(self, monkeypatch, capsys) -> None:
        def load() -> None:
            raise ImportError("no module")

        entry = SimpleNamespace(name="shout", module="elsewhere", value="elsewhere:app", load=load)
        monkeypatch.setattr(cli, "entry_points", lambda group: [entry])
        assert "elsewhere:app" in refusal(capsys, "shout")


class TestChat:
    def test_keeps_the_history_of_a_piped_conversation(self, engine, folder, capsys, monkeypatch) -> None:
        feed(monkeypatch, b"hi\n\nagain\n/reset\nfresh\n/exit\nnever\n")
        assert cli.run(["chat", folder, "--system", "be brief"]) == 0
        system = {"role": "system", "content": "be brief"}
        turns = [[message["content"] for message in prompt] for prompt, _ in engine.made[0].asked]
        assert engine.made[0].asked[0][0][0] == system
        assert turns == [
            ["be brief", "hi"],
            ["be brief", "hi", "one two three", "again"],
            ["be brief", "fresh"],
        ]
        streams = capsys.readouterr()
        assert streams.out == "one two three\n" * 3
        assert streams.err == ""

    def test_a_piped_message_that_cannot_be_answered_is_told_and_the_next_one_read(
        self, engine, folder, capsys, monkeypatch
    ) -> None:
        def stream(self: FakeEngine, prompt: list[dict], params: SamplingParams) -> FakeStream:
            if prompt[-1]["content"] == "too long":
                raise RequestError("prompt: 9001 tokens leave no room")
            return answered(self, prompt, params)

        answered = engine.stream
        monkeypatch.setattr(engine, "stream", stream)
        feed(monkeypatch, b"hi\ntoo long\n\nagain\n")
        assert cli.run(["chat", folder]) == 2
        streams = capsys.readouterr()
        assert streams.out == "one two three\n" * 2
        assert streams.err == "error: message 2: prompt: 9001 tokens leave no room\n"
        assert [message["content"] for message in engine.made[0].asked[-1][0]] == ["hi", "one two three", "again"]

    def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(self, engine, folder, capsys, monkeypatch) -> None:
        engine.interrupt = True
        lines = iter(["hi", "again"])
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True, readline=lambda: next(lines, "")))
        before = signal.getsignal(signal.SIGINT)
        assert cli.run(["chat", folder]) == 0
        assert signal.getsignal(signal.SIGINT) is before
        assert capsys.readouterr().out == "one two\none two\n"
        assert [message["content"] for message in engine.made[0].asked[1][0]] == ["hi", "one two", "again"]

    def test_warms_up_for_conversations_of_any_length(self, engine, folder, capsys, monkeypatch) -> None:
        feed(monkeypatch, b"hi\n")
        assert cli.run(["chat", folder, "--warm-up"]) == 0
        assert engine.made[0].warmed_for == (1, None)
        streams = capsys.readouterr()
        assert streams.out == "one two three\n"
        assert streams.err == "warm-up: 5 kernels compiled, 2 graphs captured, 0.2 s\n"

    def test_needs_a_tokenizer(self, engine, folder, capsys) -> None:
        engine.tokenizer = None
        assert "tokenizer.json" in refusal(capsys, "chat", folder)


class TestDemo:
    def test_shows_both_answers_and_compares(self, engine, capsys) -> None:
        assert cli.run(["demo", "--prompt", "Why?"]) == 0
        out = capsys.readouterr().out
        assert out.count("one two three") == 2
        for word in ("Why?", "identical", "yes", "acceptance rate", "15.5 of 30", "1.00 times"):
            assert word in out
        assert "\x1b" not in out

    def test_a_lossless_method_that_differs_is_a_failure(self, engine, capsys) -> None:
        engine.differ = True
        assert cli.run(["demo"]) == 1
        assert "NOT IDENTICAL" in capsys.readouterr().out

    def test_colours_tell_accepted_from_generated(self, engine, capsys, monkeypatch) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert cli.run(["demo"]) == 0
        out = capsys.readouterr().out
        assert "\x1b[38;5;208m two\x1b[0m" in out
        assert "\x1b[32mone\x1b[0m" in out

    def test_no_color_is_respected(self, engine, capsys, monkeypatch) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", "1")
        assert cli.run(["demo"]) == 0
        assert "\x1b[3" not in capsys.readouterr().out


def test_control_characters_do_not_reach_a_terminal() -> None:
    from skipjack.runtime.commands.terminal import visible

    assert visible("a\x1b[2Jb\r\n\tc\x9b") == "a␛[2Jb␍\n\tc\ufffd"


def test_doctor(capsys) -> None:
    assert cli.run(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert set(findings) == {
        "skipjack", "python", "platform", "packages", "cpu", "gpus", "backend", "cache_share", "demo", "advice",
    }  # fmt: skip
    assert findings["backend"].startswith("torch")
    assert findings["advice"]
    numba = findings["packages"]["numba"] is not None
    assert ("compiled small operations" in findings["backend"]) == numba
    assert any("numba is not installed" in line for line in findings["advice"]) != numba
    assert cli.run(["doctor"]) == 0
    assert findings["python"] in capsys.readouterr().out


def test_doctor_names_the_gpu_and_the_kernels_that_will_use_it(capsys, monkeypatch) -> None:
    import torch

    card = SimpleNamespace(name="H100", total_memory=80 * 2**30, major=9, minor=0)
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(72.5 * 2**30), card.total_memory))
    assert cli.run(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["gpus"] == [{"name": "H100", "memory_gib": 80.0, "free_gib": 72.5, "capability": "9.0"}]
    assert findings["backend"].startswith("triton")
    assert findings["backend"].endswith("on the GPU")
    assert cli.run(["doctor"]) == 0
    assert "H100, 80 GiB, 72.5 GiB free, compute 9.0" in capsys.readouterr().out
