# SPDX-License-Identifier: Apache-2.0
"""FlowAct-R1's and SoulX-LiveAct's memory against the papers' own words: lists on the host.

`Lists` has no slots, no ring and no counter: latent frames are appended, popped and averaged.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from reeltime import rope_kv
from reeltime.model.config import ModelConfig, SparseLinear
from reeltime.model.flops import Workload
from reeltime.model.kv_cache import DenseMemory, StreamMemory
from reeltime.model.layout import Segment, StreamLayout, flowact_r1, liveact
from reeltime.model.sampler import add_noise, timesteps
from reeltime.model.step import Step
from reeltime.model.transformer import CausalTransformer

TOLERANCE = 1e-4  # fp32, sums in another order; of latents that fed 12 chunks of latents before
GRID, SIZE, TIMES = (2, 3), (4, 4, 6), timesteps(3, 5.0)
CONFIG = ModelConfig("tiny", 48, 2, 64, 2, 4, 4, text_dim=8, freq_dim=32, prediction="x0")
# Published first: a chunk of 3 behind 1 + 3 + 1, and one of 8 behind 2 + 2 + 2.
FORMS = [(flowact_r1, *size) for size in ((3, 8), (3, 14), (2, 7), (1, 7))]
FORMS += [(liveact, *size) for size in ((8, 14), (2, 9), (3, 9), (1, 6))]
NAMES = [f"{make.__name__}-{chunk}-{window}" for make, chunk, window in FORMS]


def normal(seed, *sizes):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def net():
    """Every parameter random: Wan's zero-initialised head would make these tests vacuous."""
    torch.manual_seed(0)
    made = CausalTransformer(CONFIG).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.normal_().mul_(p.shape[-1] ** -0.5)
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)
    return made


class Lists:
    """What one layer remembers of one cache: [(position in the stream, anything to keep)]."""

    def __init__(self, layout):
        self.layout = layout
        self.kept, self.memory, self.history = [], [], []

    def add(self, frames):
        """A chunk is done; what leaves the short-term memory is promoted, compressed or lost."""
        layout = self.layout
        for frame in frames:
            kept = len(self.kept) < layout.capacity("picture", "first_state")
            (self.kept if kept else self.history).append(frame)
        leaving = []
        while len(self.history) > layout.capacity("history"):
            leaving.append(self.history.pop(0))
        if layout.name == "flowact_r1":  # the last latent frame of a chunk (of two, at chunk 1)
            last = [frame for frame in leaving if frame[0] % max(layout.chunk, 2) == 0]
            self.memory = (self.memory + last)[-3:]
        elif leaving:  # ConvKV: kernel and stride of 1 + chunk / memory, over memory and a chunk
            room = layout.capacity("memory")
            row = [None] * (room - len(self.memory)) + self.memory
            row += [None] * (layout.chunk - len(leaving)) + leaving
            stride = len(row) // room
            groups = [row[i : i + stride] for i in range(0, len(row), stride)]
            there = [[frame[1] for frame in group if frame] for group in groups]
            self.memory = [(None, sum(group) / len(group)) for group in there if group]

    def seen(self):
        return self.kept + self.memory + self.history

    def positions(self, start):
        """Of all that is seen, and of the chunk that starts at `start`."""
        layout, own = self.layout, range(self.layout.chunk)
        if layout.name == "liveact":  # RoPE reset: the chunk stands last in the window
            behind = len(self.memory) + len(self.history)
            start = min(start, layout.window - layout.chunk)
            kept = [p for p, _ in self.kept]
            return kept + [start - behind + i for i in range(behind)] + [start + i for i in own]
        far = 3 * max(layout.chunk, 2) + layout.capacity("history")
        moved = [max(start - 1 - far, 0)]  # the picture: in front of the oldest there can be
        rest = [p for p, _ in self.memory + self.history]
        return moved + rest + [start + i for i in own]


