"""Low-latency calls: bad input, calls in a wrong order, lost ranks; the buffers of zero_copy."""

import copy
import time

import pytest
import torch
from checks import layout_of, routing_of
from checks import World as HtWorld
from low_latency_checks import (
    BF16,
    combine,
    dispatch,
    ll_buffer,
    ll_round_trip,
    received,
    shape_for,
)
from low_latency_reference import LlShape, LlWorld, host
from reference import Shape

from mscclpp.ext import ep

SHAPE = LlShape((7,), hidden=64)  # one rank: [8 experts, 9 rows, 64]
HOOK = {"return_recv_hook": True}


@pytest.fixture
def ready(solo):
    """A Buffer and everything that good calls need."""
    with ll_buffer(solo, SHAPE) as buffer:
        world = LlWorld(SHAPE)
        sent = solo.put(world.inputs[0])
        recv_x, _, handle, *_ = dispatch(solo, buffer, world, BF16)
        out = solo.put(world.outputs(0, BF16, recv_x))
        yield buffer, sent, out, handle
        ll_round_trip(solo, buffer, world, BF16)  # a refused call leaves the Buffer as it was


# name: (changes to a good dispatch, what the message must say)
BAD_DISPATCH = {
    "x-none": ({"x": None}, r"x is a NoneType: it must be a torch.Tensor"),
    "x-float16": ({"x": torch.half}, r"x is float16\[7, 64\]: its dtype must be one of"),
    "x-float32": ({"x": torch.float}, r"x is f32\[7, 64\]: its dtype must be bf16"),
    "x-1d": ({"x": lambda t: t.flatten()}, r"x is bf16\[448\]: its shape must be"),
    "x-stride": ({"x": lambda t: t[:, ::2]}, r"x is bf16\[7, 32\] with gaps.*contiguous"),
    "x-hidden": ({"x": lambda t: t[:, :12].contiguous()}, r"hidden must be a multiple of 8"),
    "x-rows": ({"x": lambda t: t[:5]}, r"topk_idx is i64\[7, 3\]: its shape must be \[5, any\]"),
    "x-misaligned": ({"x": lambda t: t.flatten()[1:-63].view(6, 64)}, r"multiple of 16 bytes"),
    "topk-none": ({"topk_idx": None}, r"topk_idx is a NoneType"),
    "topk-int32": ({"topk_idx": torch.int32}, r"topk_idx is i32\[7, 3\]: its dtype must be i64"),
    "topk-1d": ({"topk_idx": lambda t: t[:, 0].contiguous()}, r"topk_idx is i64\[7\]: its shape"),
    "topk-33": ({"topk_idx": lambda t: t.repeat(1, 11)}, r"top-k must be in 1 .. 32"),
    "max-tokens-negative": ({"max": -1}, r"num_max_dispatch_tokens_per_rank = -1 must be in 0"),
    "max-tokens-4097": ({"max": 4097}, r"num_max_dispatch_tokens_per_rank = 4097 must be in 0 .."),
    "too-many-tokens": ({"max": 6}, r"more tokens than num_max_dispatch_tokens_per_rank = 6"),
    "region": ({"max": 4096}, r"needs num_rdma_bytes = \d+, the Buffer has \d+"),
    "no-experts": ({"experts": 0}, r"num_experts = 0 must be in 1 .."),
    "many-experts": ({"experts": 1 << 17}, r"num_experts = 131072 must be in 1 .."),
    "ue8m0-alone": ({"use_fp8": True, "use_ue8m0": True}, r"use_ue8m0 = true needs round_scale"),
    "async-and-hook": ({**HOOK, "async_finish": True}, r"async_finish = True and return_recv_hook"),
    "totals-dtype": (
        {"cumulative_local_expert_recv_stats": torch.zeros(8)},
        r"cumulative_local_expert_recv_stats is f32\[8\]: its dtype must be i32",
    ),
    "totals-shape": (
        {"cumulative_local_expert_recv_stats": torch.zeros(7, dtype=torch.int32)},
        r"cumulative_local_expert_recv_stats is i32\[7\]: its shape must be \[8\]",
    ),
    "waits-dtype": (
        {"dispatch_wait_recv_cost_stats": torch.zeros(1, dtype=torch.int32)},
        r"wait_recv_cost_stats is i32\[1\]: its dtype must be i64",
    ),
    "waits-shape": (
        {"dispatch_wait_recv_cost_stats": torch.zeros(2, 1, dtype=torch.int64)},
        r"wait_recv_cost_stats is i64\[2, 1\]: its shape must be \[1, 1\]",
    ),
    "nvfp4": ({"use_nvfp4": True}, r"use_nvfp4 = True is not supported"),
    "global-scale": ({"x_global_scale": torch.ones(1)}, r"x_global_scale = a Tensor is not supp"),
}


