"""The page at `/`, in Debian's chromium: what it shows is what the server says, and what others write stays text."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.front.scripted import ScriptedPort
from weft.front.app import create_app
from weft.front.gate import Gate
from weft.front.page import FOLDER, files
from weft.front.port import EngineInfo, EngineState
from weft.front.server import Server
from weft.front.text import ModelText

pytestmark = pytest.mark.serial
VIEWS = ("chat", "live", "memory")
PREFIX = "The old man walked along the shore and looked at the sea. " * 8


def tools() -> Any:
    """`tools.screenshots`, which knows how to start server and browser.  Where CI=1, none of this may be missing."""
    missing = "playwright is not installed"
    try:
        from tools import screenshots

        missing = "" if screenshots.chromium() else "there is no chromium"
    except ImportError:
        pass
    if missing and os.environ.get("CI"):
        pytest.fail(f"{missing}, and CI is set; .ci/run installs it")
    if missing:
        pytest.skip(f"{missing}; apt-get install chromium, and make test")
    return screenshots


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with tools().served() as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with tools().browsing() as made:
        yield made


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """Every address that any page of this run has asked for."""
    return []


@pytest.fixture
def new_page(browser: Any, asked: list[str]) -> Iterator[Callable[..., Any]]:
    """Makes pages, and holds them to have no error at the end."""
    made, errors = [], []

    def make(**options: Any) -> Any:
        context = browser.new_context(**options)
        context.on("request", lambda request: asked.append(request.url))
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        made.append(context)
        return page

    yield make
    for context in made:
        context.close()
    assert errors == []


@pytest.fixture
def page(new_page: Callable[..., Any], url: str) -> Any:
    made = new_page()
    made.goto(url)
    made.locator("#state[data-state=ok], #state[data-state=recovered]").wait_for()
    return made


def look(page: Any, view: str) -> None:
    page.locator(f"nav a[data-view={view}]").click()
    page.locator(f"#{view}").wait_for()


def number(page: Any, place: str) -> int:
    return int(page.locator(place).text_content().replace(",", ""))


def until(ready: Callable[[], bool], what: Callable[[], Any] = str, page: Any = None) -> None:
    end = time.monotonic() + 15
    while not ready():
        assert time.monotonic() < end, what()
        page.wait_for_timeout(40) if page else time.sleep(0.04)


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))}


def complete(url: str, prompt: str, **more: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 8, "ignore_eos": True, **more}
    answer: dict[str, Any] = httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status().json()
    return answer


def send(page: Any, text: str, **settings: Any) -> Any:
    """Write into the chat and send; the answer's place."""
    for name, value in settings.items():
        page.locator(f"#{name}").fill(str(value))
    before = page.locator(".said.model").count()
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")
    return page.locator(".said.model").nth(before)


def cells(page: Any) -> dict[str, int]:
    """Cells of the map, counted by the pixels in their middle and the legend's colours."""
    found: dict[str, int] = page.evaluate(
        """() => {
          const map = document.getElementById("kv-map"), c = map.getContext("2d");
          const { columns, cell, total } = map.dataset, ratio = map.width / parseFloat(map.style.width);
          const rgb = (text) => text.match(/[0-9]+/g).slice(0, 3).join();
          const names = {}, counts = {};
          for (const name of ["free", "cached", "used", "shared"]) {
            names[rgb(getComputedStyle(document.getElementById(`kv-swatch-${name}`)).backgroundColor)] = name;
            counts[name] = 0;
          }
          for (let i = 0; i < total; i++) {
            const x = (i % columns + 0.3) * cell * ratio, y = (Math.floor(i / columns) + 0.3) * cell * ratio;
            counts[names[rgb(Array.from(c.getImageData(x, y, 1, 1).data).join())]] += 1;
          }
          return counts;
        }"""
    )
    return found


