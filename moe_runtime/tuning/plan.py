"""The tuned plan: one readable JSON file that says which tactic serves which bucket, and for what it was tuned."""

from __future__ import annotations

import hashlib
import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import filelock
import msgspec

from ..config import MoEConfig
from ..distributions import recording_digest
from ..errors import InvalidArgument, MoEError, PlanRefused
from ..files import not_writable, write_whole
from ..parallel import Parallel
from ..placement import read_digest
from ..workload import kernel_rows

if TYPE_CHECKING:
    from ..executors.base import MoEProblem, TacticPair

SCHEMA_VERSION = 3

Objective = Literal["mean", "p95"]
OBJECTIVES: tuple[Objective, ...] = ("mean", "p95")


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class PlanKey(_Record, frozen=True):
    """Everything that changes which tactic is best. Ranks of equal shards share a plan, so no rank is named.

    recording: digest of a recorded distribution's file. placement: the file of the experts' placement, by which
    num_experts are slots, and placement_digest what was in it. Each "" where there is none.
    """

    format: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    activation: str
    routing: str
    regime: Literal["dep", "ep", "tp"]
    size: int
    tp_size: int
    dispatch: str
    distribution: str
    recording: str
    objective: Objective
    tune_max_num_tokens: int
    device: str
    library_hash: str
    placement: str = ""
    placement_digest: str = ""

    @classmethod
    def of(
        cls,
        problem: MoEProblem,
        distribution: str,
        tune_max_num_tokens: int,
        device: str,
        library_hash: str,
        dispatch: str = "compact",
        objective: Objective = "mean",
        recording: str | None = None,
        placement: str = "",
        placement_digest: str | None = None,
    ) -> PlanKey:
        """recording, placement_digest: None to read the file that distribution or placement names."""
        config, parallel = problem.config, problem.parallel
        return cls(
            format=config.format,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_experts=config.num_experts,
            top_k=config.top_k,
            activation=config.activation,
            routing=routing_name(config),
            regime=parallel.regime,
            size=parallel.size,
            tp_size=parallel.tp_size,
            dispatch=dispatch,
            distribution=distribution,
            recording=recording_digest(distribution) if recording is None else recording,
            objective=objective,
            tune_max_num_tokens=tune_max_num_tokens,
            device=device,
            library_hash=library_hash,
            placement=placement,
            placement_digest=read_digest(placement) if placement_digest is None else placement_digest,
        )

    @property
    def parallel(self) -> Parallel:
        """The layout, seen from rank 0."""
        return Parallel(self.regime, self.size, tp_size=self.tp_size)


def routing_name(config: MoEConfig) -> str:
    """The routing as the plan's key writes it; what changes who gets rows is part of it.

    DeepSeekV3+1:4/8 is a choice in 4 of 8 groups, and one shared expert.
    """
    name = config.routing_method.name
    if config.num_fused_shared_experts:
        name += f"+{config.num_fused_shared_experts}"
    return name if config.n_group == 1 else f"{name}:{config.topk_group}/{config.n_group}"


class Timing(_Record, frozen=True):
    """Microseconds of one tactic: the objective over the workload samples, and its bootstrap confidence interval."""

    us: float
    low: float
    high: float


class GemmChoice(_Record, frozen=True):
    """The tactic of one GEMM in one bucket.

    timings: by tactic that was timed, mean over `buckets.served_range` and `draws`, the default included unless it
    was rejected; tactics that left the race early have wider intervals. Empty where no row reaches this rank in this
    bucket.
    rejected: reason by tactic for those that cannot run, faulted, or computed a wrong result.
    predicted: the cost model's microseconds by tactic; a tactic neither timed nor rejected was pruned on it.
    """

    tactic: str
    default_tactic: str
    timings: dict[str, Timing] = {}
    rejected: dict[str, str] = {}
    predicted: dict[str, float] = {}

    @property
    def us(self) -> float | None:
        """Of the chosen tactic; None where nothing was timed."""
        return self._us(self.tactic)

    @property
    def default_us(self) -> float | None:
        """Of the default tactic; None where nothing was timed or the default itself was rejected."""
        return self._us(self.default_tactic)

    def _us(self, tactic: str) -> float | None:
        return self.timings[tactic].us if tactic in self.timings else None