def _changed(value, change):
    if isinstance(change, torch.dtype):
        return value.to(change)
    return change(value) if callable(change) else change


def _arguments(solo, good, changes):
    """Changes of tensors are functions, types or other values."""
    for key, change in changes.items():
        value = _changed(good.get(key), change)
        good[key] = value.to(solo.device) if isinstance(value, torch.Tensor) else value
    return good


@pytest.mark.parametrize("name", BAD_DISPATCH)
def test_dispatch_refuses(ready, solo, name):
    buffer, sent, *_ = ready
    changes, text = BAD_DISPATCH[name]
    good = {"x": sent.x, "topk_idx": sent.topk_idx, "max": 9, "experts": 8, "use_fp8": False}
    given = _arguments(solo, good, changes)
    sizes = (given.pop("max"), given.pop("experts"))
    with pytest.raises((ep.EpInvalidArgument, ep.EpUnsupported), match=text) as caught:
        buffer.low_latency_dispatch(given.pop("x"), given.pop("topk_idx"), *sizes, **given)
    assert caught.value.code in ("invalidArgument", "unsupported")


BAD_COMBINE = {
    "x-dtype": ({"x": torch.float}, r"x is f32\[8, 9, 64\]: its dtype must be bf16"),
    "x-rows": ({"x": lambda t: t[:, :8].contiguous()}, r"x is bf16\[8, 8, 64\]: its shape must be"),
    "x-stride": ({"x": lambda t: t[..., ::2]}, r"its shape must be \[8, 9, 64\]"),
    "topk-none": ({"topk_idx": None}, r"topk_idx is a NoneType"),
    "topk-other": ({"topk_idx": lambda t: t[:, :2].contiguous()}, r"must be \[any, 3\]"),
    "topk-0d": ({"topk_idx": torch.zeros((), dtype=torch.int64)}, r"topk_idx is i64\[\]"),
    "more-tokens": (
        {"topk_idx": lambda t: t.repeat(2, 1), "topk_weights": lambda t: t.repeat(2, 1)},
        r"more tokens than num_max_dispatch_tokens_per_rank = 9",
    ),
    "weights-dtype": ({"topk_weights": torch.bfloat16}, r"topk_weights is bf16.*must be f32"),
    "weights-shape": ({"topk_weights": torch.ones(3, 3)}, r"topk_weights is f32\[3, 3\]"),
    "handle-none": ({"handle": None}, r"handle is a NoneType: pass what low_latency_dispatch"),
    "handle-tuple": ({"handle": (1, 2, 9, 64, 8)}, r"handle is a tuple: pass what low_latency_dis"),
    "logfmt-at-source": (
        {"use_logfmt": True, "combine_reduce": "source"},
        r'use_logfmt = true needs combine_reduce = "rank"',
    ),
    "async-and-hook": ({**HOOK, "async_finish": True}, r"async_finish = True and return_recv_hook"),
    "out-shape": ({"out": torch.zeros(6, 64).bfloat16()}, r"out is bf16\[6, 64\]: its shape must"),
    "out-dtype": ({"out": torch.zeros(7, 64)}, r"out is f32\[7, 64\]: its dtype must be bf16"),
    "reduce": ({"combine_reduce": "home"}, r"combine_reduce = 'home' must be \"rank\" or \"source\""),
    "reduce-none": ({"combine_reduce": None}, r"combine_reduce = None must be"),
    "num-sms": ({"num_sms": -1}, r"num_sms = -1 must be at least 0"),
    "overlap": ({"overlap": True}, r"overlap = True is not supported"),
    "signal": ({"comp_signal": torch.zeros(1)}, r"comp_signal = a Tensor is not supported"),
    "signals": ({"src_signals": torch.zeros(1)}, r"src_signals = a Tensor is not supported"),
    "waits": (
        {"combine_wait_recv_cost_stats": torch.zeros(1)},
        r"wait_recv_cost_stats is f32\[1\]: its dtype must be i64",
    ),
    "zero-copy-alone": (
        {"zero_copy": True},
        r"get_next_low_latency_combine_buffer\(handle\), which",
    ),
}


@pytest.mark.parametrize("name", BAD_COMBINE)
def test_combine_refuses(ready, solo, name):
    buffer, sent, out, handle = ready
    changes, text = BAD_COMBINE[name]
    good = {"x": out, "topk_idx": sent.topk_idx, "topk_weights": sent.topk_weights}
    given = _arguments(solo, {**good, "handle": handle}, changes)
    with pytest.raises(ep.EpError, match=text) as caught:
        buffer.low_latency_combine(**given)
    assert caught.value.code in ("invalidArgument", "invalidState", "unsupported")


