"""The sampling flags of `weft generate` and `weft chat`: a dataclass whose fields are options, as `EngineFlags` is."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from weft.front.text import ModelText
    from weft.sampling import SamplingParams


def _option(name: str, help: str, metavar: str = "X") -> Any:
    return typer.Option(name, help=help, metavar=metavar, rich_help_panel="Sampling", show_default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFlags:
    """None means the model's own default (generation_config.json), where it has one.  See `weft.SamplingParams`."""

    max_tokens: Annotated[
        int | None,
        _option("--max-tokens", "At most so many tokens. (chat: to the end of the context; generate: 256)", "N"),
    ] = None
    temperature: Annotated[float | None, _option("--temperature", "0 is greedy.")] = None
    top_p: Annotated[float | None, _option("--top-p", "Draw from the smallest set that reaches this probability.")] = (
        None
    )
    top_k: Annotated[int | None, _option("--top-k", "Draw from the K likeliest; 0 is all.", "N")] = None
    min_p: Annotated[float | None, _option("--min-p", "Drop tokens below this share of the likeliest.")] = None
    repetition_penalty: Annotated[
        float | None, _option("--repetition-penalty", "Above 1 makes repeating less likely.")
    ] = None
    presence_penalty: Annotated[float | None, _option("--presence-penalty", "OpenAI's, from -2 to 2.")] = None
    frequency_penalty: Annotated[float | None, _option("--frequency-penalty", "OpenAI's, from -2 to 2.")] = None
    seed: Annotated[int | None, _option("--seed", "Same seed, same tokens.", "N")] = None
    stop: Annotated[list[str] | None, _option("--stop", "End before this text; may be repeated.", "TEXT")] = None

    def given(self) -> dict[str, Any]:
        """What the user said, by the names of `SamplingParams`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value not in (None, [])}

    def params(self, text: ModelText, **more: Any) -> SamplingParams:
        """These flags over the model's defaults; without --max-tokens, the rest of the context.  Raises RequestError."""
        return text.default_params(**{"max_tokens": None, **self.given(), **more})
