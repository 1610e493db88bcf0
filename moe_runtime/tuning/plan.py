"""The tuned plan: one readable JSON file that says which tactic serves which bucket, and for what it was tuned."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import filelock
import msgspec

from ..config import MoEConfig, RoutingMethod
from ..errors import InvalidArgument, MoEError, PlanRefused
from ..parallel import Parallel
from ..workload import DISPATCH, bucket_index, buckets

if TYPE_CHECKING:
    from ..executors.base import MoEProblem

SCHEMA_VERSION = 1
ACTIVATION = "swiglu"


class PlanKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that changes which tactic is best. Ranks of equal shards share a plan, so no rank is named."""

    format: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    activation: str
    routing: str
    regime: Literal["dep", "ep"]
    size: int
    dispatch: str
    distribution: str
    tune_max_num_tokens: int
    device: str
    library_hash: str

    @classmethod
    def of(
        cls,
        problem: MoEProblem,
        distribution: str,
        tune_max_num_tokens: int,
        device: str,
        library_hash: str,
    ) -> PlanKey:
        config, parallel = problem.config, problem.parallel
        return cls(
            format=config.format,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_experts=config.num_experts,
            top_k=config.top_k,
            activation=ACTIVATION,
            routing=routing_name(config),
            regime=parallel.regime,
            size=parallel.size,
            dispatch=DISPATCH,
            distribution=distribution,
            tune_max_num_tokens=tune_max_num_tokens,
            device=device,
            library_hash=library_hash,
        )


def routing_name(config: MoEConfig) -> str:
    """The routing as the plan's key writes it; group limits are part of it because they change who gets rows."""
    name = RoutingMethod(config.routing_method).name
    return name if config.n_group == 1 else f"{name}:{config.topk_group}/{config.n_group}"


class GemmChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tactic of one GEMM in one bucket.

    us, default_us: median microseconds of the chosen and of the default tactic; None where nothing was timed
    (no row reaches this rank in this bucket), default_us also where the default itself was rejected.
    rejected: reason by tactic for those that cannot run, raised, or computed a wrong result.
    """

    tactic: str
    us: float | None
    default_tactic: str
    default_us: float | None
    rejected: dict[str, str] = {}


class PlanEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One bucket: tokens per rank, GEMM rows that the workload brought to this rank, and both GEMMs' choices."""

    bucket: int
    rows: int
    gemm1: GemmChoice
    gemm2: GemmChoice


class _Header(msgspec.Struct):
    schema_version: int


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """A tuned plan. `entries` ascend by bucket; a plan that is not `complete` lacks the larger buckets."""

    schema_version: int = SCHEMA_VERSION
    key: PlanKey
    seed: int
    created: str = msgspec.field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    complete: bool
    entries: tuple[PlanEntry, ...]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file whole or not at all. Raises InvalidArgument where the folder cannot be written."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise _not_writable(target, error) from error

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
            Parallel(self.key.regime, self.key.size).validate_experts(self.key.num_experts)
            expected = buckets(self.key.tune_max_num_tokens)
        except MoEError as error:
            return str(error)
        found = [entry.bucket for entry in self.entries]
        if found != [bucket for bucket in expected if bucket in found]:
            return f"buckets {found} are not an ascending choice of {expected}"
        if self.complete and not found:
            return "complete, but without entries"
        for entry in self.entries:
            for choice in (entry.gemm1, entry.gemm2):
                for us in (choice.us, choice.default_us):
                    if us is not None and not (math.isfinite(us) and us > 0):
                        return f"bucket {entry.bucket} holds a time of {us} us"
                if choice.tactic in choice.rejected:
                    return f"bucket {entry.bucket} chose {choice.tactic}, which it rejected"
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

    def lookup(self, num_kernel_rows: int) -> tuple[str, str] | None:
        """Tactics (gemm1, gemm2) of a call with that many rows; None where its bucket was not tuned."""
        parallel, tune_max_num_tokens, table = self._table
        return table[bucket_index(num_kernel_rows, parallel, tune_max_num_tokens)]

    @cached_property
    def _table(self) -> tuple[Parallel, int, list[tuple[str, str] | None]]:
        chosen = {entry.bucket: (entry.gemm1.tactic, entry.gemm2.tactic) for entry in self.entries}
        table = [chosen.get(bucket) for bucket in buckets(self.key.tune_max_num_tokens)]
        return Parallel(self.key.regime, self.key.size), self.key.tune_max_num_tokens, table


_TUNE = "run `moe-runtime tune` for this model, layout and machine"


@contextmanager
def plan_lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Held while a plan is tuned into `path`, so that two tuners do not resume from and replace one file.

    Raises InvalidArgument when another process holds it or the folder cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(target.with_name(f".{target.name}.lock"), timeout=0):
            yield
    except filelock.Timeout:
        raise InvalidArgument(
            "output", target, "a plan that no other process is tuning", "Wait for it, or choose another file."
        ) from None
    except PermissionError as error:
        raise _not_writable(target, error) from error


def _not_writable(target: Path, error: OSError) -> InvalidArgument:
    return InvalidArgument("output", target, "a file in a folder that can be written", f"({error.strerror})")
