"""The texts that the bundled model was trained on, and its tokenizer.

A data folder holds
    text/novels/*.txt                      public-domain novels, UTF-8
    text/wikitext-2/valid.txt              WikiText-2
    text/tinystories/*.txt                 children's stories, with <|endoftext|> between them where the file marks it
    eval/gsm8k/train.jsonl                 one {"question": ..., "answer": ...} a line
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HELD_OUT = ("Stevenson_Treasure_1883.txt", "Doyle_Hound_1902.txt")
"""Novels that are never trained on; the model is judged by them."""

STORY_FILES = ("tinystories_v1_train_head.txt", "tinystories_v2_gpt4_1727stories.txt")
SHORTEST_STORY = 200
"""Characters; anything shorter is a fragment."""

END_OF_TEXT = "<|endoftext|>"
END = "<|end|>"
ASSISTANT = "<|assistant|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    "<|system|>",
    "<|user|>",
    ASSISTANT,
    END,
    "<|tool|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    PAD,
)
"""Ids 0 to 9, in this order."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY = 4096
SHARD_CHARS = 10_000
"""Characters that the tokenizer's trainer is given at a time."""


class Corpus:
    """Reads a data folder.  Raises FileNotFoundError naming the first file that is missing."""

    def __init__(self, data: Path) -> None:
        self.data = data
        for name in ("text/wikitext-2/valid.txt", "eval/gsm8k/train.jsonl", *(f"text/novels/{f}" for f in HELD_OUT)):
            if not (data / name).is_file():
                raise FileNotFoundError(f"{data / name}: the data folder lacks this file")

    def novels(self) -> Iterator[str]:
        for path in sorted((self.data / "text" / "novels").glob("*.txt")):
            if path.name not in HELD_OUT:
                yield read(path).replace("\r\n", "\n")

    def held_out(self) -> Iterator[str]:
        for name in HELD_OUT:
            yield read(self.data / "text" / "novels" / name)

    def encyclopedia(self) -> str:
        return read(self.data / "text" / "wikitext-2" / "valid.txt")

    def stories(self) -> Iterator[str]:
        for name in STORY_FILES:
            for story in read(self.data / "text" / "tinystories" / name).split(END_OF_TEXT):
                if len(story.strip()) > SHORTEST_STORY:
                    yield story.strip()

    def maths(self) -> Iterator[tuple[str, str]]:
        """(question, worked answer)."""
        for line in read(self.data / "eval" / "gsm8k" / "train.jsonl").splitlines():
            task = json.loads(line)
            yield task["question"], task["answer"]

    def shards(self) -> Iterator[str]:
        """Everything that the tokenizer is trained on."""
        for text in (*self.novels(), self.encyclopedia()):
            for start in range(0, len(text), SHARD_CHARS):
                yield text[start : start + SHARD_CHARS]
        yield from self.stories()
        for question, answer in self.maths():
            yield f"{question}\n{answer}"


def read(path: Path) -> str:
    return path.read_text(encoding="utf8", errors="ignore")


def train_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4096 entries over GPT-2's pre-tokenization, with the special tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=3,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.shards(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PAD
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
