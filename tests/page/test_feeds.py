"""The page of a server with several models: whose answer, whose figures, whose plan; and what a feed leaves out."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.page.test_page import complete, look, number, send, tools, until

pytestmark = pytest.mark.serial
TINY, SMALL = "weft-tiny", "small"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, bundled: Path) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("models") / SMALL
    shutil.copytree(bundled, folder)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bundled.parent / "draft" / name, folder / name)
    with tools().served(str(folder), "--memory", "1000M") as address:
        yield address


@pytest.fixture
def page(url: str) -> Iterator[Any]:
    with tools().browsing() as browser:
        made = browser.new_page()
        made.set_default_timeout(15_000)
        errors: list[str] = []
        made.on("pageerror", lambda error: errors.append(str(error)))
        made.goto(url)
        made.locator("#state[data-state=ok]").wait_for()
        yield made
        assert errors == []


def test_the_reader_chooses_who_answers_and_who_is_shown(page: Any, url: str, bundled: Path) -> None:
    said = {"messages": [{"role": "user", "content": "Tell me of the sea"}], "temperature": 0, "max_tokens": 12}
    until(lambda: page.locator("#model option").count() == 2, page=page)
    assert page.locator("#model option").all_text_contents() == [TINY, SMALL]
    assert page.locator("#which").is_hidden(), "a chat has its own list"
    texts = {}
    for name in (TINY, SMALL):
        page.locator("#clear").click()
        page.locator("#model").select_option(name)
        answer = send(page, "Tell me of the sea", temperature=0, max_tokens=12)
        answer.locator(".what").wait_for()
        texts[name] = answer.locator(".text").last.text_content()
        told = httpx.post(f"{url}/v1/chat/completions", json={"model": name, **said}).json()
        assert texts[name] == told["choices"][0]["message"]["content"]
    assert texts[TINY] != texts[SMALL]

    for i in range(3):
        complete(url, f"The sea {i}", model=SMALL)
    look(page, "live")
    figures = {
        line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in httpx.get(f"{url}/metrics").text.splitlines()
    }
    for name in (TINY, SMALL, TINY):
        page.locator("#engine").select_option(name)
        for place, metric in (("#n-generation", "generation_tokens_total"), ("#n-steps", "engine_steps_total")):
            wanted = int(figures[f'weft:{metric}{{model_name="{name}"}}'])
            until(lambda place=place, wanted=wanted: _shows(page, place, wanted), page=page)  # type: ignore[misc]
    steps = page.locator("#step-text")
    complete(url, "The sea", model=TINY)
    until(lambda: steps.text_content().startswith("Step "), page=page)
    page.locator("#engine").select_option(SMALL)
    until(lambda: steps.text_content() == "No step yet.", steps.text_content, page)
    assert page.locator("#requests tr").count() == 0
    look(page, "memory")
    weights = {TINY: 0, SMALL: 0}
    for name in weights:
        page.locator("#engine").select_option(name)
        page.locator("#memory dd", has_text=name).first.wait_for()
        weights[name] = int(page.locator("#plan tr[data-part=weights_bytes]").get_attribute("data-bytes"))
    # Both files hold two bytes for each of the weights that are shown in four.
    for name, folder in {TINY: bundled, SMALL: bundled.parent / "draft"}.items():
        assert weights[name] == pytest.approx(2 * (folder / "model.safetensors").stat().st_size, rel=2e-3), name


def _shows(page: Any, place: str, wanted: int) -> bool:
    return page.locator(place).text_content() != "–" and number(page, place) == wanted


def test_steps_that_came_too_fast_are_counted(page: Any, url: str) -> None:
    """A feed as a fast engine would send it."""
    with httpx.stream("GET", f"{url}/v1/weft/live", timeout=30) as answer:
        hello, frame = itertools.islice((line[6:] for line in answer.iter_lines() if line.startswith("data: ")), 2)
    rows = {"prompt_rows": 1, "decode_rows": 2, "guess_rows": 0}
    steps = lambda first: [{"step": first + i, "t_s": 0.0, "requests": 3, **rows} for i in range(64)]
    left = [
        dict.fromkeys(("steps", *rows), 0),
        {"steps": 1036, "prompt_rows": 10, "decode_rows": 2000, "guess_rows": 0},
    ]
    left.append({"steps": 4, "prompt_rows": 0, "decode_rows": 8, "guess_rows": 1})
    frames = [{**json.loads(frame), "steps": steps(2000 * i), "left_out": one} for i, one in enumerate(left)]
    body = "".join(
        ["event: hello\ndata: ", hello, "\n\n", *(f"event: frame\ndata: {json.dumps(f)}\n\n" for f in frames)]
    )
    sent = []

    def once(route: Any) -> None:
        if sent:
            route.abort()
        else:
            sent.append(route.fulfill(status=200, content_type="text/event-stream", body=body))

    page.route("**/v1/weft/live*", once)
    look(page, "live")
    until(lambda: "4,063" in page.locator("#step-text").text_content(), page=page)
    assert page.locator("#step-text").text_content() == (
        "Step 4,063: 1 rows of prompts, 2 rows of answers, 3 sequences. "
        "Too fast to be drawn: 1,040 steps with 10 rows of prompts, 2,008 rows of answers, 1 guesses."
    )
    assert page.locator("canvas[data-steps]").get_attribute("data-steps") == "120"
