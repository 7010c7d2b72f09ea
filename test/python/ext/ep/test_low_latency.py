"""The low-latency calls against a plain reference: every format, half and option of deep_ep's."""

import gc
import itertools

import pytest
import torch
from checks import World, round_trip, same
from low_latency_checks import (
    BF16,
    FP8,
    combine,
    dispatch,
    ll_buffer,
    ll_round_trip,
    received,
    shape_for,
)
from low_latency_reference import FORMATS, LlShape, LlWorld, dequantise, host
from reference import Shape
from torch.multiprocessing.reductions import StorageWeakRef

from mscclpp.ext import ep

pytestmark = pytest.mark.mp

# ---- results ----------------------------------------------------------------------------------


def _every_way(me, shape, form):
    """Hook x zero_copy x out, call after call on one Buffer."""
    with ll_buffer(me, shape) as buffer:
        ways = itertools.product(
            ({}, {"return_recv_hook": True}, {"async_finish": True}), (False, True), (False, True)
        )
        for call, (how, zero_copy, out) in enumerate(ways):
            world = LlWorld(shape, call)
            ll_round_trip(me, buffer, world, form, zero_copy=zero_copy, out=out, **how)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_round_trips(run_ranks, ranks, form):
    run_ranks(_every_way, ranks, shape_for(ranks), FORMATS[form])


SHAPES = {
    "a-rank-without-tokens": LlShape((6, 0)),
    "no-tokens": LlShape((0, 0)),
    "nothing-selected": LlShape((6, 4), missing=1.1),
    "everything-selected": LlShape((6, 4), missing=0.0, topk=8),
    "full": LlShape((9, 9), missing=0.0),
    "small-rows": LlShape((6, 4), hidden=8),
    "packed-words": LlShape((6, 4), hidden=1024, max_tokens=6),
    "uneven-experts": LlShape((6, 4, 5), experts=7),
    "no-room-for-tokens": LlShape((0, 0), max_tokens=0),
}


def _formats(me, shape):
    with ll_buffer(me, shape) as buffer:
        for call, (form, hook) in enumerate(itertools.product(FORMATS.values(), (False, True))):
            how = {"return_recv_hook": True} if hook else {}
            ll_round_trip(me, buffer, LlWorld(shape, call), form, zero_copy=hook, **how)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(run_ranks, name):
    run_ranks(_formats, SHAPES[name].ranks, SHAPES[name])


@pytest.mark.parametrize("hidden", [1, 2, 3, 4, 7])
def test_the_reference_tells_calls_ranks_and_experts_apart(hidden):
    """What makes a row that went astray visible."""
    shape = LlShape((5, 4), hidden=8 * hidden)
    rows = torch.cat([sent.x for c in range(4) for sent in LlWorld(shape, c).inputs])
    assert rows.unique(dim=0).size(0) == rows.size(0)
    world, x = LlWorld(shape), rows[:1]
    outputs = torch.cat([world.apply(e, x) for e in range(shape.experts)])
    assert outputs.unique(dim=0).size(0) == shape.experts
    for sent in world.inputs:
        assert all(row.unique().numel() == shape.topk for row in sent.topk_weights)


def _two_under_way(me, shape):
    """Two calls are sent before one is received, in either order, and a whole call between."""
    hook = {"return_recv_hook": True}
    with ll_buffer(me, shape) as buffer:
        for call in range(0, 12, 3):
            a, b, c = (LlWorld(shape, call + i) for i in range(3))
            xa, na, ha, _, receive_a = dispatch(me, buffer, a, BF16, **hook)
            xb, nb, hb, _, receive_b = dispatch(me, buffer, b, FP8, **hook)
            for receive in (receive_a, receive_b)[:: 1 if call % 2 else -1]:
                receive()
            a.check_dispatch(me.rank, BF16, xa, na, ha)
            b.check_dispatch(me.rank, FP8, xb, nb, hb)
            # Both write into their buffers before one is combined: they must be two.
            ya = buffer.get_next_low_latency_combine_buffer(ha)
            yb = buffer.get_next_low_latency_combine_buffer(hb)
            ya.copy_(me.put(a.outputs(me.rank, BF16, xa)))
            yb.copy_(me.put(b.outputs(me.rank, FP8, xb)))
            sa, sb = me.put(a.inputs[me.rank]), me.put(b.inputs[me.rank])
            ca, _, receive_a = buffer.low_latency_combine(
                torch.zeros_like(ya), sa.topk_idx, sa.topk_weights, ha, zero_copy=True, **hook
            )
            xc, nc, hc, event, receive = dispatch(me, buffer, c, BF16)
            received(event, receive)
            cb, _, receive_b = buffer.low_latency_combine(
                torch.zeros_like(yb), sb.topk_idx, sb.topk_weights, hb, zero_copy=True, **hook
            )
            for receive in (receive_a, receive_b)[:: -1 if call % 2 else 1]:
                receive()
            c.check_dispatch(me.rank, BF16, xc, nc, hc)
            a.check_combined(me.rank, BF16, ca)
            b.check_combined(me.rank, FP8, cb)
            combined, event, receive = combine(me, buffer, c, BF16, xc, hc)
            received(event, receive)
            c.check_combined(me.rank, BF16, combined)


