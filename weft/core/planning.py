"""A plan while it is made: the budgets that are left, the works so far, and what executors must be told beside them."""

from __future__ import annotations

from dataclasses import dataclass, field

from weft.config import Limits
from weft.core.request import Request
from weft.slots import StepView
from weft.types import Enter, Grant, Keep, KVOp, Mask, Plan, Work


@dataclass(slots=True)
class Planning:
    """view: what policies see.  closed: nobody is admitted any more in this step."""

    view: StepView
    limits: Limits
    samples_left: int
    bytes_left: float
    works: list[Work] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    """The request of each work."""
    ops: list[KVOp] = field(default_factory=list)
    loading: list[Request] = field(default_factory=list)
    """Requests that the plan loads blocks for."""
    fetch: tuple[int, ...] = ()
    after: list[KVOp] = field(default_factory=list)
    planned: set[int] = field(default_factory=set)
    """Requests with any work."""
    advanced: set[int] = field(default_factory=set)
    """Requests with rows of the target model."""
    sampled: dict[int, int] = field(default_factory=dict)
    """Requests that get a token, and how many guesses are verified with it."""
    preempted: list[Request] = field(default_factory=list)
    closed: bool = False
    blocks: int = 0
    samples: int = 0

    @classmethod
    def begin(cls, view: StepView, limits: Limits) -> Planning:
        return cls(view, limits, limits.max_samples, float(limits.work_bytes or "inf"))

    def fits(self, rows: int, samples: int) -> bool:
        """Whether so many more rows, and rows of logits, stay within every budget."""
        limits = self.limits
        return (
            rows <= self.view.rows_left
            and samples <= self.samples_left
            and (not limits.work_bytes or rows * limits.row_bytes + samples * limits.sample_bytes <= self.bytes_left)
        )

    def chunk(self, r: Request, start: int, stop: int) -> tuple[int, int, int]:
        """(stop, prompt rows, samples) of the longest chunk of [start, stop) that fits; its stop is `start` where none does."""
        end = len(r.context)
        prompt_rows = r.prompt_rows(start, stop) if start < r.prompt else 0
        samples = prompt_rows + (stop == end)
        if self.fits(stop - start, samples):
            return stop, prompt_rows, samples
        low, high = start, stop - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits(middle - start, r.prompt_rows(start, middle)):
                low = middle
            else:
                high = middle - 1
        prompt_rows = r.prompt_rows(start, low)
        return low, prompt_rows, prompt_rows

    def beyond(self, r: Request, start: int, samples: int, guesses: int) -> tuple[int, int]:
        """As `Request.beyond`, of rows from `start` to the context's end; nobody who runs goes without a row for soft tokens."""
        ahead, soft = r.beyond(start, guesses, self.limits)
        others = max(0, self.view.running - len(self.planned) - 1)
        rows = len(r.context) - start + guesses + ahead
        return (ahead, soft) if not soft or self.fits(rows + others, samples + guesses + others) else (0, 0)

    def write(
        self, r: Request, start: int, stop: int, *, guesses: int = 0, layers: tuple[int, int] | None = None,
        prompt_rows: int = 0, samples: int = 0, final: bool = True, ahead: int = 0, soft: int = 0,
    ) -> None:  # fmt: skip
        """Add target rows [start, stop) of `r` and its first `guesses` guesses.  final: they pass the last layer.

        samples: rows of logits but for those of guesses.
        """
        context = r.context
        tokens = tuple(context[start:stop]) if not guesses else (*context[start:stop], *r.draft[:guesses])
        parents = r.parents[:guesses]
        work = Work(
            request=r.rid,
            rows=((start, stop + guesses),),
            tokens=tokens,
            layers=layers,
            mask=Mask.TREE if parents else Mask.CAUSAL,
            keep=Keep.ACCEPT if guesses else Keep.APPEND,
            link=r.link,
            guesses=guesses,
            parents=parents,
            samples=final and stop == len(context),
            output=len(r.output),
            prompt_rows=prompt_rows,
            ahead=ahead,
            want=-1 if r.pace is None else r.pace.want,
            soft=soft,
        )
        self.add(r, work, samples + guesses)
        self.advanced.add(r.rid)
        if work.samples:
            self.sampled[r.rid] = guesses
        if start >= r.prompt and len(context) - start <= 1:  # as Request.decoding
            self.view.decode_rows += work.passing
        else:
            self.view.prompt_rows += len(tokens)

    def next(self, r: Request, start: int) -> None:
        """Add the row of the newest token of `r`, which gives the next one: as `write`, of what is so in nearly every step."""
        work = Work(
            request=r.rid, rows=((start, start + 1),), tokens=(r.context[start],), samples=True, output=len(r.output),
            want=-1 if r.pace is None else r.pace.want,
        )  # fmt: skip
        self.add(r, work, 1)
        self.advanced.add(r.rid)
        self.sampled[r.rid] = 0
        self.view.decode_rows += 1

    def beside(self, r: Request, work: Work) -> None:
        """Add rows of another model, which has a budget and a workspace of its own."""
        self.works.append(work)
        self.requests.append(r)
        self.planned.add(r.rid)

    def add(self, r: Request, work: Work, samples: int) -> None:
        rows, limits = work.passing, self.limits
        self.beside(r, work)
        self.view.rows_left -= rows
        self.samples_left -= samples
        self.samples += samples
        if limits.work_bytes:
            self.bytes_left -= rows * limits.row_bytes + samples * limits.sample_bytes

    def finish(self, step: int, leave: list[int], forked: list[Request]) -> Plan:
        """The plan, with an Enter for each request that the executor does not know and a Grant for each table that changed.

        forked: sequences that inherit state, which their source may not have any more in the next plan.
        """
        enter: list[Enter] = []
        grants: list[Grant] = []
        for r in (*self.requests, *self.loading):
            r.in_flight += 1
        for r in [*(r for r in forked if r.source >= 0), *self.requests]:
            if not r.started:
                r.started = True
                for t in r.tables:
                    t.dirty = 0
                enter.append(
                    Enter(
                        request=r.rid, tokens=tuple(r.context), prompt=r.prompt, sampling=r.sampling, seed=r.seed,
                        entries=tuple(t.count for t in r.tables), spans=r.spans, vectors=r.vectors, techniques=r.spec.techniques,
                        source=r.source, forced=r.spec.forced, grammar=r.spec.grammar, given=tuple(r.given),
                        salt=r.tenant,
                    )
                )  # fmt: skip
                r.source = -1
            for g, t in enumerate(r.tables):
                if t.dirty is not None:
                    grants.append(Grant(r.rid, g, t.dirty, tuple(t.blocks[t.dirty :]), t.first))
                    t.dirty = None
        rows = self.limits.max_rows - self.view.rows_left
        return Plan(
            step=step, works=tuple(self.works), enter=tuple(enter), leave=tuple(leave), grants=tuple(grants),
            kv=tuple(self.ops), rows=rows, samples=self.samples, blocks=self.blocks,
            work_bytes=rows * self.limits.row_bytes + self.samples * self.limits.sample_bytes,
            fetch=self.fetch, after=tuple(self.after),
        )  # fmt: skip
