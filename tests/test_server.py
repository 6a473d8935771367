"""`skipjack serve`: answers are those of the engine, in the objects that OpenAI's own client reads."""

from __future__ import annotations

import ast
import contextlib
import http.client
import importlib.util
import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from skipjack import Engine, SamplingParams
from skipjack.runtime.commands import cli
from skipjack.runtime.commands import serve as command
from skipjack.runtime.errors import AbortedError, BusyError, CapacityError, CompilationError, RequestError
from skipjack.runtime.request import Output
from skipjack.runtime.server.answers import Answer
from skipjack.runtime.server.app import CHAT, COMPLETIONS, Service
from skipjack.runtime.server.bodies import ChatBody, CompletionBody

PAGE = (Path(__file__).parents[1] / "docs" / "server.md").read_text(encoding="utf-8")
SERVING = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("serving.py"))))
METHODS = ["lookup", "autoregressive", "unified:speedup=2"]
MESSAGES: Any = [{"role": "system", "content": "the cat"}, {"role": "user", "content": "sat on the mat", "name": "tom"}]
GREEDY: dict[str, Any] = {"temperature": 0.0, "seed": 3}
# A part for every token, also where it adds nothing to the text.
TOLD = GREEDY | {"return_token_ids": True, "ignore_eos": True, "max_tokens": 80}
FIELDS = {"max_tokens": 12, "n": 2, "temperature": 0.9, "top_p": 0.95, "seed": 5, "presence_penalty": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SERVING.model_folder(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.load(folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with SERVING.running(Service(engine, "cat", METHODS, chat_tokens=7)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def web(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as web:
        yield web


def texts(outputs: list[Output]) -> list[tuple[str | None, str, list[int]]]:
    return [(one.text, one.finish_reason, one.token_ids) for output in outputs for one in output.choices]


class TestCompletions:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("prompt", ["the cat", ["the mat", "a"], [5, 6, 7], [[1, 2], [3]]], ids=str)
    def test_are_the_engines(self, client: openai.OpenAI, engine: Engine, prompt: Any, method: str) -> None:
        extra = {"method": method, "return_token_ids": True, "min_p": 0.01, "top_k": 50}
        answer = client.completions.create(model="cat", prompt=prompt, extra_body=extra, **FIELDS)
        params = SamplingParams(**FIELDS, min_p=0.01, top_k=50)
        many = prompt if isinstance(prompt[0], (list, str)) and not isinstance(prompt, str) else [prompt]
        outputs = engine.generate(many, params, method=method)
        assert [choice.index for choice in answer.choices] == list(range(2 * len(many)))
        assert [(c.text, c.finish_reason, c.token_ids) for c in answer.choices] == texts(outputs)
        assert answer.usage.prompt_tokens == sum(len(output.prompt_ids) for output in outputs)
        assert answer.usage.completion_tokens == sum(len(ids) for _, _, ids in texts(outputs))
        assert answer.skipjack["lossless"] == (method != METHODS[2])
        assert answer.skipjack["method"] == method.partition(":")[0]

    def test_streams_add_up_to_the_whole(self, client: openai.OpenAI) -> None:
        asked: Any = {"model": "cat", "prompt": ["the mat", "sat"], "logprobs": 2, **FIELDS}
        extra = {"return_token_ids": True}
        whole = client.completions.create(**asked, extra_body=extra)
        texts, ids, told = Counter(), {n: [] for n in range(4)}, {n: [] for n in range(4)}
        last = None
        for part in client.completions.create(**asked, extra_body=extra, stream=True):
            last = part
            for choice in part.choices:
                texts[choice.index] = (texts[choice.index] or "") + choice.text
                ids[choice.index] += choice.token_ids
                if choice.logprobs:
                    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
                    told[choice.index] += zip(*(getattr(choice.logprobs, name) for name in names), strict=True)
        for choice in whole.choices:
            assert (texts[choice.index], ids[choice.index]) == (choice.text, choice.token_ids)
            names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            assert told[choice.index] == list(zip(*(getattr(choice.logprobs, n) for n in names), strict=True))
        assert last.skipjack == {**whole.skipjack, "rounds": last.skipjack["rounds"]}

    def test_a_part_has_the_logprobs_of_its_tokens(self, client: openai.OpenAI, engine: Engine) -> None:
        extra = {"return_token_ids": True, "ignore_eos": True}
        asked: Any = {"model": "cat", "prompt": "sat on", "max_tokens": 80, "logprobs": 1, "temperature": 0}
        parts = [part.choices[0] for part in client.completions.create(**asked, extra_body=extra, stream=True)]
        counts = [len(part.token_ids) for part in parts]
        assert max(counts) > 1
        assert counts == [len(part.logprobs.token_logprobs) for part in parts]
        output = engine.generate("sat on", SamplingParams(max_tokens=80, logprobs=1, ignore_eos=True))
        told = [value for part in parts for value in part.logprobs.token_logprobs]
        assert told == [entry.logprob for entry in output.choices[0].logprobs]

    def test_an_end_without_text_is_a_part_too(self, client: openai.OpenAI, engine: Engine) -> None:
        silent = min(engine.tokenizer.special_ids)
        asked: Any = {"model": "cat", "logit_bias": {str(silent): 100}, "temperature": 0, "stream": True}
        asked |= {"extra_body": {"stop_token_ids": [silent]}}
        (part,) = client.completions.create(**asked, prompt="a")
        assert (part.choices[0].text, part.choices[0].finish_reason) == ("", "stop")
        assert part.skipjack["lossless"]
        first, last = client.chat.completions.create(**asked, messages=MESSAGES)
        assert (first.choices[0].delta.role, last.choices[0].finish_reason) == ("assistant", "stop")

    def test_default_is_a_draw_of_sixteen_tokens(self, client: openai.OpenAI, engine: Engine) -> None:
        answer = client.completions.create(model="cat", prompt="sat", seed=4, extra_body={"ignore_eos": True})
        expected = engine.generate("sat", SamplingParams(max_tokens=16, temperature=1.0, seed=4, ignore_eos=True))
        assert (answer.choices[0].text, answer.usage.completion_tokens) == (expected.text, 16)

    def test_a_negative_seed_is_one_too(self, client: openai.OpenAI, engine: Engine) -> None:
        answer = client.completions.create(model="cat", prompt="sat", seed=-1)
        expected = engine.generate("sat", SamplingParams(max_tokens=16, temperature=1.0, seed=2**64 - 1))
        assert answer.choices[0].text == expected.text

    def test_a_body_is_json_whatever_it_is_called(self, web: httpx.Client) -> None:
        headers = {"content-type": "application/x-www-form-urlencoded"}
        assert web.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers).status_code == 200

    def test_logprobs_are_the_engines(self, client: openai.OpenAI, engine: Engine) -> None:
        drawn: Any = {"max_tokens": 9, "logprobs": 3, "temperature": 1.0, "seed": 4}
        answer = client.completions.create(model="cat", prompt="sat", extra_body={"ignore_eos": True}, **drawn)
        output = engine.generate("sat", SamplingParams(**drawn, ignore_eos=True))
        told, entries = answer.choices[0].logprobs, output.choices[0].logprobs
        assert told.token_logprobs == [entry.logprob for entry in entries]
        assert [len(top) for top in told.top_logprobs] == [len({**e.top, e.token_id: 0}) for e in entries]
        assert not all(entry.token_id in entry.top for entry in entries)
        assert [max(top.values()) for top in told.top_logprobs] == [max(e.top.values()) for e in entries]
        assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(9)]
        named = [engine.tokenizer.token_text(token) for token in output.token_ids]
        readable = [bool(text) and "\ufffd" not in text for text in named]
        assert set(readable) == {True, False}
        written = zip(named, readable, output.token_ids, strict=True)
        assert told.tokens == [text if is_text else f"token_id:{token}" for text, is_text, token in written]


class TestChats:
    @pytest.mark.parametrize("parts", [False, True])
    def test_are_the_engines(self, client: openai.OpenAI, engine: Engine, parts: bool) -> None:
        cut = [{"type": "text", "text": "sat on"}, {"type": "text", "text": " the mat"}]
        messages: Any = [MESSAGES[0], MESSAGES[1] | {"content": cut}] if parts else MESSAGES
        answer = client.chat.completions.create(model="cat", messages=messages, **GREEDY, n=2)
        output = engine.generate(MESSAGES, SamplingParams(max_tokens=7, seed=3, n=2))
        nameless = engine.generate([MESSAGES[0], {"role": "user", "content": MESSAGES[1]["content"]}])
        assert nameless.prompt_ids != output.prompt_ids
        told = [(choice.message.content, choice.finish_reason) for choice in answer.choices]
        assert told == [(choice.text, choice.finish_reason) for choice in output.choices]
        assert {choice.message.role for choice in answer.choices} == {"assistant"}
        assert answer.usage.total_tokens == len(output.prompt_ids) + output.stats.completion_tokens

    def test_streams_add_up_to_the_whole(self, client: openai.OpenAI) -> None:
        asked: Any = {"model": "cat", "messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **FIELDS}
        whole = client.chat.completions.create(**asked)
        contents, told, ends, roles = Counter(), {0: [], 1: []}, {}, Counter()
        *parts, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        for part in parts:
            for choice in part.choices:
                contents[choice.index] = (contents[choice.index] or "") + (choice.delta.content or "")
                roles[choice.index] += choice.delta.role is not None
                told[choice.index] += choice.logprobs.content if choice.logprobs else []
                ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
        for choice in whole.choices:
            expected = choice.message.content, choice.finish_reason, choice.logprobs.content
            assert (contents[choice.index], ends[choice.index], told[choice.index]) == expected
        assert roles == {0: 1, 1: 1}
        assert (last.choices, last.usage) == ([], whole.usage)
        assert {part.id for part in [*parts, last]} == {last.id}

    def test_bytes_of_tokens_are_those_of_the_text(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model="cat", messages=MESSAGES, logprobs=True, max_completion_tokens=20, extra_body={"ignore_eos": True}
        )
        told = answer.choices[0].logprobs.content
        # What is no whole character has no bytes.
        assert [one.bytes is None for one in told] == [one.token.startswith("token_id:") for one in told]
        assert len(told) == 20
        whole = [one for one in told if one.bytes is not None]
        assert whole
        assert [bytes(one.bytes).decode() for one in whole] == [one.token for one in whole]

    def test_what_was_answered_may_be_said_again(self, client: openai.OpenAI) -> None:
        first = client.chat.completions.create(model="cat", messages=MESSAGES, **GREEDY)
        for said in (first.choices[0].message, first.choices[0].message.model_dump()):
            messages = [*MESSAGES, said, {"role": "user", "content": "sat"}]
            assert client.chat.completions.create(model="cat", messages=messages).choices

    def test_what_asks_for_plain_text_is_no_mistake(self, client: openai.OpenAI) -> None:
        plain: Any = {
            "modalities": ["text"],
            "response_format": {"type": "text"},
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "prompt_cache_key": "a",
            "safety_identifier": "b",
            "metadata": {"a": "b"},
            "extra_body": {"reasoning_effort": None, "guided_json": None},
        }
        asked: Any = {"model": "cat", "messages": MESSAGES} | GREEDY
        answers = [client.chat.completions.create(**asked, **more).choices[0].message for more in ({}, plain)]
        assert answers[0] == answers[1]
        assert client.completions.create(model="cat", prompt="a", best_of=2, n=2, suffix=None).choices

    def test_without_a_limit_it_has_the_servers(self, client: openai.OpenAI) -> None:
        extra = {"ignore_eos": True}
        answer = client.chat.completions.create(model="cat", messages=MESSAGES, extra_body=extra)
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (7, "length")


EVERY: dict[str, Any] = {
    "max_tokens": 9,
    "min_tokens": 2,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 3,
    "stop": ["x"],
    "stop_token_ids": [4],
    "ignore_eos": True,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.2,
    "logit_bias": {"7": 2.5},
    "logprobs": 2,
    "n": 2,
}


def test_every_sampling_parameter_is_the_engines() -> None:
    assert set(EVERY) == {field.name for field in fields(SamplingParams)}
    expected = SamplingParams(**EVERY | {"logit_bias": {7: 2.5}})
    assert CompletionBody.model_validate(EVERY | {"prompt": "a"}).params() == expected
    likely = {"logprobs": True, "top_logprobs": 2}
    assert ChatBody.model_validate(EVERY | likely | {"messages": MESSAGES}).params(5) == expected


REFUSED: list[tuple[str, dict[str, Any], str | None, str]] = [
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens", "expected an integer of at least 1, got 0"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": "3"}, "max_tokens", "valid integer"),
    (COMPLETIONS, {"prompt": "a", "temperature": True}, "temperature", "valid number"),
    (COMPLETIONS, {"prompt": "a", "tools": []}, "tools", "not known here"),
    (COMPLETIONS, {"prompt": "a", "echo": True}, "echo", "False"),
    (COMPLETIONS, {"prompt": "a", "best_of": 2}, "best_of", "expected n, 1, got 2"),
    (COMPLETIONS, {"prompt": "a", "stop": [1]}, "stop[0]", "valid string"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"1": "x"}}, "logit_bias[1]", "expected a number"),
    (COMPLETIONS, {}, "prompt", "required"),
    (COMPLETIONS, {"prompt": []}, "prompt", "at least one"),
    (COMPLETIONS, {"prompt": [{"role": "user", "content": "a"}]}, "prompt[0]", "text or token ids"),
    (COMPLETIONS, {"prompt": [[1], [True]]}, "prompt[1]", "text or token ids"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt", "at least one token"),
    (COMPLETIONS, {"prompt": [400]}, "prompt", "outside the vocabulary of 400"),
    (COMPLETIONS, {"prompt": ["a"] * 200, "n": 2}, "prompt", "at most 256 choices"),
    (COMPLETIONS, {"prompt": "the cat " * 60}, "prompt", "no room in the model's context"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"a": 1}}, "logit_bias", "expected token ids, got 'a'"),
    (COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "without stream"),
    (COMPLETIONS, {"prompt": "a", "method": "swift"}, "method", "expected one of lookup, autoregressive, unified"),
    (CHAT, {"messages": []}, "messages", "at least one"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type",
        "'text'",
    ),
    (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools", "at most 0"),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
    (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", "without logprobs"),
    (CHAT, {"messages": MESSAGES, "max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "to equal"),
]


class TestRefusals:
    @pytest.mark.parametrize(("path", "body", "param", "message"), REFUSED, ids=lambda value: str(value)[:40])
    def test_name_the_field(
        self, web: httpx.Client, path: str, body: dict[str, Any], param: str | None, message: str
    ) -> None:
        response = web.post(path, json=body)
        error = response.json()["error"]
        assert (response.status_code, error["type"]) == (400, "invalid_request_error")
        assert message in error["message"]
        assert param == error["param"]

    def test_a_model_that_is_not_served(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match="expected cat, got 'gpt'") as refused:
            client.completions.create(model="gpt", prompt="a")
        assert refused.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError, match="expected cat, got 'gpt/2'"):
            client.models.retrieve("gpt/2")

    def test_no_client_names_a_file(self, web: httpx.Client, tmp_path: Path) -> None:
        body = {"prompt": "a", "method": f"swift:set={tmp_path / 'set.json'}"}
        assert "expected one of lookup" in web.post(COMPLETIONS, json=body).json()["error"]["message"]

    def test_what_is_no_json(self, web: httpx.Client) -> None:
        for content in (b"", b'{"prompt', b"\xff", b"[" * 100_000, b"9" * 9999, b"null"):
            response = web.post(COMPLETIONS, content=content)
            assert response.status_code == 400, content[:9]
            assert response.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("start", "item", "end"),
        [
            ('{"prompt": "a", "stop_token_ids": [', '"a"', "]}"),
            ('{"prompt": "a", "stop": [', "1", "]}"),
            ('{"prompt": "a", "logit_bias": {', '"%d": "a"', "}}"),
            ('{"prompt": "a", ', '"k%d": 1', "}"),
            ('{"messages": [', "{}", "]}"),
            ('{"messages": [', '{"role": "", "content": ""}', "]}"),
            ('{"messages": [{"role": "user", "content": [', '{"type": "text"}', "]}]}"),
        ],
    )
    def test_of_a_million_mistakes_one_is_looked_at(self, web: httpx.Client, start: str, item: str, end: str) -> None:
        count = 2**20 // len(item)
        items = (item % number if "%" in item else item for number in range(count))
        tracemalloc.start()
        response = web.post(CHAT if "messages" in start else COMPLETIONS, content=start + ", ".join(items) + end)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert response.status_code == 400
        assert len(response.json()["error"]["message"]) <= 1000
        # A dictionary for each would be hundreds of megabytes.
        assert peak < 80 * 2**20

    def test_what_the_template_refuses_names_no_folder(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path / "other: one")
        settings = {"bos_token": "<s>", "chat_template": "{{ raise_exception('no such role') }}"}
        (tmp_path / "other: one" / "tokenizer_config.json").write_text(json.dumps(settings))
        with (
            Engine.load(tmp_path / "other: one") as engine,
            SERVING.running(Service(engine, "cat", METHODS)) as address,
        ):
            response = httpx.post(f"{address}{CHAT}", json={"messages": MESSAGES})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, None)
        assert error["message"].startswith("tokenizer_config.json: chat template: ")
        assert "no such role" in error["message"]

    def test_a_message_is_short(self, web: httpx.Client) -> None:
        response = web.post(COMPLETIONS, json={"prompt": "a", "stop": ["a" * 1000] * 65})
        assert response.json()["error"]["message"].startswith("stop: expected at most 64 non-empty strings, got ('aaa")
        assert len(response.json()["error"]["message"]) == 1000

    def test_a_body_that_is_too_long(self, address: str) -> None:
        def parts() -> Iterator[bytes]:
            for _ in range(10):
                yield b" " * 2**19

        content: Any
        for content in (b" " * (2**22 + 1), parts()):
            # The rest is not read: the client sees the answer or a closed connection.
            with contextlib.suppress(httpx.WriteError):
                assert httpx.post(f"{address}{COMPLETIONS}", content=content, timeout=60).status_code == 413
        assert httpx.post(f"{address}{COMPLETIONS}", json={"prompt": "a"}).status_code == 200

    def test_an_address_that_there_is_not(self, web: httpx.Client) -> None:
        assert (web.get("/v2").status_code, web.get(CHAT).status_code) == (404, 405)
        assert web.get("/v2").json()["error"]["message"] == "GET /v2: Not Found"

    def test_bodies_with_mistakes_of_every_kind(self, web: httpx.Client, engine: Engine) -> None:
        statuses = SERVING.hostile(web, 1, 120)
        assert statuses[200] > 10
        assert statuses[400] > 50
        SERVING.settled(engine)