def test_counts_are_those_of_the_metrics(page: Any, url: str) -> None:
    look(page, "live")
    page.locator("#kv-map[data-total]").wait_for()
    before = metrics(url)
    with ThreadPoolExecutor(6) as pool:
        told = list(pool.map(lambda i: complete(url, f"{i % 7} {PREFIX}", seed=i), range(20)))
    now = metrics(url)
    assert now['weft:requests_total{finish_reason="length"}'] == 20 + before.get(
        'weft:requests_total{finish_reason="length"}', 0
    )
    generated = sum(t["usage"]["completion_tokens"] for t in told)
    assert now["weft:generation_tokens_total"] - before["weft:generation_tokens_total"] == generated == 160
    names = {
        "#n-generation": "weft:generation_tokens_total", "#n-prompt": "weft:prompt_tokens_total",
        "#n-steps": "weft:engine_steps_total",
        "#n-hits": "weft:prefix_hit_tokens_total", "#n-preemptions": "weft:preemptions_total",
        "#n-running": "weft:requests_running",
        "#n-waiting": "weft:requests_waiting", "#kv-cached": "weft:kv_blocks_cached",
    }  # fmt: skip

    def wrong() -> dict[str, Any]:
        now = metrics(url)
        shown = {place: (number(page, place), now[name]) for place, name in names.items()}
        ended = sum(value for name, value in now.items() if name.startswith("weft:requests_total"))
        shown["#n-finished"] = (number(page, "#n-finished"), ended)
        for one, name in (("ttft", "time_to_first_token"), ("tpot", "inter_token_latency")):
            count = int(page.locator(f"#{one}-text").get_attribute("data-count"))
            shown[one] = (count, now[f"weft:{name}_seconds_count"])
        drawn = cells(page)
        used = drawn["used"] + drawn["shared"]
        shown["map: used"] = (used, now["weft:kv_blocks_referenced"])
        shown["map: cached"] = (drawn["cached"], now["weft:kv_blocks_cached"])
        shown["map: all"] = (sum(drawn.values()), now["weft:kv_blocks_total"])
        shown["legend"] = (number(page, "#kv-free"), drawn["free"])
        return {name: pair for name, pair in shown.items() if pair[0] != pair[1]}

    until(lambda: not wrong(), wrong, page)
    assert cells(page)["cached"] > 0
    assert number(page, "#n-hits") > 0
    rows = page.locator("#requests tr[data-state=finished]")
    assert rows.count() == 20
    assert {rows.nth(i).locator("td").nth(4).text_content() for i in range(20)} == {"8"}
    rows.first.locator("button").click()
    events = page.locator("tr.more:not([hidden]) li")
    assert events.first.get_attribute("data-event") == "queued"
    assert events.last.get_attribute("data-event") == "finished"
    assert int(page.locator("canvas[data-steps]").get_attribute("data-steps")) > 1