class ListMemory:
    """`Lists` for every layer and step, as the model's memory."""

    def __init__(self, layout):
        self.layout, self.start, self.new = layout, 0, {}
        count = layout.steps if layout.stepped else 1
        self.lists = [[Lists(layout) for _ in range(count)] for _ in range(CONFIG.num_layers)]

    def attend(self, layer, q, k, v, attn):
        options = {"num_heads": attn.num_heads, "eps": attn.eps, "backend": "reference"}
        q, k = (
            rope_kv.query(x, None, norm_weight=norm.weight, **options)[0]
            for x, norm in ((q, attn.norm_q), (k, attn.norm_k))
        )
        v = v.unflatten(-1, (attn.num_heads, -1))
        tokens = GRID[0] * GRID[1]
        own = torch.stack([k, v]).unflatten(2, (-1, tokens)).unbind(2)  # (2, B, N, H, D) each
        self.new[layer] = own
        if not self.start:  # the picture, alone
            positions, seen = [0], list(own)
        else:
            lists = self.lists[layer][self.step]
            positions = lists.positions(self.start)
            seen = [frame for _, frame in lists.seen()] + list(own)
        keys, values = torch.cat(seen, 2)
        table = rope_kv.rope_table(torch.tensor(positions), GRID, CONFIG.head_dim)
        keys, q = rope_kv.apply_rope(keys, table), rope_kv.apply_rope(q, table[-q.shape[1] :])
        q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
        return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)

    def remember(self, step):
        for layer, own in self.new.items():
            frames = [(self.start + i, frame) for i, frame in enumerate(own)]
            self.lists[layer][step].add(frames)


@torch.no_grad()
def listed(net, layout, chunks):
    """Generated on lists: latents of each chunk."""
    memory, contexts = ListMemory(layout), net.embed_context(normal(3, 1, 1, 3, 8))

    def forward(x, t, step):
        memory.step = step
        return net(x, torch.full(x.shape[:2], t, dtype=torch.float64), contexts, memory)

    forward(normal(1, 1, 1, *SIZE), 0.0, 0)
    steps = range(layout.steps if layout.stepped else 1)
    for step in steps:
        memory.remember(step)
    memory.start = 1
    for chunk in range(chunks):
        x = normal(100 * chunk, 1, layout.chunk, *SIZE)
        new = []
        for i, t in enumerate(TIMES):
            x0 = forward(x, t, i if layout.stepped else 0)
            new.append(dict(memory.new))
            noise, after = normal(100 * chunk + i + 1, *x.shape), (*TIMES[1:], 0.0)[i]
            x = add_noise(x0, noise, after / 1000)
        if not layout.stepped:  # what is denoised leaves nothing behind but clean keys
            forward(x, 0.0, 0)
            new = [dict(memory.new)]
        for step, memory.new in enumerate(new):
            memory.remember(step)
        memory.start += layout.chunk
        yield x