def test_two_calls_under_way(run_ranks):
    run_ranks(_two_under_way, 2, shape_for(2))


def _with_the_others(me, shape):
    """High-throughput and low-latency calls on one Buffer, in turn."""
    with ll_buffer(me, shape, num_nvl_bytes=1 << 22) as buffer:
        for call in range(4):
            round_trip(buffer, me, World(Shape((12, 15)), call))
            ll_round_trip(me, buffer, LlWorld(shape, call), FORMATS["ue8m0"])
            buffer.clean_low_latency_buffer(shape.max_tokens, shape.hidden, shape.experts)
            how = {"return_recv_hook": True}
            ll_round_trip(me, buffer, LlWorld(shape, call + 50), BF16, zero_copy=True, **how)


def test_both_modes_on_one_buffer(run_ranks):
    run_ranks(_with_the_others, 2, shape_for(2))


def _shapes_in_turn(me, shapes):
    """Other shapes, and another Buffer beside, with nothing cleaned between."""
    with ll_buffer(me, *shapes) as first, ll_buffer(me, *shapes) as second:
        for call in range(12):
            world = LlWorld(shapes[call % len(shapes)], call)
            form = list(FORMATS.values())[call % 4]
            how = {"return_recv_hook": True} if call % 3 else {}
            ll_round_trip(me, first, world, form, zero_copy=call % 2 > 0, **how)
            ll_round_trip(me, second, world, BF16, zero_copy=call % 2 > 0)
        recv_x, _, handle, *_ = dispatch(me, first, world, BF16)
        with pytest.raises(ep.EpInvalidArgument, match="another Buffer"):
            combine(me, second, world, BF16, recv_x, handle)


def test_shapes_in_turn_and_two_buffers(run_ranks):
    shapes = (shape_for(2), LlShape((30, 2), hidden=64, topk=2, experts=4, max_tokens=31))
    run_ranks(_shapes_in_turn, 2, shapes)


def _noise(tensors):
    """Tensors of the same sizes: an allocator that got the memory back gives it to them."""
    return [torch.full_like(t, 77) for t in tensors for _ in range(32)]


def _dropped_tensors(me, shape):
    """Rank 0 drops all tensors of a call that waits for rank 1, and fills what it gets instead."""

    def early(call, *rest, **how):
        """Rank 0 calls before the others. Its results are dropped, and those of `rest` too."""
        go = me.barrier if "async_finish" in how else lambda: None  # send halves may wait, too
        if me.rank > 0:
            go()
        *results, event, hook = call(**how)
        noise = []
        if me.rank == 0:
            results.clear()
            for item in rest:
                item.clear()
            noise = _noise(like)
            go()
        received(event, hook, **how)
        me.synchronize()
        assert all((host(t) == 77).all() for t in noise), f"{how}: outputs went elsewhere"
        return results

    with ll_buffer(me, shape) as buffer:
        for how in ({"return_recv_hook": True}, {"async_finish": True}):
            for call in range(3):
                world = LlWorld(shape, call)
                recv_x, count, handle, *_ = dispatch(me, buffer, world, BF16)
                mine = me.put(world.inputs[me.rank])
                like = [t.clone() for t in (recv_x, count, *handle[:2], *vars(mine).values())]
                slots = (shape.ranks, shape.max_tokens, shape.topk)
                like += [torch.zeros(s, dtype=torch.int32, device=me.device) for s in (slots, 2)]
                _noise(like)  # so that the allocator has them
                results = early(lambda **how: dispatch(me, buffer, world, BF16, **how), **how)
                if me.rank > 0:
                    world.check_dispatch(me.rank, BF16, *results)
                own = [handle]
                del handle
                results = early(
                    lambda **how: combine(me, buffer, world, BF16, recv_x, own[0], **how),
                    own,
                    **how,
                )
                if me.rank > 0:
                    world.check_combined(me.rank, BF16, *results)
        gc.collect()
        handle = dispatch(me, buffer, world, BF16)[2]
        buffer.get_next_low_latency_combine_buffer(handle)
        assert len(buffer._in_flight) == 0, "tensors are held although their calls are done"


