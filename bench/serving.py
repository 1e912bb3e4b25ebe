"""What stands around the engine when it serves: what the front adds, many streams at once, and how soon an engine is back.

    python -m bench.serving [--only restart,streams,ttft,share] [--shape qwen2.5-0.5b] [--json]

restart   time from `kill -9` of the engine under 8 streams to the next token of any of them, and of all
streams   200 streams at once on the bundled model: how many of them end without an error, and with all their tokens
ttft      time to the first token at idle, over HTTP and of the same engine in this process, in turns
share     tokens per second of 64 streams, over HTTP and of the same engine in this process, in turns; on a grown model

All of it takes some five minutes.  Each figure is held to its limit (LIMITS); exit status 1 where one is missed.  Writes
bench/results/serving.json; with `--only` the other figures stay as they were.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench import limits
from bench.contender import ROOT
from bench.harness import RESULTS, bundled, grown, machine, write
from weft.front.port import EnginePort
from weft.soak.client import Answer, ask
from weft.types import Add, EngineFrame, Finished, RequestSpec, SamplingSpec, TokenItem, Tokens

READY = re.compile(rb"weft ready http://[\w.]+:(\d+)\n")
KILLS, KILLED_STREAMS = 7, 8
STREAMS, STREAM_TOKENS = 200, 48
TURNS = 60
SHARED, SHARED_TOKENS, ROUNDS = 64, 48, 5
LIMITS: dict[str, dict[str, tuple[str, float]]] = {
    "restart": {"worst_s": ("at most", 5.0)},
    "streams": {"errors": ("at most", 0), "whole": ("at least", STREAMS)},
    "ttft": {"added_s": ("at most", 0.003)},
    "share": {"ratio": ("at least", 0.9)},
}
"""What is promised of each figure, on two cores."""
WORDS = "sea ship wind stone light road winter house river bread song door".split()


@contextlib.contextmanager
def served(folder: Path, *flags: str) -> Iterator[int]:
    """The port of a real `weft serve`."""
    with tempfile.TemporaryDirectory(prefix="weft-serving-") as home:
        out = Path(home) / "stdout"
        command = [
            sys.executable,
            "-m",
            "weft",
            "serve",
            str(folder),
            "--port",
            "0",
            "--data-dir",
            f"{home}/store",
            *flags,
        ]
        with out.open("wb") as stdout, (Path(home) / "stderr").open("wb") as stderr:
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr, cwd=ROOT)
        try:
            while (found := READY.search(out.read_bytes())) is None:
                if process.poll() is not None:
                    raise SystemExit((Path(home) / "stderr").read_text()[-2000:])
                time.sleep(0.05)
            yield int(found[1])
        finally:
            process.terminate()
            process.wait(60)


@contextlib.contextmanager
def engine(folder: Path, options: dict[str, Any]) -> Iterator[EnginePort]:
    """The same engine on a thread of this process, with no front."""
    from weft.exec.build import build, engine_config, prepare
    from weft.exec.thread import EngineThread
    from weft.llm import engine_info

    setup = prepare(engine_config(folder, options))
    runtime = build(setup)
    port = EngineThread(runtime.engine, runtime.executor, engine_info(setup, "bench"))
    try:
        yield port
    finally:
        port.close()


class Driver:
    """Requests straight to an engine.  prompts: token ids; every answer has `new` tokens."""

    def __init__(self, port: EnginePort) -> None:
        self._port, self._ids = port, 0
        self._left: set[int] = set()
        self._first: list[float] = []
        self._changed = threading.Condition()
        port.subscribe(self._hear)

    def _hear(self, frame: EngineFrame) -> None:
        with self._changed:
            for event in frame.events:
                if isinstance(event, Tokens) and not self._first:
                    self._first.append(time.perf_counter())
                if isinstance(event, Finished):
                    self._left.discard(event.id)
            self._changed.notify_all()

    def run(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[float, float]:
        """(seconds to the first token, seconds in all)."""
        specs = []
        for prompt in prompts:
            self._ids += 1
            law = SamplingSpec(max_tokens=new, temperature=0.0)
            specs.append(RequestSpec(id=self._ids, items=(TokenItem(tuple(prompt)),), seed=0, sampling=law))
        self._left, self._first = {spec.id for spec in specs}, []
        began = time.perf_counter()
        for spec in specs:
            self._port.send(Add(spec))
        with self._changed:
            self._changed.wait_for(lambda: not self._left)
        return self._first[0] - began, time.perf_counter() - began


def text(turn: int, words: int = 24) -> str:
    """A prompt that shares no beginning with another turn's."""
    return f"{turn} " + " ".join(WORDS[(turn * 7 + i * (1 + turn % 5)) % len(WORDS)] for i in range(words))


