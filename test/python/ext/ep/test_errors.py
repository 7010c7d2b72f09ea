"""Bad input and lost ranks: a clear error on every rank, and no hang."""

import os
import time
from types import SimpleNamespace

import pytest
import torch
from checks import World, layout_of, round_trip, routing_of
from ranks import RanksFailed
from reference import Shape

from mscclpp.ext import ep

SHAPE = Shape((12,), hidden=64, topk=2)


@pytest.fixture
def ready(solo):
    """A Buffer and everything a good call needs."""
    with solo.buffer() as buffer:
        world = World(SHAPE)
        sent = solo.put(world.inputs[0])
        routing = routing_of(layout_of(buffer, world, sent), sent)
        handle = buffer.dispatch(sent.x, **routing)[4]
        yield buffer, sent, routing, handle
        round_trip(buffer, solo, world)  # a refused call leaves the Buffer as it was


# name: (changes to a good dispatch, what the message must say)
BAD_DISPATCH = {
    "x-missing": ({"x": None}, r"x is a NoneType: it must be a torch.Tensor"),
    "x-list": ({"x": [1.0]}, r"a tuple of 1 was passed"),
    "x-float16": ({"x": torch.half}, r"x is float16\[12, 64\]: its dtype must be one of bfloat16"),
    "x-float32": ({"x": torch.float}, r"x is f32\[12, 64\]: its dtype must be bf16"),
    "x-1d": ({"x": lambda t: t.flatten()}, r"x is bf16\[768\]: its shape must be"),
    "x-stride": ({"x": lambda t: t[:, ::2]}, r"x is bf16\[12, 32\] with gaps.*contiguous"),
    "x-transposed": ({"x": lambda t: t.t()}, r"x is bf16\[64, 12\] with gaps or transposed"),
    "x-hidden": ({"x": lambda t: t[:, :12].contiguous()}, r"hidden must be a multiple of 8"),
    "x-rows": ({"x": lambda t: t[:5]}, r"is_token_in_rank is u8\[12, 1\]: its shape must be \[5"),
    "x-meta": ({"x": lambda t: t.to("meta")}, r"on meta: it must be on cpu or cuda"),
    "x-misaligned": ({"x": lambda t: t.flatten()[1:-63].view(11, 64)}, r"multiple of 8 bytes"),
    "fp8-without-scales": ({"x": torch.float8_e4m3fn}, r"e4m3 needs scales"),
    "bf16-with-scales": (
        {"x": lambda t: (t, torch.ones(12, 1, device=t.device))},
        r"bf16 has none",
    ),
    "scales-shape": (
        {"x": lambda t: (t.to(torch.float8_e4m3fn), torch.ones(12, 2, device=t.device))},
        r"x_scales is f32\[12, 2\]: its shape must be \[12, 1\]",
    ),
    "topk-int32": ({"topk_idx": torch.int32}, r"topk_idx is i32\[12, 2\]: its dtype must be i64"),
    "topk-alone": ({"topk_weights": None}, r"give both or neither"),
    "weights-bf16": ({"topk_weights": torch.bfloat16}, r"topk_weights is bf16.*must be f32"),
    "in-rank-missing": ({"is_token_in_rank": None}, r"is_token_in_rank is missing"),
    "in-rank-shape": ({"is_token_in_rank": lambda t: t[:4]}, r"is_token_in_rank is u8\[4, 1\]"),
    "per-expert-missing": ({"num_tokens_per_expert": None}, r"num_tokens_per_expert is missing"),
    "per-rank-shape": (
        {"num_tokens_per_rank": lambda t: t.repeat(2)},
        r"num_tokens_per_rank is i32\[2\]: its shape must be \[1\]",
    ),
    "rdma": (
        {"num_tokens_per_rdma_rank": torch.zeros(1)},
        r"num_tokens_per_rdma_rank is f32\[1\]: its dtype must be i32",
    ),
    "alignment": ({"expert_alignment": 0}, r"expert_alignment = 0 must be at least 1"),
    "worst": ({"num_worst_tokens": 11}, r"x has 12 tokens, more than num_worst_tokens = 11"),
    "worst-negative": ({"num_worst_tokens": -1}, r"num_worst_tokens = -1"),
    "handle-type": ({"handle": (1, 2), "topk_idx": None, "topk_weights": None}, r"is a tuple"),
    "handle-and-topk": ({"handle": "good"}, r"leave topk_idx and topk_weights out"),
}