def test_the_handles_of_both_modes_are_not_mixed_up(ready, solo):
    buffer, sent, out, handle = ready
    world = HtWorld(Shape((12,)))
    mine = solo.put(world.inputs[0])
    other = buffer.dispatch(mine.x, **routing_of(layout_of(buffer, world, mine), mine))[4]
    with pytest.raises(ep.EpInvalidArgument, match="handle is a DispatchHandle"):
        buffer.low_latency_combine(out, sent.topk_idx, sent.topk_weights, other)
    with pytest.raises(ep.EpInvalidArgument, match="handle is a DispatchHandle"):
        buffer.get_next_low_latency_combine_buffer(other)
    with pytest.raises(ep.EpInvalidArgument, match="handle is a LowLatencyHandle"):
        buffer.combine(mine.x, handle)
    with pytest.raises(TypeError, match="has no copies"):
        copy.deepcopy(handle)


# ---- the buffers of zero_copy -----------------------------------------------------------------


def test_combine_buffers_are_used_in_turn(ready):
    buffer, sent, out, handle = ready
    topk = (sent.topk_idx, sent.topk_weights)
    first = buffer.get_next_low_latency_combine_buffer(handle)
    assert first.dtype == torch.bfloat16 and first.shape == out.shape
    assert first.is_contiguous() and first.device == out.device
    assert buffer.get_next_low_latency_combine_buffer(handle) is first  # not combined yet
    with pytest.raises(ep.EpInvalidArgument, match=r"must be as the buffer that is read instead"):
        buffer.low_latency_combine(out[:1], *topk, handle, zero_copy=True)
    with pytest.raises(ep.EpInvalidArgument, match="topk_weights"):
        buffer.low_latency_combine(out, topk[0], topk[0], handle, zero_copy=True)
    assert buffer.get_next_low_latency_combine_buffer(handle) is first  # was not read
    wanted = None
    for turn in range(5):
        next_ = buffer.get_next_low_latency_combine_buffer(handle)
        assert (next_ is first) == (turn % 2 == 0)
        next_.copy_(out)
        combined, *_ = buffer.low_latency_combine(
            torch.zeros_like(out), *topk, handle, zero_copy=True
        )
        wanted = host(combined) if wanted is None else wanted
        assert torch.equal(host(combined), wanted) and wanted.abs().sum() > 0
        buffer.low_latency_combine(out, *topk, handle)  # not of the turn


# ---- states -----------------------------------------------------------------------------------


def test_size_hint(solo):
    hint = ep.Buffer.get_low_latency_rdma_size_hint
    assert hint(128, 7168, 8, 256) == hint(
        num_max_dispatch_tokens_per_rank=128, hidden=7168, num_ranks=8, num_experts=256
    )
    assert hint(128, 7168, 8, 8) == hint(128, 7168, 8, 4096)  # does not grow with the experts
    assert 4 * 8 * 128 * 7168 * 2 < hint(128, 7168, 8, 256) < 6 * 8 * 128 * 7168 * 2
    source = {"combine_reduce": "source", "num_topk": 8}
    assert 4 * 128 * 8 * 7168 * 2 < hint(128, 7168, 2, 256, **source) < 5 * 128 * 8 * 7168 * 2
    assert hint(128, 7168, 2, 256, **source, spans_nodes=True) > 8 * 128 * 8 * 7168 * 2
    with pytest.raises(ep.EpInvalidArgument, match="num_topk = 0 must be in 1 .. 32"):
        hint(128, 7168, 2, 256, num_topk=0)
    with pytest.raises(ep.EpInvalidArgument, match="combine_reduce = 'home' must be"):
        hint(128, 7168, 2, 256, combine_reduce="home")
    for values, text in (
        ((-1, 64, 1, 8), "num_max_dispatch_tokens_per_rank = -1"),
        ((9, 12, 1, 8), "hidden = 12 must be a multiple of 8"),
        ((9, 64, 0, 8), "num_ranks = 0"),
        ((9, 64, 1, 0), "num_experts = 0"),
    ):
        with pytest.raises(ep.EpInvalidArgument, match=text):
            hint(*values)
    with pytest.raises(ep.EpInvalidArgument, match="num_rdma_bytes = 0: it needs"):
        ep.Buffer(None, 1 << 20, 0, low_latency_mode=True, comm=solo.comm, device=solo.device)