def body(prompt: str, new: int, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": new, "temperature": 0.0, "ignore_eos": True, "stream": True, **more}


def first_token(connection: http.client.HTTPConnection, prompt: str, new: int) -> float:
    """Seconds from a request to the first token of its stream; the rest is read, too."""
    data = json.dumps(body(prompt, new))
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    answer.readline()
    took = time.perf_counter() - began
    answer.read()
    return took


def restart() -> dict[str, Any]:
    """`any_s`, `all_s`: by kill, until the next token of one stream, and of every one that is not over by then."""
    found: dict[str, list[float]] = {"any_s": [], "all_s": []}

    async def one(port: int) -> None:
        seen, over, rounds = [0] * KILLED_STREAMS, [False] * KILLED_STREAMS, iter(range(KILLS))

        class Counted(Answer):
            at = 0

            def take(self, chunk: dict[str, Any]) -> None:
                seen[self.at] += 1
                super().take(chunk)

        async def stream(i: int) -> None:
            answer = Counted()
            answer.at = i
            await ask(port, "/v1/completions", body(text(i), 440, seed=i), into=answer)
            over[i] = True

        tasks = [asyncio.create_task(stream(i)) for i in range(KILLED_STREAMS)]
        for _ in rounds:
            aim = sum(seen) + 240
            while sum(seen) < aim:
                await asyncio.sleep(0.001)
            pid = (await _health(port))["engine_pid"]
            os.kill(pid, signal.SIGKILL)
            began = time.perf_counter()
            while Path(f"/proc/{pid}").exists():
                await asyncio.sleep(0.0005)
            await asyncio.sleep(0.02)  # what was on its way before it died
            before = list(seen)
            while sum(seen) == sum(before):
                await asyncio.sleep(0.0005)
            found["any_s"].append(time.perf_counter() - began)
            while any(not done and now == then for done, now, then in zip(over, seen, before, strict=True)):
                await asyncio.sleep(0.0005)
            found["all_s"].append(time.perf_counter() - began)
        await asyncio.gather(*tasks)

    with served(bundled().folder, "--threads", "1", "--max-model-len", "512") as port:
        asyncio.run(one(port))
    return {
        "kills": KILLS, "streams": KILLED_STREAMS, **{name: median(times) for name, times in found.items()},
        "worst_s": max(found["all_s"]),
    }  # fmt: skip


async def _health(port: int) -> dict[str, Any]:
    from weft.soak.client import get

    while True:
        told: dict[str, Any] = json.loads(await get(port, "/health"))
        if told["status"] == "ok":
            return told
        await asyncio.sleep(0.01)


def streams() -> dict[str, Any]:
    """All at once, each with a prompt of its own and log-probabilities, by which its tokens are counted."""
    errors: list[str] = []
    whole = 0

    async def one(port: int, i: int) -> None:
        nonlocal whole
        try:
            answer = await ask(port, "/v1/completions", body(text(i), STREAM_TOKENS, logprobs=0))
            whole += answer is not None and len(answer.tokens[0]) == STREAM_TOKENS
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    async def every(port: int) -> float:
        began = time.perf_counter()
        await asyncio.gather(*(one(port, i) for i in range(STREAMS)))
        return time.perf_counter() - began

    with served(bundled().folder, "--threads", "1", "--max-model-len", "512") as port:
        seconds = asyncio.run(every(port))
    told = {"streams": STREAMS, "tokens_each": STREAM_TOKENS, "whole": whole, "errors": len(errors), "seconds": seconds}
    return {**told, "output_tok_s": whole * STREAM_TOKENS / seconds, "reasons": errors[:3]}


def ttft() -> dict[str, Any]:
    """In turns, each with a prompt that nobody has had: what HTTP, templates and text, the socket and a second process add."""
    folder, options = bundled().folder, {"threads": 1, "max_model_len": 512}
    encode = _encoder(folder)
    over, alone = list[float](), list[float]()
    with served(folder, "--threads", "1", "--max-model-len", "512") as port, engine(folder, options) as own:
        driver = Driver(own)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for turn in range(-10, TURNS):
            words = text(turn + 100)
            time.sleep(0.01)
            mine = driver.run([encode(words)], 4)[0]
            time.sleep(0.01)
            theirs = first_token(connection, words, 4)
            if turn >= 0:
                alone.append(mine)
                over.append(theirs)
        connection.close()
    added = [a - b for a, b in zip(over, alone, strict=True)]
    return {"turns": TURNS, "http_s": median(over), "engine_s": median(alone), "added_s": median(added)}


def share(shape: str) -> dict[str, Any]:
    """In turns, the same prompts for both; `ratio` within a round, median."""
    folder = grown(shape, tick=_tell).folder
    options = {"threads": 2, "max_model_len": 256, "max_num_seqs": SHARED}
    flags = ("--threads", "2", "--max-model-len", "256", "--max-num-seqs", str(SHARED))
    encode = _encoder(folder)
    over, alone = list[float](), list[float]()

    async def every(port: int, prompts: Sequence[str]) -> float:
        began = time.perf_counter()
        await asyncio.gather(*(ask(port, "/v1/completions", body(p, SHARED_TOKENS)) for p in prompts))
        return time.perf_counter() - began

    with served(folder, *flags) as port, engine(folder, options) as own:
        driver = Driver(own)
        for turn in range(-1, ROUNDS):
            prompts = [text(1000 * (turn + 2) + i, 6) for i in range(SHARED if turn >= 0 else 4)]
            mine = driver.run([encode(p) for p in prompts], SHARED_TOKENS)[1]
            theirs = asyncio.run(every(port, prompts))
            if turn >= 0:
                alone.append(mine)
                over.append(theirs)
            _tell(f"{shape}: {mine:.1f} s, over HTTP {theirs:.1f} s")
    tokens = SHARED * SHARED_TOKENS
    return {
        "shape": shape, "streams": SHARED, "tokens_each": SHARED_TOKENS, "rounds": ROUNDS,
        "http_tok_s": tokens / median(over), "engine_tok_s": tokens / median(alone),
        "ratio": median(b / a for a, b in zip(over, alone, strict=True)),
    }  # fmt: skip


def judged(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The same figure with its limits, and whether it keeps them."""
    return limits.judged(name, found, LIMITS[name])


def _encoder(folder: Path) -> Callable[[str], list[int]]:
    from weft.front.text import ModelText

    loaded = ModelText.load(folder, name="bench", max_model_len=512)
    return lambda words: list(loaded.prompt_ids(words))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="restart,streams,ttft,share", help="figures to take, by commas")
    parser.add_argument("--shape", default="qwen2.5-0.5b", help="grown model of share")
    parser.add_argument("--json", action="store_true", help="print the record, too")
    options = parser.parse_args(argv)
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "restart": restart, "streams": streams, "ttft": ttft, "share": lambda: share(options.shape),
    }  # fmt: skip
    names = options.only.split(",")
    if unknown := set(names) - measures.keys():
        parser.error(f"--only knows {', '.join(measures)}, not {', '.join(sorted(unknown))}")
    path = RESULTS / "serving.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
    for name in names:
        began = time.perf_counter()
        _tell(f"{name} ...")
        record[name] = {"date": time.strftime("%Y-%m-%d", time.gmtime()), **judged(name, measures[name]())}
        _tell(f"{name} took {time.perf_counter() - began:.0f} s")
        record["machine"] = machine()
        write(path, record)
    if options.json:
        print(json.dumps(record, indent=1))
    if not all(record[name]["met"] for name in names):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