def test_two_chats_with_one_prefix_share_blocks(page: Any, url: str) -> None:
    look(page, "live")
    page.locator("#kv-map[data-total]").wait_for()
    body = {"messages": [{"role": "user", "content": PREFIX}], "max_tokens": 750, "ignore_eos": True}
    chat = f"{url}/v1/chat/completions"
    first = httpx.post(chat, json={**body, "max_tokens": 1}, timeout=60).json()["usage"]["prompt_tokens"]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(httpx.post, chat, json={**body, "seed": i}, timeout=60) for i in range(2)]
        until(lambda: cells(page)["shared"] == number(page, "#kv-shared") == first // 16, page=page)
        assert [job.result().status_code for job in jobs] == [200, 200]
    until(lambda: number(page, "#kv-shared") == cells(page)["shared"] == 0, page=page)


def test_chat_streams_and_tells_what_became_of_it(page: Any, url: str) -> None:
    page.locator("#logprobs").check()
    answer = send(page, "Tell me about the sea.", seed=5, max_tokens=24, temperature=0.7, system="Be kind.")
    answer.locator("xpath=self::*[@data-state='done']").wait_for()
    body = {
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tell me about the sea."}],
        "seed": 5, "max_tokens": 24, "temperature": 0.7, "logprobs": True, "top_logprobs": 5,
    }  # fmt: skip
    told = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
    assert answer.locator(".tokens").text_content() == told["message"]["content"]
    entries = told["logprobs"]["content"]
    tokens = answer.locator(".token")
    assert tokens.count() == len(entries)
    least = min(range(len(entries)), key=lambda i: entries[i]["logprob"])
    assert "shade-4" in tokens.nth(least).get_attribute("class")
    tokens.first.focus()
    for _ in range(least):
        page.keyboard.press("ArrowRight")
    shown = page.locator("#alternatives code").all_text_contents()
    want = [one["token"] for one in entries[least]["top_logprobs"]]
    want += [entries[least]["token"]] if entries[least]["token"] not in want else []
    assert shown == [t.replace(" ", "␣").replace("\n", "⏎") for t in want]
    answer.locator(".what summary").click()
    assert answer.locator("li[data-event=first_token]").count() == 1
    assert answer.locator(".timeline-bar rect").count() >= 2
    refused = send(page, "And more? " * 600)
    assert "1024" in refused.locator("[role=alert]").text_content()
    refused = send(page, "And more?", temperature=7)
    assert refused.locator("[role=alert]").text_content().startswith("Temperature: ")


def test_the_token_that_ends_an_answer_is_no_text(page: Any, url: str) -> None:
    """It is there to look at, with what else could have come; what is read is the answer."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300, "logprobs": True, "top_logprobs": 5}
    for seed in range(9):
        told = httpx.post(f"{url}/v1/chat/completions", json={**body, "seed": seed}, timeout=60).json()["choices"][0]
        if told["finish_reason"] == "stop":
            break
    last = told["logprobs"]["content"][-1]
    assert last["token"] not in told["message"]["content"]
    page.locator("#logprobs").check()
    answer = send(page, "Hi", seed=seed, max_tokens=300)
    answer.locator("xpath=self::*[@data-state='done']").wait_for()
    assert answer.locator(".tokens").text_content() == told["message"]["content"]
    answer.locator(".token").last.hover()
    assert page.locator("#alternatives .chosen").text_content().startswith(last["token"])


def test_stop_frees_the_request(page: Any, url: str) -> None:
    def endless(route: Any) -> None:
        route.continue_(post_data=json.dumps({**json.loads(route.request.post_data), "ignore_eos": True}))

    page.route("**/v1/chat/completions", endless)
    aborted = 'weft:requests_total{finish_reason="abort"}'
    before = metrics(url).get(aborted, 0)
    # In the page, at the first text: the model may have written all of it before another process has looked.
    page.evaluate(
        """() => new MutationObserver((_, self) => {
          if (!document.querySelector(".said.model .text:not(details *):not(:empty)")) return;
          self.disconnect();
          document.getElementById("stop").click();
        }).observe(document.getElementById("log"), { childList: true, subtree: true })"""
    )
    answer = send(page, "Tell me a long story.", max_tokens=990)
    answer.locator("xpath=self::*[@data-state='stopped']").wait_for()
    until(lambda: metrics(url)["weft:requests_running"] == 0, page=page)
    now = metrics(url)
    assert now[aborted] == before + 1
    assert now["weft:kv_blocks_referenced"] == 0
    assert page.locator("#send").is_visible()


def test_a_killed_engine_shows_and_recovers(page: Any, url: str) -> None:
    look(page, "live")
    page.locator("#kv-map[data-total]").wait_for()
    body = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "seed": 3}
    whole = complete(url, **body)["choices"][0]["text"]
    engine = httpx.get(f"{url}/health").json()["engine_pid"]
    nursery = int(Path(f"/proc/{engine}/stat").read_text().rpartition(")")[2].split()[1])
    # Until the page knows that this one has ended, or it is taken for the next one.
    page.locator("#requests tr[data-state=finished]").first.wait_for()
    until(lambda: metrics(url)["weft:requests_running"] == number(page, "#n-running") == 0, page=page)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(complete, url, **body)
        until(lambda: metrics(url)["weft:requests_running"] == 1)
        os.kill(engine, signal.SIGSTOP)  # so that the answer cannot end before the page has looked
        try:
            until(lambda: number(page, "#n-running") == 1, page=page)
            request = page.locator("#requests tr[data-state=running]").get_attribute("data-request")
            os.kill(nursery, signal.SIGKILL)  # so that the next one takes longer than the page takes to look
        finally:
            os.kill(engine, signal.SIGKILL)
        page.locator("#state[data-state=down]").wait_for()
        page.locator("#state[data-state=recovered]").wait_for(timeout=60_000)
        assert job.result()["choices"][0]["text"] == whole
    restarts = metrics(url)["weft:engine_restarts_total"]
    assert restarts == int(page.locator("#state").get_attribute("data-restarts")) >= 1
    assert f"{restarts:.0f} restart" in page.locator("#state").text_content()
    # By its name: what the page shows just after the restart may be that nothing runs yet.
    page.locator(f"#requests tr[data-request='{request}'][data-state=finished] button").click()
    assert page.locator("tr.more:not([hidden]) li[data-event=engine_died]").count() == 1


EVIL = '<img src=x onerror="window.bad=1"><script>window.bad=1</script>'


@pytest.mark.parametrize("how", ["text", "tokens", "error"])
def test_what_a_model_writes_stays_text(page: Any, how: str) -> None:
    entry = {
        "token": EVIL,
        "logprob": -3.0,
        "bytes": None,
        "top_logprobs": [{"token": EVIL, "logprob": -0.1, "bytes": None}],
    }
    choice: dict[str, Any] = {
        "index": 0,
        "delta": {"content": EVIL, "reasoning_content": EVIL},
        "finish_reason": "stop",
    }
    if how == "tokens":
        choice["logprobs"] = {"content": [entry]}
    chunk = {"error": {"message": EVIL}} if how == "error" else {"choices": [choice]}
    moment = {"t_s": 0.1, "event": EVIL, "detail": {}}
    events = [chunk, {"choices": [], "weft": {"timeline": [moment]}}]
    text = "".join(f"data: {json.dumps(one)}\n\n" for one in events) + "data: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=text, headers={"content-type": "text/event-stream"})
    )
    answer = send(page, EVIL)
    place = {"text": ".text >> nth=1", "tokens": ".token", "error": "[role=alert]"}[how]
    answer.locator(place).wait_for()
    assert answer.locator(place).text_content().removesuffix(".") == EVIL
    if how == "tokens":
        answer.locator(".token").hover()
        assert page.locator("#alternatives code").first.text_content().replace("␣", " ") == EVIL
    assert page.locator("main img, main script, #alternatives img").count() == 0
    assert page.evaluate("window.bad") is None


def test_the_plan_is_the_servers(page: Any, url: str) -> None:
    look(page, "memory")
    page.locator("#plan tr").first.wait_for()
    with httpx.stream("GET", f"{url}/v1/weft/live") as feed:
        told = next(json.loads(line[6:]) for line in feed.iter_lines() if line.startswith("data: "))
    rows = page.locator("#plan tr")
    shown = {
        rows.nth(i).get_attribute("data-part"): int(rows.nth(i).get_attribute("data-bytes"))
        for i in range(rows.count())
    }
    assert shown == {name: told["plan"][name] for name in shown}
    assert sum(shown.values()) == told["plan"]["total_bytes"]
    assert page.locator("#plan-total").text_content() == f"{told['plan']['total_bytes'] / 2**20:.0f} MiB"


def test_every_view_by_keyboard_and_by_address(page: Any, url: str) -> None:
    for view in (*VIEWS[1:], VIEWS[0]):
        page.evaluate("document.activeElement.blur()")
        for _ in range(12):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.dataset.view") == view:
                break
        page.keyboard.press("Enter")
        page.locator(f"#{view}").wait_for()
        assert [v for v in VIEWS if page.locator(f"#{v}").is_visible()] == [view]
        assert page.evaluate("location.hash") == f"#{view}"
    page.goto(f"{url}/#memory")
    page.reload()
    assert page.locator("#memory").is_visible()


def test_a_phone_scrolls_one_way(new_page: Callable[..., Any], url: str) -> None:
    page = new_page(viewport={"width": 375, "height": 700}, color_scheme="dark")
    page.goto(url)
    page.locator("#state[data-state=ok], #state[data-state=recovered]").wait_for()
    page.locator("details.aside summary").click()
    page.locator("#logprobs").check()
    send(page, "w" * 300, max_tokens=12).locator("xpath=self::*[@data-state='done']").wait_for()
    page.locator(".what summary").click()
    for view in VIEWS:
        look(page, view)
        if view == "live":
            page.locator("#kv-map[data-total]").wait_for()
            complete(url, PREFIX)
            page.locator("#requests tr[data-state=finished] button").first.click()
            assert page.evaluate("(e => e.scrollWidth - e.clientWidth)(document.querySelector('.scroll'))") == 0
        assert page.evaluate("document.documentElement.scrollWidth") == 375, view
        assert page.evaluate("(e => e.scrollWidth - e.clientWidth)(document.getElementById('log'))") == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 21)"


@contextmanager
def gated(text: ModelText, port: ScriptedPort, **options: Any) -> Iterator[tuple[Server, Future[None], Gate]]:
    """A server whose model is not there yet; it is, once the future is done."""
    started: Future[None] = Future()
    state = lambda: EngineState(status="ok" if started.done() else "loading")
    gate = Gate(started, lambda: create_app(port, text, model_ids=["m"], **options), state)
    server = Server(gate, "127.0.0.1", 0)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server, started, gate
    finally:
        server.stop()
        thread.join(20)
        port.close()


@pytest.fixture
def port(bundled: Path) -> tuple[ModelText, ScriptedPort]:
    text = ModelText.load(bundled, name="m")
    info = EngineInfo(
        model_id="m", vocab_size=text.vocab_size, max_model_len=512, kv_blocks=64, block_tokens=16, max_num_seqs=8
    )
    return text, ScriptedPort(lambda spec, index: [300] * 5, info)


def test_it_is_there_while_the_model_loads_and_asks_for_the_key(
    new_page: Callable[..., Any], port: tuple[ModelText, ScriptedPort]
) -> None:
    page = new_page()
    with gated(*port, api_key="sesame") as (server, started, gate):
        url = server.url
        until(lambda: gate.app is None and _answers(url))
        page.goto(url)
        page.locator("#state[data-state=loading]").wait_for()
        assert httpx.get(f"{url}/v1/models").status_code == 503
        started.set_result(None)
        page.locator("dialog[open]").wait_for()
        assert page.locator("#model option").count() == 0
        for key in ("wrong", "sesame"):
            page.locator("#key-field").fill(key)
            page.locator("#key-field").press("Enter")
            if key == "wrong":
                page.locator("#key-wrong").wait_for()
        page.locator("#model option").wait_for(state="attached")
        assert page.evaluate("document.activeElement.id") == "main", "the next Tab leads to the first field"
        assert page.locator("#model").input_value() == "m"
        answer = send(page, "Hi", max_tokens=5)
        answer.locator("xpath=self::*[@data-state='done']").wait_for()
        assert "5 tokens" in answer.locator(".meta").text_content()
        look(page, "live")
        page.locator("#n-running", has_text=re.compile("^0$")).wait_for()
        assert page.evaluate("[Object.keys(localStorage).length, document.cookie, sessionStorage['weft.key']]") == [
            0,
            "",
            "sesame",
        ]
        look(page, "chat")
        send(page, "Hi", max_tokens=50)  # the scripted engine stays at five tokens
        until(lambda: gate.open == 1, page=page)
        look(page, "live")
        server.stop()
        page.locator("#state[data-state=draining]").wait_for()
        assert httpx.get(url).status_code == 200
        assert gate.open == 1, "who watches is not waited for"
        look(page, "chat")
        page.locator("#stop").click()
        page.locator("#state[data-state=lost]").wait_for()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 503
    except httpx.ConnectError:
        return False


def test_files_and_their_policy(url: str) -> None:
    for path in files():
        answer = httpx.get(url + path)
        assert answer.status_code == 200
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        again = httpx.get(url + path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        head = httpx.head(url + path)
        assert int(head.headers["content-length"]) == len(answer.content)
    assert {p.name for p in FOLDER.iterdir()} == {"index.html" if p == "/" else Path(p).name for p in files()}
    assert httpx.post(f"{url}/").status_code == 405
    at = urlsplit(url)
    for path in (
        "/static/../page.py",
        "/static/%2e%2e/page.py",
        "/static//etc/passwd",
        "/static/",
        "/static/app.js/",
        "/static/%00",
    ):
        connection = http.client.HTTPConnection(at.hostname or "", at.port)  # sends the path as it is
        connection.request("GET", path)
        answer_ = connection.getresponse()
        assert (answer_.status, answer_.read()[:9]) == (404, b'{"error":'), path
        connection.close()


def test_no_markup_is_made_of_text() -> None:
    for path in FOLDER.glob("*.js"):
        source = path.read_text(encoding="utf8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", source), (
            path.name
        )
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", source), path.name


def test_no_request_leaves_the_origin(page: Any, asked: list[str], url: str) -> None:
    """Of the whole run; and the policy would not let one."""
    for view in VIEWS:
        look(page, view)
    page.locator("#plan tr").first.wait_for()
    look(page, "chat")
    send(page, "Hi", max_tokens=4).locator("xpath=self::*[@data-state='done']").wait_for()
    assert {urlsplit(one).hostname for one in asked} == {"127.0.0.1"}
    mine = [one for one in asked if one.startswith(url)]
    paths = {urlsplit(one).path for one in mine}
    assert (
        {"/", "/static/app.js", "/v1/weft/live"}
        < paths
        <= {"/", "/health", "/v1/models", "/v1/chat/completions", "/v1/weft/live", *files()}
    )
    refused = page.evaluate(
        """async () => { let told = ""; addEventListener("securitypolicyviolation", (e) => { told = e.violatedDirective; });
          try { await fetch("https://example.com/"); } catch (error) {
            await new Promise((done) => setTimeout(done, 300)); return told || "no policy"; } return "allowed"; }"""
    )
    assert refused == "connect-src"
