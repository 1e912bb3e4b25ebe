"""What rules share that let a guess stand although the race selects another token."""

from __future__ import annotations

from collections.abc import Callable

from weft.slots import Verify


def lenient(view: Verify, stands: Callable[[int, int], bool], acts: dict[str, int]) -> tuple[list[int], list[int]]:
    """(tokens that stand, accepted guesses): a guess stands that the race selects, else the first of its place where `stands`.

    stands: of (row, guess).  acts: in which `raced`, `let` and `fell` are counted: guesses of either kind, and places at which
    none stood.
    """
    tokens, path, at = list[int](), list[int](), -1
    while True:
        row = 1 + at
        found = [j for j, parent in enumerate(view.parents) if parent == at]
        winner = view.winner(row)
        hit = next((j for j in found if view.guesses[j] == winner), None)
        if hit is not None:
            acts["raced"] += 1
        elif found and stands(row, view.guesses[found[0]]):
            hit = found[0]
            acts["let"] += 1
        else:
            acts["fell"] += bool(found)
            return [*tokens, winner], path
        tokens.append(view.guesses[hit])
        path.append(hit)
        at = hit