def _changed(value, change):
    if isinstance(change, torch.dtype):
        return value.to(change)
    return change(value) if callable(change) else change


@pytest.mark.parametrize("name", BAD_DISPATCH)
def test_dispatch_refuses(ready, name):
    buffer, sent, routing, handle = ready
    changes, text = BAD_DISPATCH[name]
    arguments = {"x": sent.x, **routing}
    for key, change in changes.items():
        arguments[key] = handle if change == "good" else _changed(arguments.get(key), change)
    with pytest.raises((ep.EpInvalidArgument, ep.EpUnsupported), match=text) as caught:
        buffer.dispatch(**arguments)
    assert caught.value.code in ("invalidArgument", "unsupported")


BAD_COMBINE = {
    "x-dtype": ({"x": torch.float}, r"x is f32\[12, 64\]: its dtype must be bf16"),
    "x-rows": ({"x": lambda t: t[:3]}, r"x is bf16\[3, 64\]: its shape must be \[12"),
    "x-stride": ({"x": lambda t: t[:, ::2]}, r"with gaps"),
    "weights-shape": ({"topk_weights": torch.ones(3, 2)}, r"topk_weights is f32\[3, 2\]"),
    "bias-shape": ({"bias": torch.ones(12, 8).bfloat16()}, r"bias is bf16\[12, 8\]: its shape"),
    "bias-dtype": ({"bias": torch.ones(12, 64)}, r"bias is f32\[12, 64\]: its dtype"),
    "bias-three": ({"bias": (1, 2, 3)}, r"a tuple of 3 was passed"),
    "handle-none": ({"handle": None}, r"handle is a NoneType"),
}


