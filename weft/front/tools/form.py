"""`Form`: how a family of models writes calls, as data: what is written with it, and what a grammar is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Call = tuple[str, Mapping[str, Any]]
"""Name and arguments."""


def to_json(value: Any) -> str:
    """JSON as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a family writes calls: `open`, each as `call` with NAME and ARGUMENTS filled in, `between` them, and `close`.

    tag: calls are rather written in bare text, as `<function=NAME>` with its parameters between this tag and its end; `call` is
    then for what bare text cannot say.  several: whether more than one may stand in an answer.
    """

    call: str
    open: str = ""
    between: str = "\n"
    close: str = ""
    tag: str = ""
    several: bool = True

    @property
    def parts(self) -> tuple[str, str, str]:
        """What stands before the name, between it and the arguments, and behind them."""
        head, _, rest = self.call.partition("NAME")
        middle, _, tail = rest.partition("ARGUMENTS")
        return head, middle, tail

    def written(self, calls: Sequence[Call]) -> str:
        """The text of some calls."""
        said = (self._bare(*call) if self.tag else self._json(*call) for call in calls)
        return self.open + self.between.join(said) + self.close

    def _json(self, name: str, given: Mapping[str, Any]) -> str:
        head, middle, tail = self.parts
        return head + name + middle + to_json(given) + tail

    def _bare(self, name: str, given: Mapping[str, Any]) -> str:
        values = {key: value if isinstance(value, str) else to_json(value) for key, value in given.items()}
        parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        return f"<{self.tag}>\n<function={name}>\n{parameters}</function>\n</{self.tag}>"
