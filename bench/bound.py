"""How many guesses any rule could accept, and how many each does: the slot's yardstick, on the bundled model and its draft.

Hu et al., Towards Optimal Multi-draft Speculative Decoding, arXiv:2502.18779 (000-16): with n guesses for one place, drawn
together from Q, no rule that keeps the target's law p accepts more often than 1 + min over sets H of p(H) - Q(all guesses in
H).  For draws that are alike, Q = q(H)^n, the best H is a beginning of the tokens in the order of q / p.

What the rules accept follows from the laws as well.  Of rejection none stands with the product of 1 - sum of min(p_i, q_i), where
p_1 = p and p_(i+1) = max(p_i - q_i, 0) normalised; of k-SEQ with (1 - b)^k.  A token that is drawn in place of all is none of
the guesses under either.  Only what was drawn without replacement has q_i that hang on the draws before: there the mean is taken
over draws that fell.

python -m bench.bound [--contexts N] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import RESULTS, machine, write
from weft.accept.spectr import factor, overlap
from weft.core import noise
from weft.slots import Accept

Floats = np.ndarray[Any, np.dtype[np.float64]]
KS = (1, 2, 4)
TEMPERATURES = (0.8, 1.0)
DRAWN, START = 64, 16
"""Draws without replacement at each place; tokens of prose before the first place."""
CONTEXTS = 128
OUT = RESULTS / "accept-bound.json"


def bound(p: Floats, q: Floats, n: int) -> float:
    """The best acceptance with n guesses drawn alike from q; p, q over the same tokens."""
    order = np.argsort(-np.divide(q, p, out=np.full_like(q, np.inf), where=p > 0), kind="stable")
    inside_p, inside_q = np.cumsum(p[order]), np.cumsum(q[order])
    return float(1.0 + min(0.0, (inside_p - inside_q**n).min()))


class Place:
    """One place with its guesses, as the slot `accept` sees it."""

    def __init__(self, guesses: Sequence[int], laws: Sequence[Floats], p: Floats, seed: int) -> None:
        self.guesses: Sequence[int] = list(guesses)
        self.parents: Sequence[int] = [-1] * len(guesses)
        self.laws: Any = torch.from_numpy(np.stack(laws))
        self._p, self._seed = p, seed

    def winner(self, row: int) -> int:
        return 0

    def law(self, row: int) -> tuple[Any, Floats]:
        return np.arange(len(self._p)), self._p

    def warm(self, row: int) -> tuple[Any, Floats]:
        return self.law(row)

    def uniform(self, row: int, token: int, salt: int) -> float:
        return noise.uniform(noise.side_seed(self._seed, salt), 0, token)


def alike(q: Floats, k: int, rng: np.random.Generator) -> tuple[list[int], list[Floats]]:
    return rng.choice(len(q), k, p=q).tolist(), [q] * k


def apart(q: Floats, k: int, rng: np.random.Generator) -> tuple[list[int], list[Floats]]:
    """Draws without replacement, and the law of each given those before it."""
    tokens: list[int] = []
    laws: list[Floats] = []
    left = q
    for _ in range(min(k, int((q > 0).sum()))):
        left = left / left.sum()
        laws.append(left)
        tokens.append(int(rng.choice(len(q), p=left)))
        left = np.where(np.arange(len(q)) == tokens[-1], 0.0, left)
    return tokens, laws


DRAWS = {"alike": alike, "without replacement": apart}


def accepted(rule: Accept, p: Floats, q: Floats, k: int, draws: str, seeds: int, rng: np.random.Generator) -> float:
    """Share of so many draws of which a guess stands, by the rule itself."""
    stood = 0
    for seed in range(seeds):
        tokens, laws = DRAWS[draws](q, k, rng)
        stood += bool(rule.accept(Place(tokens, laws, p, int(rng.integers(1 << 60)) + seed))[1])
    return stood / seeds


def k_seq(p: Floats, q: Floats, k: int, rng: np.random.Generator) -> float:
    """The chance that one of k guesses stands under `accept=spectr`."""
    return 1.0 - (1.0 - overlap(p, q, factor(p, q, k))[1]) ** k


def rejection(p: Floats, q: Floats, k: int, rng: np.random.Generator) -> float:
    """The same under `accept=rejection`, of guesses drawn alike."""
    none = 1.0
    for _ in range(k):
        none *= 1.0 - float(np.minimum(p, q).sum())
        p = _left(p, q)
    return 1.0 - none


def without(p: Floats, q: Floats, k: int, rng: np.random.Generator) -> float:
    """And of guesses drawn without replacement: the mean over draws of those that fell, each by its chance of falling."""
    found = []
    for _ in range(DRAWN if k > 1 else 1):
        none, own, law = 1.0, p, q
        for at in range(min(k, int((q > 0).sum()))):
            none *= 1.0 - float(np.minimum(own, law).sum())
            if none <= 0.0 or at == k - 1:
                break
            fell = (law - own).clip(min=0.0).cumsum()
            token = min(int(np.searchsorted(fell, rng.random() * fell[-1], side="right")), len(q) - 1)
            own, law = _left(own, law), np.where(np.arange(len(q)) == token, 0.0, law)
            law = law / law.sum()
        found.append(1.0 - none)
    return float(np.mean(found))


def _left(p: Floats, q: Floats) -> Floats:
    """What is left of a law when a guess of another one fell; itself where nothing is, since then none falls."""
    rest = (p - q).clip(min=0.0)
    total = float(rest.sum())
    return rest / total if total > 0 else p


RULES: dict[str, Callable[[Floats, Floats, int, np.random.Generator], float]] = {
    "spectr": k_seq,
    "rejection": rejection,
    "rejection, without replacement": without,
}


def pairs(contexts: int, temperature: float) -> list[tuple[Floats, Floats]]:
    """(target's law, draft's law) at so many places of real prose, by the models that ship with weft."""
    from bench.texts import PARAGRAPHS
    from weft.exec.build import EngineConfig, build, prepare
    from weft.fidelity.measure import Path as Along
    from weft.front.tokenizer import Tokenizer
    from weft.hub import resolve, resolve_draft

    text = Tokenizer.load(resolve(None)).encode(" ".join(PARAGRAPHS), add_special=False)[: START + contexts]
    found = []
    for folder in (resolve(None), resolve_draft("bundled")):
        runtime = build(prepare(EngineConfig(model=folder, dtype="float32", device="cpu", threads=1)))
        (along,) = Along(runtime).laws([(text[:START], text[START:])])
        found.append([torch.softmax(along[i].double() / temperature, -1).numpy() for i in sorted(along)])
    return [(p / p.sum(), q / q.sum()) for p, q in zip(*found, strict=True)]


def measure(contexts: int) -> list[dict[str, Any]]:
    rows = []
    for temperature in TEMPERATURES:
        laws = pairs(contexts, temperature)
        for k in KS:
            row: dict[str, Any] = {"temperature": temperature, "guesses": k, "contexts": len(laws)}
            row["bound"] = float(np.mean([bound(p, q, k) for p, q in laws]))
            for name, rule in RULES.items():
                rng = np.random.default_rng(k)
                row[name] = float(np.mean([rule(p, q, k, rng) for p, q in laws]))
            rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    names = ["bound", *RULES]
    lines = ["| temperature | guesses | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for row in rows:
        cells = " | ".join(f"{row[name]:.3f}" for name in names)
        lines.append(f"| {row['temperature']} | {row['guesses']} | {cells} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bound")
    parser.add_argument("--contexts", type=int, default=CONTEXTS, help="places of prose")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument(
        "--out", type=Path, help=f"file of the result (bench/results/{OUT.name}, if {CONTEXTS} places are asked for)"
    )
    given = parser.parse_args(argv)
    rows = measure(given.contexts)
    out = given.out or (OUT if given.contexts == CONTEXTS else None)
    if out is not None:
        write(out, {"command": "python -m bench.bound", "machine": machine(), "rows": rows})
    print(json.dumps(rows, indent=1) if given.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