@torch.inference_mode()
def streamed(net, layout, chunks):
    """The same by the step."""
    memory = StreamMemory(CONFIG, layout, GRID)
    contexts = normal(3, 1, 1, 3, 8)
    memory.plan = memory.make_plans(1)[memory.kinds[-1]]
    net(normal(1, 1, 1, *SIZE), torch.zeros(1, 1).double(), net.embed_context(contexts), memory)
    memory.position += 1
    step = Step(net, memory, SIZE, TIMES)
    step.condition(contexts)
    for chunk in range(chunks):
        step.plan()
        step.latents.copy_(normal(100 * chunk, *step.latents.shape))
        for i in range(len(step.passes)):
            step.noise.copy_(normal(100 * chunk + i + 1, *step.latents.shape))
            step.run(i)
        yield step.latents.clone()


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_stream_is_that_of_lists(net, form):
    make, *size = form
    layout = make(*size)
    pairs = zip(streamed(net, layout, 12), listed(net, layout, 12), strict=True)
    for chunk, (got, want) in enumerate(pairs):
        assert want.std() > 0.3
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0, msg=f"chunk {chunk}")


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_what_a_pass_sees_over_a_long_stream(form):
    """Each latent frame leaves its number in its slots; 400 chunks, each kind of pass."""
    make, *size = form
    layout = make(*size)
    config = replace(CONFIG, num_layers=1, dim=8, num_heads=2)
    memory = StreamMemory(config, layout, (1, 1), dtype=torch.float64)
    cache, bytes_held = memory.caches[0], memory.nbytes
    lasting = memory.lasting
    lists = {kind: Lists(layout) for kind in lasting}
    for chunk in range(400):
        start = int(memory.position)
        frames = 1 if chunk == 0 else layout.chunk
        memory.compress()
        plans = memory.make_plans(frames)
        for kind, plan in plans.items():
            seen, own = plan.block_table[:-frames], plan.write_slots
            assert torch.equal(plan.block_table[-frames:], own)
            seen = seen[seen >= 0]
            assert len({*seen.tolist(), *own.tolist()}) == len(seen) + frames
            there = lists[kind if kind in lasting else "cache"].seen()
            want = torch.tensor([x for _, x in there], dtype=torch.float64)
            got = cache.k[0, seen, 0, 0, 0]
            torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-12)
            assert len(seen) == layout.visible(start) - layout.chunk
        for number, kind in enumerate(lasting):
            values = [start + i + 1e6 * number * (start > 0) for i in range(frames)]
            each = torch.tensor(values, dtype=torch.float64)[:, None, None, None]
            for x in (cache.k, cache.v):
                x[0, plans[kind].write_slots] = each
            new = [(start + i, x) for i, x in enumerate(values)]
            lists[kind].add(new)
        memory.position += frames
    assert memory.nbytes == bytes_held
    assert len(lists[lasting[0]].seen()) == layout.window - layout.chunk


def test_compressing_again_changes_nothing():
    memory = StreamMemory(CONFIG, liveact(8, 14), GRID)
    memory.position += 1 + 3 * 8
    for cache in memory.caches:
        cache.k.copy_(normal(1, *cache.k.shape))
    memory.compress()
    once = memory.caches[0].k.clone()
    memory.compress()
    assert torch.equal(memory.caches[0].k, once)