class PairTiming(_Record, frozen=True):
    """The whole layer, every stage after routing, with two tactics."""

    gemm1: str
    gemm2: str
    timing: Timing


class PlanEntry(_Record, frozen=True):
    """One bucket: tokens per rank, GEMM rows that the first sample brought to this rank, and both GEMMs' choices.

    layer: the pairs of tactics that raced on the layer, of which the chosen is one; empty where no such race was held
    and each GEMM's own times decide.
    """

    bucket: int
    rows: int
    gemm1: GemmChoice
    gemm2: GemmChoice
    layer: tuple[PairTiming, ...] = ()

    @property
    def pair(self) -> TacticPair:
        return self.gemm1.tactic, self.gemm2.tactic

    @property
    def default_pair(self) -> TacticPair:
        return self.gemm1.default_tactic, self.gemm2.default_tactic


class _Header(msgspec.Struct):
    schema_version: int


class Plan(_Record, frozen=True, kw_only=True, dict=True):
    """A tuned plan.

    buckets: tokens per rank of all buckets that the plan is to have, ascending. A call of d tokens per rank takes the
    largest bucket <= d, and the smallest bucket for less.
    entries: those tuned so far, ascending; a plan that is not `complete` lacks some, whose calls run the default.
    samples: workloads drawn per bucket. margin, confidence: how surely a winner had to beat the default.
    quarantined: reason by tactic for those that faulted anywhere; no entry chooses one.
    """

    schema_version: int = SCHEMA_VERSION
    key: PlanKey
    seed: int
    samples: int
    margin: float
    confidence: float
    created: str = msgspec.field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    complete: bool
    buckets: tuple[int, ...]
    entries: tuple[PlanEntry, ...]
    quarantined: dict[str, str] = {}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file whole or not at all. Raises InvalidArgument where the folder cannot be written."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a plan. Raises PlanRefused with the reason for a file that is missing, damaged, or not such a plan."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise PlanRefused(f"plan {path}: cannot be read ({error.strerror}); {_TUNE}") from error
        try:
            version = msgspec.json.decode(data, type=_Header).schema_version
        except msgspec.ValidationError:
            raise PlanRefused(f"plan {path}: JSON, but not a plan of moe_runtime; {_TUNE}") from None
        except msgspec.DecodeError as error:
            raise PlanRefused(f"plan {path}: damaged, not JSON ({error}); {_TUNE}") from error
        if version != SCHEMA_VERSION:
            raise PlanRefused(
                f"plan {path}: schema version {version}, this moe_runtime reads {SCHEMA_VERSION}; {_TUNE}"
            )
        try:
            plan = msgspec.json.decode(data, type=cls)
        except msgspec.DecodeError as error:
            raise PlanRefused(f"plan {path}: damaged ({error}); {_TUNE}") from error
        reason = plan._inconsistency()
        if reason is not None:
            raise PlanRefused(f"plan {path}: damaged ({reason}); {_TUNE}")
        return plan

    def _inconsistency(self) -> str | None:
        try:
            self.key.parallel.validate_experts(self.key.num_experts)
            check_buckets(self.buckets, self.key.tune_max_num_tokens)
        except MoEError as error:
            return str(error)
        found = [entry.bucket for entry in self.entries]
        if found != [bucket for bucket in self.buckets if bucket in found]:
            return f"entries {found} are not an ascending choice of the buckets {list(self.buckets)}"
        if self.complete != (len(found) == len(self.buckets)):
            return f"complete is {self.complete}, with entries for {len(found)} of {len(self.buckets)} buckets"
        for entry in self.entries:
            timed = [*entry.gemm1.timings.items(), *entry.gemm2.timings.items()]
            pairs = {(pair.gemm1, pair.gemm2): pair.timing for pair in entry.layer}
            timed += [(" + ".join(pair), timing) for pair, timing in pairs.items()]
            for name, timing in timed:
                if not (0 < timing.low <= timing.us <= timing.high and math.isfinite(timing.high)):
                    return f"bucket {entry.bucket} holds a time of {timing.us} us for {name}"
            if pairs and entry.pair not in pairs:
                return f"bucket {entry.bucket} chose {' + '.join(entry.pair)}, which did not race on the layer"
            for choice in (entry.gemm1, entry.gemm2):
                for reasons in (choice.rejected, self.quarantined):
                    if choice.tactic in reasons:
                        return f"bucket {entry.bucket} chose {choice.tactic}, which was rejected"
        return None

    def fits(
        self, problem: MoEProblem, device: str, library_hash: str, tune_max_num_tokens: int | None = None
    ) -> str | None:
        """None when the plan was tuned for this problem on this device and library, else the reason why not.

        device: the GPU's name, or "cpu". tune_max_num_tokens: checked where the caller has one.
        """
        asked = PlanKey.of(
            problem,
            self.key.distribution,
            self.key.tune_max_num_tokens if tune_max_num_tokens is None else tune_max_num_tokens,
            device,
            library_hash,
            self.key.dispatch,
            self.key.objective,
            self.key.recording,
            self.key.placement,
            self.key.placement_digest,
        )
        differences = [
            f"{name} {getattr(self.key, name)} (here {getattr(asked, name)})"
            for name in PlanKey.__struct_fields__
            if getattr(self.key, name) != getattr(asked, name)
        ]
        return f"tuned for {', '.join(differences)}; {_TUNE}" if differences else None

    def require(self, problem: MoEProblem, device: str, library_hash: str) -> None:
        """Raises PlanRefused with `fits`' reason."""
        reason = self.fits(problem, device, library_hash)
        if reason is not None:
            raise PlanRefused(f"plan: {reason}")

    def lookup(self, num_kernel_rows: int) -> TacticPair | None:
        """Tactics (gemm1, gemm2) of a call with that many rows; None where its bucket was not tuned."""
        starts, tactics = self.table
        return tactics[bisect_right(starts, num_kernel_rows) - 1]

    @cached_property
    def table(self) -> tuple[tuple[int, ...], tuple[TacticPair | None, ...]]:
        """(starts, tactics): a call of x kernel rows runs tactics[i] for the last starts[i] <= x; starts[0] is 0."""
        chosen = {entry.bucket: entry.pair for entry in self.entries}
        rows_a_token = kernel_rows(1, self.key.parallel)
        starts = (0, *(bucket * rows_a_token for bucket in self.buckets[1:]))
        return starts, tuple(chosen.get(bucket) for bucket in self.buckets)

    def digest(self) -> str:
        """sha256 of everything but `created`, in hexadecimal: ranks that hold the same plan agree on it."""
        undated = msgspec.structs.replace(self, created="")
        return hashlib.sha256(msgspec.json.encode(undated, order="deterministic")).hexdigest()


