"""`weft chat`: what is sent along, what can be typed, and how an answer is stopped on a terminal."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Generator, Mapping, Sequence

import pytest
from typer.testing import CliRunner

from tests.cli.running import COMMAND, ROOT
from weft.cli._remote import RemoteChat, events
from weft.cli.app import app, exit_status
from weft.cli.chat import Conversation
from weft.errors import CapacityError, ConfigError, EngineError, RequestError

TINY = ("--threads", "1", "--memory", "600M")


class Script:
    """An answer for each question, in order; an error is raised.  Keeps what it was asked."""

    def __init__(self, *answers: list[str] | EngineError) -> None:
        self.answers, self.asked = list(answers), []

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> Generator[str, None, None]:
        self.asked.append([(m["role"], m["content"]) for m in messages])
        answer = self.answers.pop(0)
        if isinstance(answer, EngineError):
            raise answer
        yield from answer


def talk(monkeypatch: pytest.MonkeyPatch, script: Script, typed: str, system: str | None = None) -> Conversation:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    conversation = Conversation(script, "model", system)
    conversation.run()
    return conversation


def test_what_was_said_is_sent_along_until_it_is_reset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(["a", "", "b"], ["c"], ["d"], ["e"], ["f"])
    typed = "one\n\ntwo\n/reset\nthree\n/system be brief\nfour\n/system\nfive \\\nsix\n/quit\nseven\n"
    talk(monkeypatch, script, typed, system="be kind")
    kind, brief = ("system", "be kind"), ("system", "be brief")
    assert script.asked == [
        [kind, ("user", "one")],
        [kind, ("user", "one"), ("assistant", "ab"), ("user", "two")],
        [kind, ("user", "three")],
        [brief, ("user", "four")],
        [("user", "five \nsix")],
    ]
    assert capsys.readouterr().out == "ab\nc\nd\ne\nf\n"


def test_a_question_that_failed_is_forgotten_and_the_next_one_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(RequestError("too long", code="context_length_exceeded"), ["fine"])
    with pytest.raises(Exception) as ended:  # where nobody looks on, the exit status must tell
        talk(monkeypatch, script, "one\ntwo\n")
    assert getattr(ended.value, "exit_code", None) == 1
    assert script.asked[1] == [("user", "two")]
    told = capsys.readouterr()
    assert told.out == "fine\n"
    assert told.err == "error: too long; /reset starts afresh\n"


def test_lines_are_followed_with_a_real_model() -> None:
    lines = "Tell me about the sea.\n/reset\n/what\nTell me about the sea.\n/quit\nnever read\n"
    args = ["chat", "--temperature", "0", "--max-tokens", "8", *TINY]
    done = CliRunner().invoke(app, args, input=lines, prog_name="weft")
    assert done.exit_code == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == 2
    assert answers[0] == answers[1], "after /reset the same question is the same conversation"
    assert "(forgotten)" in done.stderr
    assert "there is no /what" in done.stderr


def _foreground() -> None:
    """In the child: the terminal is its own, and Ctrl-C counts, also where the tests run as somebody's background job."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """The command on a terminal of its own, where Ctrl-C and Ctrl-D are keys."""

    def __init__(self, *args: str) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [*COMMAND, *args], cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=_foreground,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def read(self, until: str, timeout: float = 90) -> None:
        """Until the regular expression was printed, counted from the last such call."""
        end = time.monotonic() + timeout
        while not (found := re.search(until, self.seen)):
            ready, _, _ = select.select([self.master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {until!r} within {timeout} s: {self.seen!r}"
            try:
                self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
            except OSError:
                raise AssertionError(f"it ended without {until!r}: {self.seen!r}") from None
        self.seen = self.seen[found.end() :]

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def interrupt(self, until: str) -> None:
        """Ctrl-C at the prompt, again where it fell between the prompt and the wait for a key (readline then sleeps on it)."""
        for patience in (2, 5, 15, 60):
            self.type("\x03")
            end = time.monotonic() + patience
            while time.monotonic() < end and not re.search(until, self.seen):
                if select.select([self.master], [], [], 0.2)[0]:
                    self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
            if re.search(until, self.seen):
                break
        self.read(until, timeout=1)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self.master)


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends_on_a_terminal() -> None:
    with Terminal("chat", "--temperature", "0", "--max-tokens", "3000", *TINY) as terminal:
        terminal.read("weft-tiny.*\n.*> ")
        terminal.type("/help\n")
        terminal.read("Ctrl-C stops an answer.*\n.*> ")
        terminal.interrupt("Ctrl-D ends the conversation.*\n.*> ")
        terminal.type("Tell me about the sea.\n")
        terminal.read(r"sea\.\r?\n.*\w+ \w+ \w+")
        terminal.type("\x03")
        terminal.read(r"\(stopped\)\s+.*> ", timeout=30)
        terminal.type("And then?\n")
        terminal.read(r"then\?\r?\n.*\w+ \w+ \w+")
        terminal.type("\x03")
        terminal.read(r"\(stopped\)\s+.*> ", timeout=30)
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0


# ---------------------------------------------------------------------------------------------- small parts


def test_events_are_read_as_they_are_framed() -> None:
    stream = io.BytesIO(
        b': hello\n\ndata: {"a": 1}\r\n\r\nevent: x\ndata: {"b":\ndata: 2}\n\ndata: [DONE]\n\ndata: {"c": 3}\n\n'
    )
    assert list(events(stream)) == [{"a": 1}, {"b": 2}]
    with pytest.raises(EngineError, match="OpenAI's form"):
        list(events(io.BytesIO(b"data: <html>\n\n")))


@pytest.mark.parametrize("url", ["ftp://x", "http://", "https:///v1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="no address"):
        RemoteChat(url, "m")


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(EngineError, match="is it running"):
        RemoteChat("127.0.0.1:9")


def test_exit_status_tells_a_wrong_request_from_a_no() -> None:
    assert exit_status(ConfigError("")) == exit_status(RequestError("")) == 2
    assert exit_status(CapacityError("")) == exit_status(EngineError("")) == 1


def test_a_key_without_a_url_is_refused() -> None:
    done = CliRunner().invoke(app, ["chat", "--api-key", "x"])
    assert done.exit_code == 2
    assert "--url" in done.stderr