def test_cleaning(ready):
    buffer = ready[0]
    assert buffer.clean_low_latency_buffer(9, 64, 8) is None
    for sizes, text in (
        ((4096, 64, 8), r"4096 tokens of hidden 64 on 1 ranks need num_rdma_bytes = \d+, the Buf"),
        ((9, 60, 8), "hidden = 60 must be a multiple of 8"),
        ((-1, 64, 8), "num_max_dispatch_tokens_per_rank = -1"),
        ((9, 64, 0), "num_experts = 0"),
    ):
        with pytest.raises(ep.EpInvalidArgument, match=text):
            buffer.clean_low_latency_buffer(*sizes)
    empty = buffer.get_local_buffer_tensor(dtype=torch.int32, use_rdma_buffer=True)
    assert empty.dtype == torch.int32 and empty.numel() == 0 and empty.device == buffer.device
    for options in (
        {},
        {"use_rdma_buffer": True, "offset": 8},
        {"use_rdma_buffer": True, "size": torch.Size([1])},
    ):
        with pytest.raises(ep.EpUnsupported, match="never needs cleaning"):
            buffer.get_local_buffer_tensor(torch.uint8, **options)


def test_without_low_latency_mode(solo):
    world = LlWorld(SHAPE)
    with solo.buffer() as buffer:
        with pytest.raises(ep.EpInvalidState, match="made without low_latency_mode"):
            dispatch(solo, buffer, world, BF16)
        with pytest.raises(ep.EpInvalidState, match="made without low_latency_mode"):
            buffer.clean_low_latency_buffer(9, 64, 8)
        with pytest.raises(ep.EpUnsupported, match="never needs cleaning"):
            buffer.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=True)


def test_hooks_are_called_once_and_in_time(solo):
    world = LlWorld(SHAPE)
    with ll_buffer(solo, SHAPE) as buffer:
        first, second = (dispatch(solo, buffer, world, BF16, **HOOK) for _ in range(2))
        with pytest.raises(ep.EpInvalidState, match="hook of the call before the last one"):
            dispatch(solo, buffer, world, BF16)
        for recv_x, count, handle, _, hook in (first, second):
            hook()
            world.check_dispatch(0, BF16, recv_x, count, handle)
            with pytest.raises(ep.EpInvalidState, match="the hook was called before"):
                hook()
        late = dispatch(solo, buffer, world, BF16, **HOOK)[4]
    with pytest.raises(ep.EpInvalidState, match="destroyed before the hook was called"):
        late()


def test_after_destroy(solo):
    with ll_buffer(solo, SHAPE, enable_shrink=True) as buffer:
        sent = solo.put(LlWorld(SHAPE).inputs[0])
        handle = dispatch(solo, buffer, LlWorld(SHAPE), BF16)[2]
    for call in (
        lambda: buffer.low_latency_dispatch(sent.x, sent.topk_idx, 9, 8),
        lambda: buffer.low_latency_combine(sent.x, sent.topk_idx, sent.topk_weights, handle),
        lambda: buffer.get_next_low_latency_combine_buffer(handle),
        lambda: buffer.clean_low_latency_buffer(9, 64, 8),
        lambda: buffer.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=True),
        lambda: buffer.low_latency_update_mask_buffer(0, True),
        lambda: buffer.low_latency_query_mask_buffer(torch.zeros(1, dtype=torch.int32)),
        lambda: buffer.low_latency_clean_mask_buffer(),
    ):
        with pytest.raises(ep.EpInvalidState, match="the Buffer was destroyed"):
            call()


# ---- lost ranks -------------------------------------------------------------------------------


def _absent(me, shape, call, how):
    """Rank 1 makes no second call: rank 0 names it after the limit."""
    world = LlWorld(shape)
    options = {"num_nvl_bytes": 1 << 20, "timeout": 3, "comm": me.comm, "device": me.device}
    hint = ep.Buffer.get_low_latency_rdma_size_hint(9, shape.hidden, 2, 8)
    buffer = ep.Buffer(me.group, num_rdma_bytes=hint, low_latency_mode=True, **options)
    ll_round_trip(me, buffer, world, BF16)
    recv_x, _, handle, *_ = dispatch(me, buffer, world, BF16)
    me.synchronize()
    if me.rank == 0:
        start = time.monotonic()
        with pytest.raises(ep.EpTimeout, match=r"rank 0 .* waited for rank 1"):
            if call == "dispatch":
                _, _, _, event, hook = dispatch(me, buffer, world, BF16, **how)
            else:
                _, event, hook = combine(me, buffer, world, BF16, recv_x, handle, **how)
            received(event, hook, **how)
            if me.platform == "cuda":  # there the next call says it
                me.synchronize()
                buffer.runtime.check_health()
        assert 2 < time.monotonic() - start < 60
        with pytest.raises(ep.EpTimeout, match="the Buffer is of no use since"):
            dispatch(me, buffer, world, BF16)
    me.barrier()


@pytest.mark.mp
@pytest.mark.parametrize("how", [{}, HOOK, {"async_finish": True}], ids=["whole", "hook", "async"])
@pytest.mark.parametrize("call", ["dispatch", "combine"])
def test_a_rank_that_does_not_call(run_ranks, call, how):
    run_ranks(_absent, 2, shape_for(2), call, how)