class TestLoad:
    def test_more_than_it_takes_is_told_to_come_again(self, engine: Engine) -> None:
        with SERVING.running(Service(engine, "cat", METHODS, most=3)) as address:
            statuses, _ = SERVING.crowd(address, 3)
        assert statuses[429] > 0
        assert statuses[200] >= 3

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_leaves_ends_its_request(
        self, engine: Engine, address: str, stream: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before, (reached, going) = engine.metrics().requests_aborted, held(engine, monkeypatch, after=int(stream))
        body = {
            "prompt": "the cat",
            "max_tokens": 80,
            "ignore_eos": True,
            "stream": stream,
            "method": METHODS[1],
        } | GREEDY
        connection = http.client.HTTPConnection(address.removeprefix("http://"))
        connection.request("POST", COMPLETIONS, json.dumps(body))
        response = connection.getresponse() if stream else None
        assert response is None or response.readline()
        assert reached.wait(30)
        for one in filter(None, (response, connection)):
            one.close()
        going.set()
        SERVING.settled(engine)
        assert engine.metrics().requests_aborted == before + 1

    def test_a_client_that_leaves_before_its_body_is_there_asks_for_nothing(self, engine: Engine) -> None:
        def asked() -> int:
            metrics = engine.metrics()
            return metrics.requests_finished + metrics.requests_aborted

        with SERVING.running(Service(engine, "cat", METHODS, most=1)) as address:
            host, port = address.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as client:
                client.send(b'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{"prompt": "a"}')
                until = time.monotonic() + 20
                while httpx.post(f"{address}{COMPLETIONS}", json={"prompt": "a"}).status_code != 429:
                    assert time.monotonic() < until, "two are under way where one may be"
                SERVING.settled(engine)
                before = asked()
            while 'status="499"} 1.0' not in (told := httpx.get(f"{address}/metrics").text):
                assert time.monotonic() < until, told
            assert asked() == before
            assert httpx.post(f"{address}{COMPLETIONS}", json={"prompt": "a"}).status_code == 200

    def test_others_are_answered_while_many_logprobs_are_written(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        writing, going, whole = threading.Event(), threading.Event(), Answer.whole

        def slow(*given: Any) -> Any:
            writing.set()
            assert going.wait(30)
            return whole(*given)

        monkeypatch.setattr(Answer, "whole", slow)
        with SERVING.running(Service(engine, "cat", METHODS)) as address, ThreadPoolExecutor(1) as pool:
            asked = pool.submit(httpx.post, f"{address}{COMPLETIONS}", json={"prompt": "a", "logprobs": 5}, timeout=60)
            assert writing.wait(30)
            assert httpx.get(f"{address}/health", timeout=20).status_code == 200
            going.set()
            assert asked.result().status_code == 200

    def test_an_error_after_the_first_token_is_the_last_event(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = Engine.load(folder)
        reached, going = held(engine, monkeypatch, after=1)
        closing = threading.Thread(target=engine.close)
        with SERVING.running(Service(engine, "cat", METHODS[1:])) as address, httpx.Client(base_url=address) as web:
            body = {"prompt": "a", "stream": True} | TOLD
            with web.stream("POST", COMPLETIONS, json=body) as response:
                lines = response.iter_lines()
                assert "choices" in json.loads(next(lines).removeprefix("data: "))
                assert reached.wait(30)
                closing.start()
                while len(engine._turn._line) < 2:
                    time.sleep(0.001)
                going.set()
                *_, last = (line for line in lines if line)
            assert json.loads(last.removeprefix("data: ")) == {
                "error": {"message": "engine: it is closed", "type": "server_error", "param": None, "code": None}
            }
            closing.join()
            # Before the first one it is a status.
            response = web.post(COMPLETIONS, json=body)
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert web.get("/health").status_code == 503

    def test_a_fault_of_the_program_after_the_first_token_is_the_last_event(
        self, engine: Engine, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, times = engine._loaded()[0], count()
        head = model.ops.head

        def failing(*given: Any, **named: Any) -> Any:
            if next(times):
                raise ZeroDivisionError("of a round")
            return head(*given, **named)

        monkeypatch.setattr(model, "ops", replace(model.ops, head=failing))
        parts = client.completions.create(model="cat", prompt="a", stream=True, extra_body=TOLD)
        assert next(parts).choices[0].token_ids
        with pytest.raises(openai.APIError, match="ZeroDivisionError: of a round"):
            list(parts)
        SERVING.settled(engine)

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (RequestError("field: wrong"), 400),
            (CapacityError("cache: too small"), 413),
            (CompilationError("kernel: new"), 500),
            (BusyError("cache: held"), 503),
            (AbortedError("engine: it is closed"), 503),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_whose_fault_it_is(
        self, engine: Engine, web: httpx.Client, error: Exception, status: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(engine, "_asked", fail)
        for stream in (False, True):
            response = web.post(COMPLETIONS, json={"prompt": "a", "stream": stream})
            assert (response.status_code, response.headers.get("retry-after")) == (
                status,
                "1" if status == 503 else None,
            )
            assert response.json()["error"] == {
                "message": str(error),
                "type": "invalid_request_error" if status < 500 else "server_error",
                "param": "field" if status == 400 else None,
                "code": None,
            }

    def test_lost_pages_are_no_good_health(
        self, engine: Engine, web: httpx.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        leaking = replace(engine.metrics(), pages_leaked=2)
        monkeypatch.setattr(engine, "metrics", lambda: leaking)
        response = web.get("/health")
        assert (response.status_code, response.json()["error"]["message"]) == (500, "2 pages of the KV cache are lost")

    def test_a_fault_of_the_program_is_told_as_one(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise MemoryError("there is none")

        with SERVING.running(Service(engine, "cat", METHODS)) as address:
            monkeypatch.setattr(engine, "_asked", fail)
            response = httpx.post(f"{address}{COMPLETIONS}", json={"prompt": "a"})
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
        assert response.json()["error"]["message"] == "MemoryError: there is none"


def held(engine: Engine, monkeypatch: pytest.MonkeyPatch, *, after: int) -> tuple[threading.Event, threading.Event]:
    """Tokens are chosen `after` times, then not before the second event is set; the first tells that it is due."""
    reached, going, times = threading.Event(), threading.Event(), count()
    model = engine._loaded()[0]
    head = model.ops.head

    def patient(*given: Any, **named: Any) -> Any:
        if next(times) >= after:
            reached.set()
            assert going.wait(30)
        return head(*given, **named)

    monkeypatch.setattr(model, "ops", replace(model.ops, head=patient))
    return reached, going


class TestAround:
    def test_models(self, client: openai.OpenAI) -> None:
        (model,) = client.models.list().data
        assert (model.id, model.methods, model.max_model_len) == ("cat", METHODS, SERVING.CONTEXT)
        assert client.models.retrieve("cat") == model

    def test_a_key(self, engine: Engine) -> None:
        with SERVING.running(Service(engine, "cat", METHODS, key="sesame")) as address:
            for key in ("", "Sesame", "sesame2"):
                with pytest.raises(openai.AuthenticationError, match="expected Bearer"):
                    openai.OpenAI(base_url=f"{address}/v1", api_key=key or "x", max_retries=0).models.list()
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="sesame")
            assert client.completions.create(model="cat", prompt="a").choices
            assert httpx.get(f"{address}/health").json() == {"status": "ok"}

    def test_mounted_it_asks_for_the_key_and_counts_too(self, engine: Engine) -> None:
        outer = FastAPI()
        outer.mount("/llm", Service(engine, "cat", METHODS, key="sesame").app())
        with SERVING.running(SimpleNamespace(app=lambda: outer)) as address:
            base = f"{address}/llm/v1"
            with pytest.raises(openai.AuthenticationError, match="expected Bearer"):
                openai.OpenAI(base_url=base, api_key="x", max_retries=0).models.list()
            client = openai.OpenAI(base_url=base, api_key="sesame", max_retries=0)
            assert client.completions.create(model="cat", prompt="a").choices
            assert 'path="/v1/completions",status="200"} 1.0' in httpx.get(f"{address}/llm/metrics").text

    def test_metrics_are_the_engines_and_the_clients(self, engine: Engine) -> None:
        with SERVING.running(Service(engine, "cat", METHODS)) as address:
            for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}, {"prompt": 3}):
                httpx.post(f"{address}{COMPLETIONS}", json=body, timeout=60)
            httpx.get(f"{address}/nothing")
            SERVING.settled(engine)
            families = text_string_to_metric_families(httpx.get(f"{address}/metrics").text)
            samples = {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}
        metrics = engine.metrics()
        for name, value in metrics.counters.items():
            assert samples[f"skipjack_{name}_total",] == value
        for name, value in metrics.gauges.items():
            assert samples[f"skipjack_{name}",] == value
        assert samples["skipjack_http_requests_total", COMPLETIONS, "200"] == 2
        assert samples["skipjack_http_requests_total", COMPLETIONS, "400"] == 1
        assert samples["skipjack_first_token_seconds_count",] == 2
        assert not any("/nothing" in name for name in samples)

    def test_without_a_tokenizer_prompts_and_answers_are_ids(self, synthetic: Callable[..., Engine]) -> None:
        engine = synthetic("tiny-llama")
        with SERVING.running(Service(engine, "ids", ["autoregressive"])) as address:
            body = {"prompt": [1, 2], "max_tokens": 4, "temperature": 0, "logprobs": 1}
            (choice,) = httpx.post(f"{address}{COMPLETIONS}", json=body).json()["choices"]
            refused = httpx.post(f"{address}{COMPLETIONS}", json={"prompt": "a"})
        expected = engine.generate([1, 2], SamplingParams(max_tokens=4)).token_ids
        assert (choice["text"], choice["token_ids"]) == ("", expected)
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in expected]
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")


class TestPage:
    def test_names_every_field_and_address(self, address: str) -> None:
        rows = re.findall(r"^\| ([^|]*`[^|]*) \| (completions|chat|both) \|", PAGE, re.MULTILINE)
        told = {of: {name for cell, kind in rows if kind in (of, "both") for name in re.findall(r"`(\w+)`", cell)}
                for of in ("completions", "chat")}  # fmt: skip
        assert told == {"completions": set(CompletionBody.model_fields), "chat": set(ChatBody.model_fields)}
        paths = set(httpx.get(f"{address}/openapi.json").json()["paths"])
        assert paths == set(re.findall(r"`(?:GET|POST) (/\S+)`", PAGE)) - {"/docs"} | {"/v1/models/{name}"}

    def test_examples_run(self, engine: Engine, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        client, own = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
        with SERVING.running(Service(engine, "demo", ["lookup", "autoregressive"], chat_tokens=5)) as address:
            exec(client.replace("http://127.0.0.1:8000", address), {})
        exec(own.replace('Engine.load("demo")', f"Engine.load({str(folder)!r})"), {})
        *_, answered, routes = capsys.readouterr().out.splitlines()
        assert answered.endswith(" True")
        assert {COMPLETIONS, CHAT, "/v1/models"} < set(ast.literal_eval(routes))


class TestCommand:
    def test_a_signal_lets_answers_end(self, folder: Path) -> None:
        assert SERVING.drain(folder, random.Random(0))["whole"]

    def test_mistakes_are_told_before_the_model_is_loaded(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("skipjack.runtime.engine.load_weights", None)
        with command._bound("127.0.0.1", 0) as taken:
            taken.listen()
            port = str(taken.getsockname()[1])
            for line, message in (
                (("--port", port), f"--port: cannot listen at 127.0.0.1, port {port}"),
                (("--port", "0", "--host", "no.such.host.invalid"), "--host: cannot find no.such.host.invalid"),
                (("--port", "0", "--host", "no..such"), "--host: cannot find no..such"),
                (("--port", "0", "--method", "swfit"), "unknown method 'swfit'"),
                (("--port", "0", "--method", "lookup", "--method", "dmtd"), "dmtd"),
                (("--port", "0", "--max-sequences", "65"), "max_sequences"),
            ):
                assert cli.run(["serve", str(folder), *line]) == 2
                streams = capsys.readouterr()
                assert message in streams.err
                assert (streams.err.count("\n"), streams.out) == (1, "")

    @pytest.mark.parametrize("key", ["", " ", "a b", "se\u00e9same", "\udcff", "sesame\n"])
    def test_a_key_that_no_client_can_show(
        self, key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SKIPJACK_API_KEY", key)
        assert cli.run(["serve", "/no/such/model", "--port", "0"]) == 2
        assert "SKIPJACK_API_KEY: expected a key of visible ASCII characters" in capsys.readouterr().err

    def test_a_port_that_was_taken_while_the_model_was_loaded(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bound, others = command._bound, []

        def bind(host: str, port: int) -> socket.socket:
            listener = bound(host, port)
            others.append(bound(*listener.getsockname()))
            others[0].listen()
            return listener

        monkeypatch.setattr(command, "_bound", bind)
        try:
            assert cli.run(["serve", str(folder), "--port", "0", "--no-warm-up"]) == 2
            port = others[0].getsockname()[1]
            assert f"--port: cannot listen at 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err
        finally:
            others[0].close()

    def test_a_signal_before_the_server_runs_ends_it(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = uvicorn.Server.run

        def late(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            run(server, sockets)

        monkeypatch.setattr(uvicorn.Server, "run", late)
        before = signal.getsignal(signal.SIGTERM)
        try:
            assert cli.run(["serve", str(folder), "--port", "0", "--no-warm-up"]) == 0
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_those_that_take_too_long_are_told(self, folder: Path) -> None:
        with SERVING.started(folder, "--drain", "0") as (process, address), ThreadPoolExecutor(2) as pool:
            body = {"prompt": "a", "max_tokens": 90, "ignore_eos": True, "n": 256}
            whole = pool.submit(httpx.post, f"{address}{COMPLETIONS}", json=body, timeout=60)
            with httpx.stream("POST", f"{address}{COMPLETIONS}", json=body | {"stream": True}, timeout=60) as parts:
                lines = parts.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                with pytest.raises(httpx.RemoteProtocolError):
                    list(lines)
            assert (whole.result().status_code, whole.result().headers["retry-after"]) == (503, "1")
            told = process.communicate(timeout=60)[1]
        assert process.returncode == 0
        assert "Traceback" not in told

    def test_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        found = importlib.util.find_spec
        monkeypatch.setattr(command, "find_spec", lambda name: None if name == "uvicorn" else found(name))
        assert cli.run(["serve", "demo"]) == 2
        assert "uvicorn not installed: pip install 'skipjack[serve]'" in capsys.readouterr().err
