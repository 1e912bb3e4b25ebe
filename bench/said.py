"""Text that the bundled model wrote: what drafts that read a text beforehand are given, as it is how the target writes."""

from __future__ import annotations

from bench.contender import ROOT
from weft import LLM, SamplingParams

FILE = ROOT / ".cache" / "said.txt"
BEGINNINGS = (
    "It was", "She had never", "The old man", "In the morning", "When he", "There was a", "My dear", "The ship", "Nobody knew",
    "At the end of", "Every year", "The doctor", "They walked", "I remember", "His mother", "On the table",
)  # fmt: skip
EACH, TOKENS = 16, 256
"""Answers to each beginning, and tokens of each: 65,536 tokens."""


def said() -> str:
    """Path of the text, which is written where it is not there yet; none of it begins as a benchmark's prompts do."""
    if not FILE.is_file():
        FILE.parent.mkdir(parents=True, exist_ok=True)
        law = SamplingParams(n=EACH, temperature=0.8, top_p=0.95, max_tokens=TOKENS, seed=1, ignore_eos=True)
        with LLM(device="cpu", max_model_len=2 * TOKENS) as llm:
            found = [text.text for out in llm.generate(list(BEGINNINGS), law) for text in out.outputs]
        FILE.write_text("\n\n".join(found), encoding="utf8")
    return str(FILE)