def test_calls_under_way_hold_their_tensors(run_ranks):
    run_ranks(_dropped_tensors, 2, shape_for(2))


def test_nothing_holds_received_rows_but_their_caller(solo):
    """Neither the handle, nor the event, nor a hook that was called."""
    shape = shape_for(1)
    world = LlWorld(shape)
    with ll_buffer(solo, shape) as buffer:
        for how in ({}, {"return_recv_hook": True}, {"async_finish": True}):
            recv_x, count, handle, event, hook = dispatch(solo, buffer, world, FP8, **how)
            received(event, hook, **how)
            solo.synchronize()
            buffer.clean_low_latency_buffer(shape.max_tokens, shape.hidden, shape.experts)
            tensors = [*recv_x, count]
            weak = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
            del recv_x, count, tensors
            assert all(ref.expired() for ref in weak), how
            sent = solo.put(world.inputs[0])
            x = torch.zeros(shape.local, shape.rows, shape.hidden, dtype=torch.bfloat16)
            buffer.low_latency_combine(solo.put(x), sent.topk_idx, sent.topk_weights, handle)


# ---- CUDA graphs ------------------------------------------------------------------------------


def _graph(me, shape, form):
    """Captured through torch, with experts; replayed with other inputs and eager calls between."""
    hook, sizes = {"return_recv_hook": True}, (shape.max_tokens, shape.experts)
    with ll_buffer(me, shape) as buffer:
        world = LlWorld(shape, 0)
        sent = me.put(world.inputs[me.rank])
        ids = torch.tensor(world.experts(me.rank)).view(-1, 1, 1)
        factor, offset = me.put(0.75 + 0.5 * ids), me.put(0.125 * (ids % 3))
        ll_round_trip(me, buffer, world, form, zero_copy=True)
        me.synchronize()
        me.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            recv_x, count, handle, _, receive = buffer.low_latency_dispatch(
                sent.x, sent.topk_idx, *sizes, **form.keywords, **hook
            )
            receive()
            x = dequantise(*recv_x).bfloat16() if form.use_fp8 else recv_x
            y = buffer.get_next_low_latency_combine_buffer(handle)
            y.copy_((x.float() * factor + offset).bfloat16())
            combined, _, receive = buffer.low_latency_combine(
                y, sent.topk_idx, sent.topk_weights, handle, zero_copy=True, **hook
            )
            receive()
        me.synchronize()
        me.barrier()  # capturing waits for the device, which other ranks may share
        for call in range(3, 60, 3):  # calls whose experts are those of call 0
            world = LlWorld(shape, call)
            mine = me.put(world.inputs[me.rank])
            for static, new in zip(vars(sent).values(), vars(mine).values()):
                static.copy_(new)
            graph.replay()
            world.check_dispatch(me.rank, form, recv_x, count, handle)
            world.check_combined(me.rank, form, combined)
            if call % 2:
                ll_round_trip(me, buffer, LlWorld(shape, call + 1), BF16, **hook)
        me.synchronize()
        me.barrier()
        del graph


@pytest.mark.parametrize("form", ["bf16", "fp8", "ue8m0"])
def test_a_captured_graph(run_ranks, platform, request, form):
    if platform != "cuda":
        pytest.skip("needs a GPU: the CPU has no graphs")
    if request.config.getoption("--threads"):
        pytest.skip("torch captures one graph at a time in a process; without --threads it runs")
    run_ranks(_graph, 2, shape_for(2), FORMATS[form])


# ---- statistics -------------------------------------------------------------------------------