def test_promoted_frames_never_move():
    """A promoted latent frame is read from the slot that it was written to, years later."""
    layout = flowact_r1(3, 8)
    memory, written = StreamMemory(CONFIG, layout, GRID), {}
    for chunk in range(40):
        frames = 3 if chunk else 1
        plan = memory.make_plans(frames)["cache"]
        old = plan.block_table[: memory.kept + memory.memory]
        promoted = [0, *range(max(3 * chunk - 11, 3) // 3 * 3, 3 * chunk - 3, 3)][:4]
        if chunk > 4:
            assert old.tolist() == [written[p] for p in promoted]
        start = int(memory.position)
        written |= {start + i: slot for i, slot in enumerate(plan.write_slots.tolist())}
        memory.position += frames


@torch.no_grad()
def test_short_streams_are_one_dense_forward(net):
    """FlowAct-R1's fake-causal mask: frames see memory as it was when they were written."""
    layout = flowact_r1(3, 8)
    absolute = replace(
        layout, segments=tuple(replace(s, offset="absolute") for s in layout.segments)
    )
    lists, frames = Lists(layout), 1 + 3 * 9
    clean, contexts = normal(1, 1, frames, *SIZE), net.embed_context(normal(3, 1, 1, 3, 8))
    memory, mask = StreamMemory(CONFIG, absolute, GRID), torch.zeros(frames, frames).bool()
    times = torch.zeros(1, frames)
    times[:, -3:] = 700.0
    for a in (0, *range(1, frames, 3)):
        own = list(range(a, a + 3 if a else 1))
        mask[own, torch.tensor([p for p, _ in lists.seen()] + own)[:, None]] = True
        memory.plan = memory.make_plans(len(own))["cache"]
        last = net(clean[:, own], times[:, own], contexts, memory)
        memory.position += len(own)
        lists.add([(p, p) for p in own])
    assert mask[-1].nonzero().flatten().tolist() == [0, 15, 18, 21, 24, 25, 26, 27]
    dense = DenseMemory(torch.arange(frames), GRID, CONFIG, mask)
    want = net(clean, times, contexts, dense)[:, -3:]
    torch.testing.assert_close(last, want, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_neighbours_are_as_noisy_as_the_query(net):
    """While nothing is compressed, step i is one dense forward of all chunks at step i's noise."""
    layout = liveact(2, 31)
    memory, contexts = StreamMemory(CONFIG, layout, GRID), net.embed_context(normal(3, 1, 1, 3, 8))
    picture = normal(1, 1, 1, *SIZE)
    memory.plan = memory.make_plans(1)["step 0"]
    net(picture, torch.zeros(1, 1), contexts, memory)
    memory.position += 1
    frames = 1 + 2 * 5
    starts = torch.tensor([0, *(1 + 2 * (i // 2) for i in range(frames - 1))])
    dense = DenseMemory(torch.arange(frames), GRID, CONFIG, starts[:, None] >= starts)
    inputs = normal(2, 3, 5, 1, 2, *SIZE)  # by step and chunk
    for chunk in range(5):
        out = []
        for i, t in enumerate(TIMES):
            memory.plan = memory.make_plans()[f"step {i}"]
            out.append(net(inputs[i, chunk], torch.full((1, 2), t), contexts, memory))
        memory.position += 2
    for i, t in enumerate(TIMES):
        x = torch.cat([picture, *inputs[i]], 1)
        times = torch.full((1, frames), t)
        times[:, 0] = 0.0
        want = net(x, times, contexts, dense)[:, -2:]
        torch.testing.assert_close(out[i], want, atol=TOLERANCE, rtol=0)


def test_segments_are_as_published():
    sizes = {
        made.name: [made.capacity(n) for n in ("picture", "first_state", "memory", "history")]
        for made in (flowact_r1(3, 8), liveact(8, 14))
    }
    assert sizes == {"flowact_r1": [1, 0, 3, 1], "liveact": [1, 1, 2, 2]}
    assert liveact(8, 14).every == 5


MEMORY = Segment("memory", 2, evict="drop")


@pytest.mark.parametrize(
    "make, message",
    {
        "small": (lambda: flowact_r1(3, 7), "window: expected at least 8 latent frames .*, got 7"),
        "room": (lambda: liveact(8, 12), "window: expected at least 13 latent frames"),
        "stride": (
            lambda: Segment("history", 2, evict="promote"),
            "every: expected at least 2 to promote, got 1",
        ),
        "order": (
            lambda: StreamLayout("x", 2, (Segment("history", 2, evict="drop"), MEMORY)),
            "segments: expected picture, .* in this order, got history, memory",
        ),
        "unfed": (
            lambda: StreamLayout("x", 2, (MEMORY, Segment("history", 2, evict="drop"))),
            "segments: expected memory and a history that .* got memory of 2 .* evict 'drop'",
        ),
        "homeless": (
            lambda: StreamLayout("x", 2, (Segment("history", 2, evict="promote", every=2),)),
            "segments: expected memory and a history .* got memory of 0",
        ),
        "uneven": (
            lambda: StreamLayout(
                "x", 3, (MEMORY, Segment("history", 2, evict="compress", every=2))
            ),
            r"every: expected 2 \* every = 2 \+ 3",
        ),
        "8 bits": (
            lambda: StreamMemory(CONFIG, liveact(8, 14), GRID, kv_format="int8, v fp8"),
            "layout: expected none that compresses with kv_format 'int8, v fp8', got 'liveact'",
        ),
        "sparse": (
            lambda: StreamMemory(replace(CONFIG, sla=SparseLinear(0.1)), liveact(8, 14), GRID),
            "layout: expected none that compresses with sparse-linear attention, got 'liveact'",
        ),
        "work": (
            lambda: Workload(CONFIG, liveact(8, 14), (4, 6), context_tokens=3, cache="int8"),
            "layout: liveact merges raw keys: expected a plain cache .*, got cache 'int8'",
        ),
    }.values(),
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_more_steps_than_caches_are_refused(net):
    memory = StreamMemory(CONFIG, liveact(8, 14), GRID)
    with pytest.raises(ValueError, match=r"timesteps: expected at most 3, .* liveact .*, got 4"):
        Step(net, memory, SIZE, timesteps(4, 5.0))
