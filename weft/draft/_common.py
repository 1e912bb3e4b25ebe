"""What drafts share: guesses in a chain, and what one with weights of its own learns while it serves.

It learns from what verification computed anyway (004-101).

Every verified guess, up to the first that fell, leaves the target's law at its place.  A pupil keeps the newest `KEPT` proposals
of one tenant, and takes one step of Adam at a time, down the distance of total variation between the two laws:

    TV = 1/2 sum_x |q(x) - p(x)|        dTV/dz_x = 1/2 q(x) (sign(q(x) - p(x)) - sum_y q(y) sign(q(y) - p(y)))

for logits z of q: the chance that a guess falls is TV.  Which lessons a step takes is a function of their order alone.

Legend.  P: lessons.  K: guesses of one.  R: places, P * K at most.  V: vocabulary.  W: width of the target's states.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weft.slots import Ask, Forward, Guesses

if TYPE_CHECKING:
    from torch import Tensor

    from weft.slots import Target

KEPT = 256
"""Lessons that are remembered."""
LESSONS = 16
"""Of a step: half of them the newest, the others spread over all that are kept."""
TOKENS = 64
"""Likeliest tokens of a law that are kept; and tokens of a place that a step is taken for."""
MEMORY = 0.9
"""Of what was gained in earlier steps."""
RATE, DECAYS, EPS = 3e-4, (0.9, 0.99), 1e-8
"""Adam's."""


def chained(
    asks: Sequence[Ask],
    run: Forward,
    most: Sequence[int],
    acts: dict[str, int],
    sure: Callable[[Any], Sequence[bool]] | None = None,
) -> list[Guesses]:
    """Guess after guess, a pass for all that still go on.  most: of each ask.  acts: in which `draft_rows` is counted.

    sure: of logits [rows, vocab], which rows are guessed from; the others end there.
    """
    tokens: list[list[int]] = [[] for _ in asks]
    laws: list[list[Any]] = [[] for _ in asks]
    rows: list[tuple[int, list[int]]] = [(i, [int(ask.context[-1])]) for i, ask in enumerate(asks) if most[i] > 0]
    while rows:
        logits = run(rows)
        acts["draft_rows"] += len(rows)
        if sure is not None and not all(kept := sure(logits)):
            at = [n for n, one in enumerate(kept) if one]
            rows, logits = [rows[n] for n in at], logits[at]
        drawn = run.draw([(i, tokens[i]) for i, _ in rows], logits)
        going = []
        for (i, _), (token, law) in zip(rows, drawn, strict=True):
            if token < 0:
                continue
            tokens[i].append(token)
            laws[i].append(law)
            if len(tokens[i]) < most[i] and token not in asks[i].sampling.stop_ids:
                going.append((i, [token]))
        rows = going
    return proposals(asks, tokens, laws)


