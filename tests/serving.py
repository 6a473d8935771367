"""Servers over a small random model, and what they must survive, at any scale:

    python tests/serving.py --bodies 10000 --crowds 20 --drains 50 [--seed 7]

Bodies are valid ones with mistakes of every kind: no answer may be an error of the server's own. A crowd is four times
as many requests as the server takes: those it refuses get 429 and a time. A drain is a SIGTERM in the middle of
requests: those that have begun end, and the process with exit code 0.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from skipjack import Engine
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.save import save_checkpoint
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.loaders.weights import checkpoint_tensors
from skipjack.runtime.server.app import CHAT, COMPLETIONS, Service

FILES = runpy.run_path(str(Path(__file__).with_name("fuzz_files.py")))
CONTEXT = 96
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.name }}: {{ m.content }}\n{% endfor %}assistant: "
ENTRY = "from skipjack.runtime.commands.entry import main; main()"
SERVING = re.compile(r"at (http://\S+)/v1")


def model_folder(root: Path) -> Path:
    """A folder with a model of a few thousand weights, a tokenizer and a template."""
    fields = synthetic_config("tiny-llama") | {"vocab_size": 400, "max_position_embeddings": CONTEXT}
    config = ModelConfig.parse(fields, "config.json")
    folder = root / "model"
    save_checkpoint(folder, fields, checkpoint_tensors(synthetic_weights(config, 0, torch.float32), config))
    (folder / "tokenizer.json").write_bytes(FILES["_tokenizer"]())
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@contextmanager
def running(service: Service) -> Iterator[str]:
    """The service behind a port of this machine, in a thread; its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(service.app(), log_config=None, lifespan="off", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def settled(engine: Engine) -> None:
    """Wait until nothing is under way; what it had is back."""
    until = time.monotonic() + 20
    while (metrics := engine.metrics()).requests_running:
        assert time.monotonic() < until, metrics
        time.sleep(0.005)
    assert (metrics.pages_held, metrics.pages_leaked) == (0, 0)


def bodies(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """An address and a body that is in order."""
    common: dict[str, Any] = {
        "temperature": rng.choice((0, 0.8)),
        "max_tokens": rng.randint(1, 6),
        "n": rng.choice((1, 2)),
        "seed": rng.randint(-9, 9),
        "stop": rng.choice((None, "a", ["b", "cd"])),
        "logit_bias": {"7": 3},
        "presence_penalty": rng.choice((0, 0.5)),
        "stream": rng.random() < 0.3,
        "top_p": 0.9,
        "user": "someone",
    }
    if rng.random() < 0.5:
        parts = [{"type": "text", "text": "sat"}, {"type": "text", "text": " on"}]
        messages = [{"role": "system", "content": "the cat"}, {"role": "user", "content": rng.choice(("mat", parts))}]
        likely: dict[str, Any] = {"logprobs": True, "top_logprobs": 2} if rng.random() < 0.3 else {}
        return CHAT, common | {"messages": messages} | likely
    prompt = rng.choice(("the cat", [5, 6, 7], ["the", "mat"], [[1, 2], [3]]))
    return COMPLETIONS, common | {"prompt": prompt, "logprobs": rng.choice((None, 0, 2)), "return_token_ids": True}


def hostile(client: httpx.Client, seed: int, examples: int) -> Counter[int]:
    """Send bodies with mistakes, and check that every answer is one."""
    statuses: Counter[int] = Counter()
    for number in range(examples):
        rng = random.Random(f"bodies {seed} {number}")
        path, body = bodies(rng)
        content = json.dumps(body).encode()
        content = FILES["mutated"](content, rng) if rng.random() < 0.9 else content
        where = f"--seed {seed}, body {number}: {content[:400]!r}"
        response = client.post(path, content=content)
        statuses[response.status_code] += 1
        assert response.status_code in (200, 400, 404, 413), f"{where}: {response.status_code} {response.text[:300]}"
        if response.headers["content-type"].startswith("text/event-stream"):
            assert response.text.endswith("data: [DONE]\n\n"), f"{where}: {response.text[-300:]}"
        elif response.status_code == 200:
            assert response.json()["choices"], where
        else:
            assert response.json()["error"]["message"], where
    return statuses


def crowd(address: str, most: int) -> tuple[Counter[int], float]:
    """Four times as many requests as there may be; statuses, and how long the next waits for its first answer."""

    def ask(number: int) -> int:
        body = {"prompt": [number % 300 + 2, 5], "max_tokens": 80, "ignore_eos": True, "stream": number % 2 == 0}
        response = httpx.post(f"{address}{COMPLETIONS}", json=body, timeout=120)
        assert response.status_code in (200, 429), response.text
        assert response.status_code == 200 or int(response.headers["retry-after"]) >= 1
        return response.status_code

    with ThreadPoolExecutor(4 * most) as pool:
        statuses = Counter(pool.map(ask, range(4 * most)))
    start = time.monotonic()
    assert httpx.post(f"{address}{COMPLETIONS}", json={"prompt": [3], "max_tokens": 1}).status_code == 200
    return statuses, time.monotonic() - start


@contextmanager
def started(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command as a process, and its address."""
    command = [sys.executable, "-c", ENTRY, "serve", str(folder), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = ""
        try:
            while (found := SERVING.search(told)) is None:
                line = process.stderr.readline()
                assert line, f"exit code {process.wait()}: {told}"
                told += line
            yield process, found[1]
        finally:
            process.kill()


def drain(folder: Path, rng: random.Random) -> Counter[str]:
    """Stop a server while it answers; what its clients saw."""
    with started(folder) as (process, address):
        return _drained(process, address, rng)


def _drained(process: subprocess.Popen[str], address: str, rng: random.Random) -> Counter[str]:
    seen: Counter[str] = Counter()
    began = threading.Event()

    def ask(number: int) -> None:
        body = {"prompt": [number + 2], "max_tokens": 60, "ignore_eos": True, "stream": number % 2 == 0}
        try:
            with httpx.stream("POST", f"{address}{COMPLETIONS}", json=body, timeout=60) as response:
                text = ""
                for part in response.iter_text():
                    began.set()
                    text += part
        except httpx.ConnectError:
            seen["refused"] += 1
            return
        whole = text.endswith("data: [DONE]\n\n") if number % 2 == 0 else len(json.loads(text)["choices"]) == 1
        seen["whole" if whole and response.status_code == 200 else f"broken: {text[-200:]}"] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    began.wait(30)
    time.sleep(rng.random() * 0.1)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 0, rest
    assert set(seen) <= {"whole", "refused"}, seen
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("bodies", 1000), ("crowds", 2), ("drains", 2), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = model_folder(Path(root))
        with Engine.load(folder) as engine:
            with running(Service(engine, "m", ["autoregressive", "lookup"], 8)) as address:
                with httpx.Client(base_url=address, timeout=60) as client:
                    print("bodies", dict(hostile(client, given.seed, given.bodies)))
                settled(engine)
            with running(Service(engine, "m", ["autoregressive"], 8, most=16)) as address:
                for _ in range(given.crowds):
                    statuses, seconds = crowd(address, 16)
                    print("crowd", dict(statuses), f"the next after {seconds:.3f} s")
                settled(engine)
        rng = random.Random(given.seed)
        seen = sum((drain(folder, rng) for _ in range(given.drains)), Counter())
        print("drains", dict(seen))


if __name__ == "__main__":
    main()
