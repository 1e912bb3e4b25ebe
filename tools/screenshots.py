"""Pictures of the page for the README: `python -m tools.screenshots [FOLDER]`, by default into docs/images.

Starts a server with the bundled model and a small KV pool, asks it things, and looks with Debian's chromium.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 200_000
SERVER = ("--max-model-len", "1024", "--memory", "480M", "--threads", "1")
"""A pool of some 300 blocks, so that cells are large and requests take turns."""
OPENING = "The old man walked along the shore and looked at the sea. He thought of the boats that had gone out. "


@contextlib.contextmanager
def served(*flags: str) -> Iterator[str]:
    """A server in processes of its own; its address."""
    command = [sys.executable, "-m", "weft", "serve", "bundled", "--port", "0", *SERVER, *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        if process.stdout is not None:
            process.stdout.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def chromium() -> str | None:
    """Where the browser is; None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    """A browser without a window."""
    where = chromium()
    assert where is not None, "there is no chromium; install it with apt-get install chromium"
    with sync_playwright() as playwright:
        # Chromium refuses its own sandbox to root.
        browser = playwright.chromium.launch(
            executable_path=where, args=["--no-sandbox"] if os.geteuid() == 0 else [], chromium_sandbox=False
        )
        try:
            yield browser
        finally:
            browser.close()


def ask(url: str, prompt: str, **more: Any) -> None:
    httpx.post(f"{url}/v1/completions", json={"prompt": prompt, **more}, timeout=120)


def main(arguments: Sequence[str]) -> int:
    folder = Path(arguments[0]) if arguments else ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with served() as url, browsing() as browser:
        wide = browser.new_page(viewport={"width": 1180, "height": 860}, color_scheme="light")
        chat(wide, url)
        shoot(wide, folder / "chat.png")
        live(wide, url)
        shoot(wide, folder / "live.png")
        wide.set_viewport_size({"width": 1180, "height": 660})
        wide.goto(f"{url}/#memory")
        wide.locator("#plan tr").first.wait_for()
        shoot(wide, folder / "memory.png")
        phone = browser.new_page(viewport={"width": 375, "height": 740}, color_scheme="dark", device_scale_factor=2)
        chat(phone, url)
        shoot(phone, folder / "phone.png")
    large = [p.name for p in folder.glob("*.png") if p.stat().st_size >= MOST_BYTES]
    for name in large:
        print(f"{name} has {MOST_BYTES} bytes or more")
    return 1 if large else 0


def chat(page: Page, url: str) -> None:
    """One short conversation, its tokens coloured."""
    page.goto(url)
    page.locator("#state[data-state=ok]").wait_for()
    details = page.locator("details.aside")
    narrow = details.get_attribute("open") is None
    if narrow:
        details.locator("summary").click()
    page.locator("#seed").fill("11")
    page.locator("#temperature").fill("0.7")
    page.locator("#max_tokens").fill("60" if narrow else "90")
    page.locator("#logprobs").check()
    if narrow:
        details.locator("summary").click()
    page.locator("#message").fill("Tell me about the sea.")
    page.locator("#message").press("Enter")
    page.locator(".said.model[data-state=done]").wait_for()
    page.locator(".what summary").click()
    page.locator(".log").evaluate("log => { log.scrollTop = 0; }")
    if not narrow:
        page.locator(".token").nth(12).hover()


def live(page: Page, url: str) -> None:
    """The live view while requests run, some of which share their beginning."""
    page.set_viewport_size({"width": 1180, "height": 1480})
    page.goto(f"{url}/#live")
    page.locator("#kv-map").wait_for()
    asks = [
        threading.Thread(
            target=ask,
            args=(url, OPENING * (1 + i % 3)),
            kwargs={"max_tokens": 120 + 23 * i, "seed": i, "ignore_eos": True, "temperature": 0.8},
            daemon=True,
        )
        for i in range(16)
    ]
    for i, one in enumerate(asks):
        one.start()
        page.wait_for_timeout(60 if i % 4 else 250)
    page.locator("#requests tr[data-state=finished]").nth(3).wait_for()


def shoot(page: Page, path: Path) -> None:
    page.screenshot(path=path)
    print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
