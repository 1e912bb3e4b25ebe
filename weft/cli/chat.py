"""`weft chat`: a conversation in the terminal, with a model in this process or with a server."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli._flags import EngineFlags, Model, spread
from weft.cli._local import load
from weft.cli._sampling import SamplingFlags
from weft.cli._terminal import complain, interruptible, say, stderr
from weft.errors import ConfigError, EngineError, RequestError

if TYPE_CHECKING:
    from weft.llm import LLM

HELP = """\
/help            this text
/reset           forget the conversation
/system TEXT     set the system message (none: remove it) and start afresh
/quit            end; so does Ctrl-D
Ctrl-C stops an answer.  A line that ends in \\ goes on in the next one."""

Answer = Callable[[Sequence[Mapping[str, str]]], Generator[str, None, None]]
"""(messages) -> pieces of the answer's text, some of them empty.  Closing it cancels the answer.  Raises EngineError."""


@functools.partial(spread, sampling=SamplingFlags, flags=EngineFlags)
def chat(
    model: Model = None,
    *,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            metavar="URL",
            help="Talk to the server there (any with OpenAI's protocol); MODEL is the name of a model of its.",
            show_default=False,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", metavar="KEY", help="Key of that server; else WEFT_API_KEY.", show_default=False),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", "-s", metavar="TEXT", help="System message.", show_default=False)
    ] = None,
    sampling: SamplingFlags,
    flags: EngineFlags,
) -> None:
    """Talk to a model in the terminal.  /help says what else can be typed."""
    if url is not None:
        from weft.cli._remote import RemoteChat

        if flags != EngineFlags():
            raise ConfigError("with --url the engine is the server's: leave its flags (--dtype, --memory, ...) out")
        remote = RemoteChat(url, model, api_key or os.environ.get("WEFT_API_KEY") or None)
        Conversation(lambda messages: remote.answer(messages, sampling.given()), remote.name, system).run()
        return
    if api_key is not None:
        raise ConfigError("--api-key goes with --url: a model in this process asks for no key")
    flags.check()
    with load(model, flags) as llm:
        if not llm.text.has_chat_template:
            raise ConfigError(f"{llm.name} has no chat template, so it cannot chat; use weft generate")
        Conversation(lambda messages: local_answer(llm, messages, sampling), llm.name, system).run()


def local_answer(
    llm: LLM, messages: Sequence[Mapping[str, str]], sampling: SamplingFlags
) -> Generator[str, None, None]:
    """The answer of a model in this process; leaving the iteration cancels it."""
    shown = 0
    with contextlib.closing(llm.stream(messages, sampling.params(llm.text))) as results:  # type: ignore[type-var]
        for result in results:
            text = result.outputs[0].text
            yield text[shown:]  # maybe nothing: each step is a moment at which the answer can be stopped
            shown = len(text)


class Conversation:
    """Lines in, answers out.

    What was said before is sent along each time; an answer that was stopped stays as far as it came.
    """

    def __init__(self, answer: Answer, name: str, system: str | None = None) -> None:
        self.answer, self.name, self.system = answer, name, system
        self.messages: list[dict[str, str]] = []
        self.failed = False
        self._terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        """Until /quit or the end of the input.  Where nobody looks on, exit status 1 if an answer failed."""
        if self._terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  gives input() a line editor and a history
            stderr().print(f"[bold]{self.name}[/]  [dim]/help lists what else can be typed[/]")
        while (line := self._line()) is not None:
            if line.startswith("/"):
                if not self._command(line):
                    break
            elif line:
                self._turn(line)
        if self.failed and not self._terminal:
            raise typer.Exit(1)

    def _line(self) -> str | None:
        """The next thing said, stripped; None at the end."""
        parts: list[str] = []
        while True:
            try:
                text = input(("... " if parts else "> ") if self._terminal else "")
            except EOFError:
                if self._terminal:
                    print()
                return "\n".join(parts).strip() or None if parts else None
            except KeyboardInterrupt:
                parts.clear()
                say("\n(Ctrl-D ends the conversation)")
                continue
            except UnicodeDecodeError:
                raise ConfigError("the input is not UTF-8 text") from None
            if text.endswith("\\"):
                parts.append(text[:-1])
                continue
            return "\n".join([*parts, text]).strip()

    def _command(self, line: str) -> bool:
        """Carry out a line that begins with a slash; False to end."""
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit", "/q"):
            return False
        if word == "/reset":
            self.messages.clear()
            say("(forgotten)")
        elif word == "/system":
            self.system = rest.strip() or None
            self.messages.clear()
            say("(a new conversation under that system message)" if self.system else "(a new conversation without one)")
        elif word == "/help":
            say(HELP)
        else:
            say(f"there is no {word}; /help lists what there is")
        return True

    def _turn(self, said: str) -> None:
        """One question and its answer."""
        self.messages.append({"role": "user", "content": said})
        head = [{"role": "system", "content": self.system}] if self.system else []
        pieces: list[str] = []
        try:
            with interruptible() as stopped, contextlib.closing(self.answer([*head, *self.messages])) as answer:
                for piece in answer:
                    pieces.append(piece)
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                    if stopped():
                        break
            if stopped():
                say(" (stopped)")
                if not self._terminal:
                    raise typer.Exit(130)
        except EngineError as error:
            self.failed = True
            if any(pieces):
                print(flush=True)
            complain(f"{error}{_advice(error)}")
            if not any(pieces):
                self.messages.pop()
                return
        print(flush=True)
        self.messages.append({"role": "assistant", "content": "".join(pieces)})


def _advice(error: EngineError) -> str:
    too_long: Any = isinstance(error, RequestError) and error.code == "context_length_exceeded"
    return "; /reset starts afresh" if too_long else ""
