"""From a model and a few flags to a running engine: first the memory plan, then, and only then, the allocations.

setup   = prepare(EngineConfig(model=folder))      # reads config.json; imports no torch, allocates nothing
runtime = build(setup)                             # loads weights, makes the pool, the engine and its executor
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weft.config import Limits, Stack, Stacks, build_stack
from weft.core.engine import Engine
from weft.core.ledger import MemoryPlan, plan_memory
from weft.core.tiers import Exchange, memory_bytes, record_bytes, records
from weft.errors import CapacityError, ConfigError
from weft.exec import choices
from weft.exec.drafts import MAX_GUESSES, model_bytes, own_bytes, stream, thread_shares
from weft.exec.host import cpu_count, parse_size
from weft.exec.vocabulary import VocabularyShelf
from weft.hub import resolve_draft
from weft.models import load_config
from weft.models.families import read
from weft.models.formats import WeightFormat
from weft.models.layout import weights_bytes, workspace_bytes
from weft.models.spec import DecoderSpec, all_groups, dtype_bytes
from weft.ops.choice import Choice, choose
from weft.recipe import merged
from weft.recipe import read as read_recipe
from weft.registry import Part, load_plugin, parse
from weft.slots import Offload, Vocabulary
from weft.types import GroupKind, GroupSpec, SharedKV

if TYPE_CHECKING:
    from weft.exec.adapters import AdapterBook
    from weft.exec.kvpool import KVPool
    from weft.exec.runner import TorchExecutor
    from weft.models.decoder import Decoder

GUESSED_BYTES = 128 << 20
"""Logits of guesses that a step has room for, beside those of the sequences themselves."""
SMALL_BYTES = 64 << 20
"""Below this much weight a step's operations are too short to be worth handing to a second thread."""
Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What a user decides; everything has a default but the model.

    model       a checkpoint's folder, or a config.json's contents (then load must be "random")
    dtype       auto, float32, bfloat16 or float16.  auto: float32 on a CPU for models below 1 GiB, else the checkpoint's
    device      auto, cpu or cuda
    memory_bytes    everything that weft may take, or None
    threads     CPU threads; None for as many as the machine lets this process use, but one for a very small model
    invariant   results independent of batch, chunks and cache to the last bit; None: yes in float32 on a CPU
    share       whether requests share cached prefixes
    techniques  as 'slot=name(args)'
    lora        adapters to load before the first request, as "NAME=FOLDER"
    max_loras   adapters that may be loaded at once
    lora_memory bytes set aside for them; None sets nothing aside, and they may take what the plan leaves over
    ops         auto, ref or cpu (weft's own kernels).  isa: auto, amx, avx512_bf16, avx512_vnni,
                avx512, avx2 or portable
    weights     auto (as they are), float, int8, or int4, with inputs that share a scale as in int4:128 (`WeightFormat.parse`)
    activations float, or int8: inputs of products with weights of few bits are rounded too, which is faster and less exact
    draft_control   on or off: guess only as far ahead as pays
    kv          auto (as the model's dtype), float32, bfloat16, or int8, which is the technique kv.store=int8
    """

    model: Path | Mapping[str, Any]
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    memory_bytes: int | None = None
    threads: int | None = None
    max_num_seqs: int = 64
    max_rows: int = 512
    block_tokens: int = 16
    load: str = "auto"
    seed: int = 0
    invariant: bool | None = None
    share: bool = True
    techniques: Sequence[str | Part] = ()
    lora: Sequence[str] = ()
    max_loras: int = 8
    lora_memory: int | None = None
    ops: str = "auto"
    isa: str = "auto"
    weights: str = "auto"
    activations: str = "float"
    kv: str = "auto"
    draft_control: str = "on"


USERS_NAMES = {"max_num_batched_tokens": "max_rows", "enable_prefix_caching": "share", "memory": "memory_bytes"}
"""Options by the names that users know from other engines, and the fields of `EngineConfig` that they set."""


def chosen(
    techniques: Sequence[str | Part], recipe: str | Path | None, plugins: Sequence[str | Path]
) -> tuple[Part, ...]:
    """The parts that a user chose: a recipe's, with what was named beside it in their place.  Plugins are loaded first.

    Raises ConfigError.
    """
    for path in plugins:
        load_plugin(path)
    own = [parse(t) if isinstance(t, str) else t for t in techniques]
    return tuple(own if recipe is None else merged(read_recipe(recipe), own))


def engine_config(model: Path | Mapping[str, Any], options: Mapping[str, Any]) -> EngineConfig:
    """An `EngineConfig` from options as users name them; what is None is left to weft.

    memory and lora_memory may be numbers of bytes or text such as "4GiB"; recipe a TOML file; plugins Python files with
    techniques.  Raises ConfigError for a size that cannot be read, and for parts that are unknown.
    """
    given = {USERS_NAMES.get(name, name): value for name, value in options.items() if value is not None}
    given["techniques"] = chosen(given.get("techniques", ()), given.pop("recipe", None), given.pop("plugins", ()))
    for size in ("memory_bytes", "lora_memory"):
        if isinstance(given.get(size), str):
            given[size] = parse_size(given[size])
    if "dtype" in given:
        given["dtype"] = str(given["dtype"])  # a torch.dtype is taken too
    return EngineConfig(model=model, **given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Everything that is decided before anything is allocated.

    kv_dtype: of keys and values without a `kv.store`.  draft: the second model, where the stack asks for one.  ops: who computes
    each model.  formats: of the target's fused weights that are kept in few bits (where the reference operations compute, that
    they are rounded to).  shared: memory in which prompts are handed over between engines.
    """

    config: EngineConfig
    spec: DecoderSpec
    dtype: str
    kv_dtype: str
    device: str
    threads: int
    groups: tuple[GroupSpec, ...]
    block_bytes: int
    limits: Limits
    stack: Stack
    plan: MemoryPlan
    ops: Mapping[str, Choice]
    draft: DecoderSpec | None = None
    formats: Mapping[str, WeightFormat] = field(default_factory=dict)
    shared: SharedKV | None = None

    @property
    def weights_name(self) -> str:
        """Number format of the matrices."""
        return " and ".join(sorted({str(format) for format in self.formats.values()})) or self.dtype

    @property
    def kv_name(self) -> str:
        """How keys and values are stored: a number format, or the part that encodes them."""
        store = next((part for part in self.stack.parts if part.slot == "kv.store"), None)
        return self.kv_dtype if store is None or self.stack.get("kv.store") is None else str(store)

    @property
    def specs(self) -> dict[str, DecoderSpec]:
        """The models by name, the target first."""
        return {"target": self.spec} if self.draft is None else {"target": self.spec, "draft": self.draft}

    def groups_of(self, model: str) -> tuple[GroupSpec, ...]:
        return tuple(g for g in self.groups if g.model == model)

    def require_fit(self) -> None:
        """Raise CapacityError, naming the numbers, where the plan does not fit."""
        if not self.plan.fits:
            raise CapacityError(self.plan.reason)


@dataclass(slots=True)
class Runtime:
    """A built engine.  Letting it go frees it; `close` gives up at once what lies below the KV pool."""

    setup: Setup
    engine: Engine
    executor: TorchExecutor
    decoder: Decoder
    pool: KVPool = field(repr=False)
    draft: Decoder | None = None
    adapters: AdapterBook | None = field(default=None, repr=False)
    words: VocabularyShelf = field(default_factory=VocabularyShelf, repr=False)

    @property
    def decoders(self) -> dict[str, Decoder]:
        """By the names of models in a plan."""
        return {"target": self.decoder} if self.draft is None else {"target": self.decoder, "draft": self.draft}

    def close(self) -> None:
        """End what has a file or a thread; twice does no harm."""
        self.executor.close()


def prepare(config: EngineConfig, *, shared: SharedKV | None = None) -> Setup:
    """Read the checkpoint's shape and divide the memory.  Raises ConfigError; whether the plan fits is in `plan.fits`.
    shared: memory in which prompts are handed over between engines."""
    choices.require(config)
    raw = load_config(config.model) if isinstance(config.model, Path) else dict(config.model)
    if not isinstance(config.model, Path) and config.load != "random":
        raise ConfigError("a bare config has no weights: use --load random")
    spec = read(raw)
    device = choices.device(config.device)
    dtype = choices.choose_dtype(config.dtype, raw, spec, device)
    kv_dtype, techniques = choices.choose_kv(config.kv, dtype, config.techniques, device)
    stack = build_stack(techniques)
    draft = choices.second(stack, spec)
    specs = {"target": spec} if draft is None else {"target": spec, "draft": draft}
    formats = choices.formats(config, spec, raw)
    ops = {
        name: choose(config.ops, config.isa, one, dtype, device, bool(formats) and name == "target")
        for name, one in specs.items()
    }
    if config.weights == "auto" and not ops["target"].panels:
        formats = {}  # the reference operations keep what a checkpoint's few bits stand for
    if config.activations == "int8" and not formats:
        raise ConfigError(
            "--activations int8 goes with weights of few bits on the kernels: say --weights int8 or int4 too"
        )
    groups, block_bytes = all_groups(specs, kv_dtype, config.block_tokens, stack.get("kv.store"))
    layered = bool(stack["schedule"].layered)
    if not layered:
        groups = [g for g in groups if g.kind is not GroupKind.PARKED]
    offload = _offload(stack, shared)
    rows = min(config.max_rows, spec.max_positions)
    samples = max(config.max_num_seqs, min(rows, max(64, stack.tile, _verified(stack, config.max_num_seqs, spec))))
    available = choices.available(device)
    plan = plan_memory(
        weights_bytes=weights_bytes(spec, dtype, ops["target"].panels, formats),
        workspace_bytes=workspace_bytes(spec, stream(ops["target"], dtype), rows, samples, ops["target"].panels),
        groups=groups,
        block_bytes=block_bytes,
        rows=rows,
        max_num_seqs=config.max_num_seqs,
        model_max_len=spec.max_positions,
        available_bytes=available[0],
        available_source=available[1],
        memory_bytes=config.memory_bytes,
        max_model_len=config.max_model_len,
        layered=layered,
        draft_bytes=own_bytes(stack, config.max_num_seqs, spec)
        + (0 if draft is None else model_bytes(draft, ops["draft"], dtype, rows, config.max_num_seqs, stack, spec)),
        ahead=0 if draft is None else 2 * MAX_GUESSES,
        adapters_bytes=config.lora_memory or 0,
        tiers_bytes=0 if offload is None or (shared and not shared.writes) else memory_bytes(offload.tiers),
    )
    if offload is not None:
        records(offload.tiers, record_bytes(groups, block_bytes))
    small = plan.weights_bytes <= SMALL_BYTES
    threads = config.threads or (1 if small else cpu_count().threads)
    limits = Limits(
        max_model_len=plan.max_model_len, max_num_seqs=config.max_num_seqs, max_rows=rows, max_samples=samples,
        max_guesses=MAX_GUESSES,
    )  # fmt: skip
    return Setup(
        config=config, spec=spec, dtype=dtype, kv_dtype=kv_dtype, device=device, threads=threads,
        groups=tuple(groups), block_bytes=block_bytes, limits=limits, stack=stack, plan=plan,
        draft=draft, ops=ops, formats=formats, shared=shared,
    )  # fmt: skip


def _offload(stack: Stack, shared: SharedKV | None) -> Offload | None:
    """What stands in the slot `kv.offload`.  Raises ConfigError."""
    part: Offload | None = stack.get("kv.offload")
    if shared is None:
        return part
    if part is not None:
        raise ConfigError("--roles hand prompts over in the place of kv.offload; leave one of the two out")
    return Exchange(shared)


def _verified(stack: Stack, sequences: int, spec: DecoderSpec) -> int:
    """Rows of logits of a step in which every sequence has its guesses verified, as many as GUESSED_BYTES hold."""
    guesses = sequences * min(MAX_GUESSES, int(stack["draft"].guesses))
    return sequences + min(guesses, GUESSED_BYTES // (spec.vocab * dtype_bytes("float32")))


def build(
    setup: Setup,
    progress: Progress | None = None,
    *,
    like: Runtime | None = None,
    vocabulary: Callable[[], Vocabulary] | None = None,
    vocabulary_of: Callable[[Path], Vocabulary] | None = None,
) -> Runtime:
    """Allocate what the plan says.  Raises CapacityError where it does not fit, ConfigError for a bad checkpoint.

    like: a runtime of the same model and number format, whose weights, adapters and vocabulary are read by this engine too.
    vocabulary: gives what the model's tokens stand for, when a request first asks for a grammar.
    vocabulary_of: the same of the model in a folder, for a draft with a vocabulary of its own.
    """
    setup.require_fit()
    import torch

    from weft.exec.reading import DraftShelf, Read
    from weft.exec.runner import TorchExecutor
    from weft.exec.tiers import life
    from weft.models.decoder import build as build_decoder
    from weft.models.trimmed import trimmed

    # Where the kernels compute, torch's threads would only stand in the way of theirs.
    native = all(choice.panels for choice in setup.ops.values())
    torch.set_num_threads(1 if native else setup.threads)
    config, limits = setup.config, setup.limits
    mine, own = thread_shares(setup.stack, setup.threads)
    dtype = getattr(torch, setup.dtype)
    source: Path | Literal["random"] | Decoder = "random"
    if like is not None:
        source = like.decoder
    elif config.load == "auto" and isinstance(config.model, Path):
        source = config.model
    total = setup.plan.weights_bytes
    decoder = build_decoder(
        setup.spec, source, dtype=dtype, device=setup.device, max_rows=limits.max_rows, max_samples=limits.max_samples,
        groups=setup.groups_of("target"), invariant=config.invariant, seed=config.seed, progress=progress,
        threads=mine, ops=setup.ops["target"].ops, isa=setup.ops["target"].isa, formats=setup.formats,
        activations=config.activations,
    )  # fmt: skip
    adapters = like.adapters if like is not None and like.adapters is not None else _adapters(setup, decoder)
    with adapters.folders():
        words = VocabularyShelf(vocabulary, vocabulary_of) if like is None else like.words
        shelves = {"adapt": adapters, "constrain": words, "draft": DraftShelf(words, Read(decoder))}
        stacks = Stacks(setup.stack, shelves)
    second = None
    if setup.draft is not None:
        second = build_decoder(
            setup.draft, "random" if config.load == "random" else resolve_draft(setup.stack.second or ""), dtype=dtype,
            device=setup.device, max_rows=limits.max_rows, max_samples=max(limits.max_num_seqs, MAX_GUESSES),
            groups=setup.groups_of("draft"), invariant=config.invariant, seed=config.seed + 1,
            progress=None if progress is None else lambda done, all_: progress(total + done, total + all_),
            threads=own, ops=setup.ops["draft"].ops, isa=setup.ops["draft"].isa,
        )  # fmt: skip
        second = trimmed(second, getattr(setup.stack["draft"], "head", ()), own, setup.ops["draft"].isa)
    pool = make_pool(setup)
    shared, exchange = setup.shared, None if setup.shared is None else Exchange(setup.shared)
    engine = Engine(
        setup.groups, setup.plan.kv_blocks, limits, stacks, models=tuple(setup.specs), layers=len(setup.spec.layers),
        vocab=setup.spec.vocab, share=config.share, settings=_settings(setup), reach=reach(setup),
        block_bytes=setup.block_bytes, control=config.draft_control == "on", exchange=exchange,
        life=None if shared is not None and not shared.writes else 0 if shared is None else life(shared.fd),
    )  # fmt: skip
    adapters.serve(engine)
    runtime = Runtime(setup, engine, None, decoder, pool, second, adapters, words)  # type: ignore[arg-type]
    runtime.executor = TorchExecutor(runtime.decoders, pool, stacks, max_guesses=limits.max_guesses, exchange=exchange)
    return runtime


def _settings(setup: Setup) -> bytes:
    """What of the set-up changes keys and values, for the salt of the prefix index."""
    return f"{setup.dtype} {setup.weights_name} {setup.config.activations} {setup.kv_name}".encode()


def reach(setup: Setup) -> dict[str, int]:
    """Positions that each model can compute."""
    return {name: spec.max_positions for name, spec in setup.specs.items()}


def make_pool(setup: Setup) -> KVPool:
    """The KV pool as it was planned, in the number format of the stack's `kv.store`."""
    import torch

    from weft.exec.kvpool import KVPool

    return KVPool(
        setup.groups, setup.specs, blocks=setup.plan.kv_blocks, block_bytes=setup.block_bytes,
        dtype=getattr(torch, setup.kv_dtype), device=setup.device, store=setup.stack.get("kv.store"),
    )  # fmt: skip


def _adapters(setup: Setup, decoder: Decoder) -> AdapterBook:
    """The book of adapters, with those that the user named."""
    from weft.exec.adapters import AdapterBook

    config, plan = setup.config, setup.plan
    most = config.lora_memory
    if most is None:
        limit = plan.available_bytes if config.memory_bytes is None else min(config.memory_bytes, plan.available_bytes)
        most = max(0, limit - plan.total_bytes)
    book = AdapterBook(decoder, most=config.max_loras, most_bytes=most)
    for text in config.lora:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"an adapter is given as NAME=FOLDER, got {text[:200]!r}")
        book.enter(book.read(name, path))
    return book


def with_limits(setup: Setup, **changes: Any) -> Setup:
    """The same set-up under other step limits (tests and benchmarks)."""
    return replace(setup, limits=replace(setup.limits, **changes))