def check_buckets(buckets: Sequence[int], tune_max_num_tokens: int) -> tuple[int, ...]:
    """The buckets as a tuple. Raises InvalidArgument unless they ascend from 1 or more to at most the maximum."""
    if tune_max_num_tokens < 1:
        raise InvalidArgument("tune_max_num_tokens", tune_max_num_tokens, "1 or more")
    found = tuple(buckets)
    if not found or list(found) != sorted(set(found)) or found[0] < 1 or found[-1] > tune_max_num_tokens:
        accepted = f"ascending numbers of tokens from 1 to tune_max_num_tokens = {tune_max_num_tokens}"
        raise InvalidArgument("buckets", list(found), accepted)
    return found


_TUNE = "run `moe-runtime tune` for this model, layout and machine"


@contextmanager
def plan_lock(path: str | os.PathLike[str], wait_seconds: float = 0.0) -> Iterator[None]:
    """Held while a plan is tuned or merged into `path`, so that two writers do not start from and replace one file.

    Raises InvalidArgument when another process still holds it after `wait_seconds` or the folder cannot be written.
    """
    target = Path(path)
    lock = filelock.FileLock(target.with_name(f".{target.name}.lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=wait_seconds)
    except filelock.Timeout:
        raise InvalidArgument(
            "output", target, "a plan that no other process is tuning", "Wait for it, or choose another file."
        ) from None
    except OSError as error:
        raise not_writable(target, error) from error
    try:
        yield
    finally:
        lock.release()