@pytest.mark.parametrize("name", BAD_COMBINE)
def test_combine_refuses(ready, name, solo):
    buffer, sent, routing, handle = ready
    changes, text = BAD_COMBINE[name]
    arguments = {"x": sent.x, "handle": handle}
    for key, change in changes.items():
        value = _changed(arguments.get(key), change)
        arguments[key] = value.to(solo.device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(ep.EpInvalidArgument, match=text):
        buffer.combine(**arguments)


@pytest.mark.parametrize(
    "topk_idx, experts, text",
    [
        (torch.zeros(4, 2, dtype=torch.int64), 0, r"num_experts = 0 must be in 1"),
        (torch.zeros(4, 33, dtype=torch.int64), 8, r"top-k must be in 1 .. 32"),
        (torch.zeros(4, dtype=torch.int64), 8, r"topk_idx is i64\[4\]: its shape"),
        (torch.zeros(4, 2), 8, r"topk_idx is f32\[4, 2\]: its dtype must be i64"),
        (torch.zeros(4, 2, dtype=torch.int64), 5000, r"max_experts_per_rank = 1024"),
    ],
    ids=["experts", "topk", "1d", "dtype", "many"],
)
def test_layout_refuses(ready, solo, topk_idx, experts, text):
    with pytest.raises(ep.EpInvalidArgument, match=text):
        ready[0].get_dispatch_layout(topk_idx.to(solo.device), experts)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"comm": None}, "needs one of group"),
        ({"timeout": -1}, "timeout = -1"),
        ({"num_nvl_bytes": -5}, "num_nvl_bytes = -5"),
        ({"num_rdma_bytes": -5}, "num_rdma_bytes = -5"),
        ({"device": "meta"}, "allowed are cpu and cuda"),
        ({"max_experts_per_rank": 0}, "max_experts_per_rank|maxExpertsPerRank"),
        ({"num_nvl_bytes": 1 << 20, "staging_bytes": 1 << 21}, "staging"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_construction_refuses(solo, options, text):
    with pytest.raises(ep.EpInvalidArgument, match=text):
        ep.Buffer(None, **{"num_nvl_bytes": 1 << 20, "comm": solo.comm, **options})


def test_a_build_without_cuda_says_so(solo):
    if ep._cpp.has_cuda():
        pytest.skip("this build has CUDA kernels")
    with pytest.raises(ep.EpUnsupported, match="this build has no CUDA kernels"):
        ep.Buffer(None, 1 << 20, comm=solo.comm, device="cuda")


def test_without_memory_nothing_can_be_dispatched(solo):
    with solo.buffer(num_nvl_bytes=0) as buffer:
        world = World(SHAPE)
        sent = solo.put(world.inputs[0])
        routing = routing_of(layout_of(buffer, world, sent), sent)
        with pytest.raises(ep.EpInvalidArgument, match="num_nvl_bytes"):
            buffer.dispatch(sent.x, **routing)


def test_the_other_device(solo, platform):
    if platform != "cuda":
        pytest.skip("needs a GPU: tensors of another device")
    with solo.buffer() as buffer:
        topk_idx = torch.zeros(4, 2, dtype=torch.int64)
        with pytest.raises(ep.EpInvalidArgument, match="topk_idx is on the cpu platform"):
            buffer.get_dispatch_layout(topk_idx, 8)


def test_after_destroy(solo):
    buffer = ep.Buffer(None, 1 << 20, comm=solo.comm, device=solo.device)
    x = torch.zeros(4, 64, dtype=torch.bfloat16, device=solo.device)
    idx = torch.zeros(4, 2, dtype=torch.int64, device=solo.device)
    buffer.destroy()
    for call in (
        lambda: buffer.get_dispatch_layout(idx, 8),
        lambda: buffer.dispatch(x),
        lambda: buffer.combine(x, None),
        lambda: buffer.empty_in_pool((4, 4)),
        lambda: buffer.in_pool(x),
        lambda: buffer.get_comm_stream(),
        lambda: buffer.create_expert_map([0]),
    ):
        with pytest.raises(ep.EpInvalidState, match="the Buffer was destroyed"):
            call()


# ---- several ranks ----------------------------------------------------------------------------

TWO = Shape((12, 15), hidden=64, topk=2)


def _let_cuda_report(me, buffer):
    """On CUDA a call that does not block reports at the next one; on the CPU it must do so itself."""
    if me.platform == "cuda":
        me.synchronize()
        buffer.runtime.check_health()


def _dispatch_args(me, buffer, world):
    sent = me.put(world.inputs[me.rank])
    return sent, routing_of(layout_of(buffer, world, sent), sent)


def _bad_expert(me):
    world = World(TWO)
    if me.rank == 1:
        world.inputs[1].topk_idx[3, 1] = 77
    buffer = ep.Buffer(me.group, 1 << 20, comm=me.comm, device=me.device, timeout=20)
    sent, routing = _dispatch_args(me, buffer, world)
    with pytest.raises(
        ep.EpInvalidArgument, match=r"rank 1 passed expert id 77.*allowed are 0 .. 7"
    ):
        buffer.dispatch(sent.x, **routing)
    me.barrier()


@pytest.mark.mp
def test_expert_id_out_of_range(run_ranks):
    run_ranks(_bad_expert, 2)


def _unequal(me, what):
    buffer = ep.Buffer(me.group, 1 << 20, comm=me.comm, device=me.device, timeout=20)
    shape = TWO
    if me.rank == 1 and what == "hidden":
        shape = Shape((12, 15), hidden=128, topk=2)
    if me.rank == 1 and what == "topk":
        shape = Shape((12, 15), hidden=64, topk=3)
    sent, routing = _dispatch_args(me, buffer, World(shape))
    if me.rank == 1 and what == "worst":
        routing["num_worst_tokens"] = 64
    with pytest.raises(ep.EpInvalidArgument, match=r"rank [01] called dispatch.*equal") as caught:
        buffer.dispatch(sent.x, **routing)
        _let_cuda_report(me, buffer)
    me.barrier()
    return str(caught.value)


@pytest.mark.mp
@pytest.mark.parametrize("what", ["hidden", "topk", "worst"])
def test_unequal_arguments(run_ranks, what):
    run_ranks(_unequal, 2, what)


def _join(me, kinds):
    place = SimpleNamespace(device=torch.device(kinds[me.rank]))
    with pytest.raises(ep.EpError) as caught:
        ep.bootstrap.join(me.group, me.comm, None, place, 20)
    return str(caught.value)


@pytest.mark.mp
def test_unequal_platforms(run_ranks):
    for text in run_ranks(_join, 2, ["cpu", "cuda"]):
        assert "on cpu on rank 0 and on cuda on rank 1" in text


def _cannot_listen(me):
    def broken():
        raise ep.EpSystemError("no socket today")

    with pytest.MonkeyPatch.context() as patch:
        if me.rank == 0:  # threads share the module, but only rank 0 listens
            patch.setattr(ep._cpp, "create_unique_id", broken)
        return _join(me, ["cpu", "cpu"])


@pytest.mark.mp
def test_rank_0_cannot_listen(run_ranks):
    for text in run_ranks(_cannot_listen, 2):
        assert text == "rank 0 cannot listen for the others: no socket today"


def _unequal_options(me):
    bytes_here = 1 << (20 + me.rank)
    with pytest.raises(ep.EpInvalidArgument, match="must be equal on all ranks.*rank 1"):
        ep.Buffer(me.group, bytes_here, comm=me.comm, device=me.device, timeout=20)
    with me.buffer() as buffer:  # the group is as good as before
        round_trip(buffer, me, World(TWO))


@pytest.mark.mp
def test_unequal_options(run_ranks):
    run_ranks(_unequal_options, 2)


def _absent(me, call):
    """Rank 1 makes no call: the others are told who is missing, within the limit."""
    world, texts = World(TWO), []
    buffer = ep.Buffer(me.group, 1 << 20, comm=me.comm, device=me.device, timeout=4)
    sent, routing = _dispatch_args(me, buffer, world)
    handle = buffer.dispatch(sent.x, **routing)[4]
    out = me.put(world.outputs[me.rank])
    buffer.combine(out, handle)
    me.synchronize()
    if me.rank == 0:
        start = time.monotonic()
        with pytest.raises(ep.EpTimeout, match=r"rank 0 .* waited for rank 1") as caught:
            if call == "dispatch":
                buffer.dispatch(sent.x, **routing)
            elif call == "cached":
                buffer.dispatch(sent.x, handle=handle)
            elif call == "combine":
                buffer.combine(out, handle)
            else:
                event = buffer.combine(out, handle, async_finish=True)[2]
                event.current_stream_wait()
            _let_cuda_report(me, buffer)
        texts.append(str(caught.value))
        assert isinstance(caught.value, TimeoutError) and caught.value.code == "timeout"
        assert 3 < time.monotonic() - start < 60
        with pytest.raises(ep.EpTimeout, match="the Buffer is of no use since"):
            buffer.combine(out, handle)
    me.barrier()
    return texts


@pytest.mark.mp
@pytest.mark.parametrize("call", ["dispatch", "cached", "combine", "async-combine"])
def test_a_rank_that_does_not_call(run_ranks, call):
    texts = run_ranks(_absent, 2, call)[0]
    assert "it has not entered this call" in texts[0]


def _dies(me):
    buffer = ep.Buffer(me.group, 1 << 20, comm=me.comm, device=me.device, timeout=4)
    world = World(TWO)
    sent, routing = _dispatch_args(me, buffer, world)
    handle = buffer.dispatch(sent.x, **routing)[4]
    me.synchronize()
    me.barrier()
    if me.rank == 1:
        os._exit(3)
    with pytest.raises((ep.EpTimeout, ep.EpPeerFailure), match="rank 1"):
        buffer.combine(me.put(world.outputs[me.rank]), handle)
        _let_cuda_report(me, buffer)
    del buffer  # neither this nor destroy() hangs without the peer


@pytest.mark.mp
def test_a_rank_that_dies(run_ranks, request):
    if request.config.getoption("--threads"):
        pytest.skip("needs processes: a thread cannot die alone")
    with pytest.raises(RanksFailed) as caught:
        run_ranks(_dies, 2)
    assert "rank 0: no error" in str(caught.value)
    assert "rank 1: died, exit code 3" in str(caught.value)