def _statistics(me, shape, square):
    with ll_buffer(me, shape) as buffer:
        device, size = me.device, (me.size, me.size) if square else (me.size,)
        rows = torch.full((shape.local,), 1000, dtype=torch.int32, device=device)
        waits = [torch.full(size, 5, dtype=torch.int64, device=device) for _ in range(2)]
        wanted = torch.full((shape.local,), 1000, dtype=torch.int32)
        for call in range(4):
            world = LlWorld(shape, call)
            how = {"return_recv_hook": True} if call % 2 else {}
            recv_x, count, handle, event, hook = dispatch(
                me,
                buffer,
                world,
                FP8,
                cumulative_local_expert_recv_stats=rows,
                dispatch_wait_recv_cost_stats=waits[0],
                **how,
            )
            received(event, hook, **how)
            wanted += torch.tensor(world.counts(me.rank), dtype=torch.int32)
            combined, event, hook = combine(
                me, buffer, world, FP8, recv_x, handle, combine_wait_recv_cost_stats=waits[1], **how
            )
            received(event, hook, **how)
            world.check_combined(me.rank, FP8, combined)
        same("cumulative_local_expert_recv_stats", rows, wanted)
        assert wanted.sum() > 4000
        for name, stats in zip(("dispatch", "combine"), map(host, waits)):
            mine = stats[me.rank] if square else stats
            for rank in range(me.size):
                waited = int(mine[rank])
                assert 5 + (rank != me.rank) <= waited < 10**11, f"{name}: {stats}"
            if square:
                others = [r for r in range(me.size) if r != me.rank]
                assert (stats[others] == 5).all(), f"{name}: only this rank's row is written"


@pytest.mark.parametrize("square", [False, True], ids=["ranks", "ranks-ranks"])
def test_statistics(run_ranks, square):
    run_ranks(_statistics, 2, shape_for(2, missing=0.0), square)


# ---- masks ------------------------------------------------------------------------------------


def _masks(me, shape):
    with ll_buffer(me, shape, enable_shrink=True) as buffer:
        status = torch.full((me.size,), 9, dtype=torch.int32, device=me.device)

        def masked():
            status.fill_(9)
            buffer.low_latency_query_mask_buffer(status)
            return host(status).tolist()

        none, other = [0] * me.size, (me.rank + 1) % me.size
        only_other = [int(rank == other) for rank in range(me.size)]
        assert masked() == none
        ll_round_trip(me, buffer, LlWorld(shape, 0), BF16)
        buffer.low_latency_update_mask_buffer(other, True)
        assert masked() == only_other
        buffer.low_latency_update_mask_buffer(rank_to_mask=other)  # mask=False
        assert masked() == none
        buffer.low_latency_update_mask_buffer(rank_to_mask=other, mask=True)
        assert masked() == only_other
        buffer.low_latency_clean_mask_buffer()
        assert masked() == none
        ll_round_trip(me, buffer, LlWorld(shape, 1), FP8, return_recv_hook=True)
        for rank in (-1, me.rank, me.size):
            with pytest.raises(ep.EpInvalidArgument, match=f"rank_to_mask = {rank} must be in 0"):
                buffer.low_latency_update_mask_buffer(rank, True)
        for bad, text in (
            (status.long(), rf"mask_status is i64\[{me.size}\]: its dtype must be i32"),
            (status[:1], rf"mask_status is i32\[1\]: its shape must be \[{me.size}\]"),
        ):
            with pytest.raises(ep.EpInvalidArgument, match=text):
                buffer.low_latency_query_mask_buffer(bad)
        assert masked() == none


@pytest.mark.parametrize("ranks", [2, 4])
def test_masks(run_ranks, ranks):
    run_ranks(_masks, ranks, shape_for(ranks))


def test_masks_need_enable_shrink(solo):
    shape = shape_for(1)
    with ll_buffer(solo, shape) as buffer:
        status = torch.zeros(1, dtype=torch.int32, device=solo.device)
        for call in (
            lambda: buffer.low_latency_query_mask_buffer(status),
            lambda: buffer.low_latency_update_mask_buffer(0, True),
            lambda: buffer.low_latency_clean_mask_buffer(),
        ):
            with pytest.raises(ep.EpInvalidState, match="without enable_shrink"):
                call()