def proposals(asks: Sequence[Ask], tokens: Sequence[list[int]], laws: Sequence[list[Any]]) -> list[Guesses]:
    """Of each ask, with the laws that its guesses were drawn from where they are weighed."""
    import torch

    return [
        Guesses(t, torch.stack(law) if law and ask.independent else None)
        for ask, t, law in zip(asks, tokens, laws, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Lesson:
    """start: the state that the guesses were made from.  tokens: the newest, and the guesses that stood.  ids, p [k, TOKENS]: the
    target's law behind each of these."""

    start: Tensor
    tokens: tuple[int, ...]
    ids: Tensor
    p: Tensor

    @classmethod
    def of(cls, start: Tensor, tokens: Sequence[int], logits: Tensor) -> Lesson:
        law = logits.float().softmax(-1)
        p, ids = law.topk(min(TOKENS, law.shape[-1]), -1)
        return cls(start, tuple(tokens), ids, p)


@dataclass(slots=True)
class Pupil:
    """Weights of its own that learn, beginning as those given.  fresh: lessons since the last step.  gain: how much
    nearer than those given they have come to the target's law, at places that they had not learnt from; older ones fade."""

    given: Mapping[str, Any]
    weights: dict[str, Any]
    first: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] = field(default_factory=dict)
    kept: deque[Lesson] = field(default_factory=lambda: deque(maxlen=KEPT))
    fresh: int = 0
    steps: int = 0
    gain: float = 0.0

    @classmethod
    def like(cls, weights: Mapping[str, Any], learning: Sequence[str]) -> Pupil:
        import torch

        with torch.inference_mode(False):
            mine = {k: w.clone().requires_grad_() if k in learning else w for k, w in weights.items()}
            zeros = {k: torch.zeros_like(mine[k]) for k in learning}
            return cls(weights, mine, zeros, {k: z.clone() for k, z in zeros.items()})

    def add(self, lesson: Lesson) -> None:
        self.kept.append(lesson)
        self.fresh += 1

    def chosen(self) -> list[Lesson]:
        """Of the next step."""
        newest = min(LESSONS // 2, len(self.kept))
        older, rest = len(self.kept) - newest, LESSONS - newest
        spread = range(older) if older <= rest else [(2 * i + 1) * older // (2 * rest) for i in range(rest)]
        return [*(self.kept[i] for i in spread), *(self.kept[older + i] for i in range(newest))]

    def learn(self, target: Target, run: Callable[[Mapping[str, Any], Tensor, Tensor], Tensor]) -> None:
        """One step.  run: from weights, starts [P, D] and the tokens' embeddings [P, K, W] to what the target's head makes logits
        of, [P, K, W].  The newest lessons, from which nothing was learnt yet, say how far the weights have come."""
        import torch

        some = self.chosen()
        most = max(len(one.tokens) for one in some)
        with torch.inference_mode(False), torch.enable_grad():
            tokens = [[*one.tokens, *[0] * (most - len(one.tokens))] for one in some]
            embedded = target.embed([t for row in tokens for t in row]).clone().view(len(some), most, -1)
            starts = torch.stack([one.start.clone() for one in some])
            at = [n * most + i for n, one in enumerate(some) for i in range(len(one.tokens))]
            out_RW = run(self.weights, starts, embedded).flatten(0, 1)[at]
            ids, p = (torch.cat([getattr(one, name).clone() for one in some]) for name in ("ids", "p"))
            with torch.no_grad():
                q = logits_of(out_RW.detach(), target).softmax(-1)
                p = torch.zeros_like(q).scatter_(1, ids, p)
                still = logits_of(run(self.given, starts, embedded).flatten(0, 1)[at], target).softmax(-1)
                new = slice(sum(len(one.tokens) for one in some[: -min(self.fresh, len(some))]), None)
                gain = distances(still[new], p[new]).mean() - distances(q[new], p[new]).mean()
                self.gain += (1 - MEMORY) * (float(gain) - self.gain)
                slope = pull(q, p, target) / len(at)
            names = list(self.first)
            grads = torch.autograd.grad(out_RW, [self.weights[k] for k in names], slope)
            with torch.no_grad():
                self._adam(dict(zip(names, grads, strict=True)))
        self.fresh = 0

    @property
    def serving(self) -> Mapping[str, Any]:
        """Its own weights while they guess better than those that were given, else those."""
        return self.weights if self.gain > 0 else self.given

    def _adam(self, grads: Mapping[str, Tensor]) -> None:
        self.steps += 1
        a, b = DECAYS
        for name, g in grads.items():
            m = self.first[name].mul_(a).add_(g, alpha=1 - a)
            v = self.second[name].mul_(b).addcmul_(g, g, value=1 - b)
            down = (v / (1 - b**self.steps)).sqrt_().add_(EPS)
            self.weights[name].addcdiv_(m, down, value=-RATE / (1 - a**self.steps))


def logits_of(out: Tensor, target: Target) -> Tensor:
    """The target's head begins with a norm, whose scale is given back: how sure a head is stands in the length of its output."""
    found: Tensor = target.predict(out) * out.square().mean(-1, keepdim=True).sqrt()
    return found


def slopes(q_RV: Tensor, p_RV: Tensor) -> Tensor:
    """dTV/dz at every place."""
    sign = (q_RV - p_RV).sign()
    return 0.5 * q_RV * (sign - (q_RV * sign).sum(-1, keepdim=True))


def distances(q_RV: Tensor, p_RV: Tensor) -> Tensor:
    """TV at every place."""
    return 0.5 * (q_RV - p_RV).abs().sum(-1)


def pull(q_RV: Tensor, p_RV: Tensor, target: Target) -> Tensor:
    """dTV/d out [R, W]: the slopes of each place's `TOKENS` steepest tokens, through the rows that the head has for them."""
    import torch

    slope = slopes(q_RV, p_RV)
    steep = slope.abs().topk(min(TOKENS, slope.shape[1]), -1).indices
    union, where = steep.unique(return_inverse=True)
    few = torch.zeros(len(slope), len(union), device=slope.device).scatter_(1, where, slope.gather(1, steep))
    return few @ target.rows(union.tolist())
