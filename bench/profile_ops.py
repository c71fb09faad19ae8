# SPDX-License-Identifier: Apache-2.0
"""The ops of a traced chunk beside the work that they had to do: time, floor, and what is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from reeltime.bench.bench_step import by_dtype
from reeltime.bench.ceilings import Ceilings
from reeltime.bench.plan import Target
from reeltime.bench.profile_trace import Run, family
from reeltime.model.config import ModelConfig, SparseLinear
from reeltime.model.flops import Work
from reeltime.model.kv_cache import KV_FORMATS
from reeltime.model.quality import Quality


@dataclass(frozen=True)
class Op:
    """All calls of an op in a chunk.  None: no floor here, or no count of its work."""

    op: str
    family: str
    calls: int
    kernels: int
    ms: float
    share: float  # of the chunk
    gflop: float | None
    mbytes: float | None
    floor_ms: float | None
    bound: str
    lost_ms: float | None  # above the floor


def conditions(config: ModelConfig) -> tuple[int, int]:
    """Contexts per chunk and tokens of each: the miniature is told something every frame."""
    return (1, config.text_len) if config.text_len else (config.chunk, 4)


def linear_sizes(config: ModelConfig, level: Quality) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the products that a Work counts.  q, k and v are one in 8 bits.

    The embeddings of text and time are no thousandth of a chunk, and left out.
    """
    d, patch = config.dim, config.patch[0] * config.patch[1]
    return {
        "patch_embedding": (patch * config.in_channels, d),
        "time_projection": (d, 6 * d),
        "head": (d, patch * config.out_channels),
        "qkv": (d, 3 * d if level.linear else d),
        **dict.fromkeys(("self_out", "cross_query", "cross_out", "cross_key_value"), (d, d)),
        "fc1": (d, config.ffn_dim),
        "fc2": (config.ffn_dim, d),
    }


OPS = {
    "norm": "norm",
    "gated_residual_norm": "norm.gated_residual_norm",
    "write": "rope_kv.write",
    "query": "rope_kv.query",
    "rope_on_cache": "rope_kv.rope_on_cache",
    "cross_norm": "rope_kv.query",
    "context_norm": "rope_kv.query",
    "cross_attention": "attention",
    "quantize": "quant.quantize",
}


def work(target: Target, level: Quality, itemsize: int) -> dict[str, list[Work]]:
    """Of a chunk, by the op that does it."""
    config = target.model()
    if level.topk is not None:
        config = replace(config, sla=SparseLinear(level.topk))
    contexts, tokens = conditions(config)
    load = target.workload(
        config, share=level.topk, quantize=level.linear, cache=KV_FORMATS[level.kv_format][0],
        contexts=contexts, context_tokens=tokens, itemsize=itemsize,
    )  # fmt: skip
    sizes = linear_sizes(config, level)
    attends = "attention.segment_attention" if level.topk is None else "sla.segment_sla"
    names = OPS | {"self_attention": attends}
    found: dict[str, list[Work]] = {}
    for one in load.chunk(target.steps, cache_pass=not load.layout.stepped):  # as a Step has it
        if one.name == "cross_key_value" and level.linear:
            one = replace(one, family="gemm_w8a8")
        if one.name in sizes:
            name = "linear" if one.family == "gemm" else "gemm_w8a8"
            inputs, outputs = sizes[one.name]
            found.setdefault(f"{name} {inputs} -> {outputs}", []).append(one)
        elif one.name in names:
            found.setdefault(names[one.name], []).append(one)
    return found


def ops(
    runs: Sequence[Run],
    counted: dict[str, list[Work]],
    level: Quality,
    ceilings: Ceilings | None,
) -> list[Op]:
    """By what would be gained: time above the floor, or all of it where there is no floor."""
    total = sum(run.us for run in runs)
    slices = [(n, x) for n, run in enumerate(runs) for x in run.slices]
    found = []
    for name in dict.fromkeys(x.op for _, x in slices):
        mine = [(n, x) for n, x in slices if x.op == name]
        ms = sum(x.us for _, x in mine) / 1e3
        works = counted.get(name)
        moved = sum(w.bytes for w in works or ())
        floor, bound = None, ""
        if works and ceilings is not None:
            parts = [(by_dtype([w], level), w.bytes) for w in works]
            floors = [ceilings.floor_us(*part) for part in parts]
            if None not in floors:
                floor = sum(x for x in floors if x is not None) / 1e3
            bound = ceilings.bound(*max(parts, key=lambda part: part[1]))
        found.append(
            Op(
                name,
                family(name),
                len({(n, x.call) for n, x in mine}),
                sum(bool(x.kernel) for _, x in mine),
                ms,
                1e3 * ms / total,
                sum(w.flops for w in works) / 1e9 if works else None,
                moved / 1e6 if works else None,
                floor,
                bound,
                None if floor is None else ms - floor,
            )  # fmt: skip
        )
    return sorted(found, key=lambda op: (op.floor_ms or 0.0) - op.ms)
