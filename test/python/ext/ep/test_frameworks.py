"""The calls of the frameworks that use deep_ep, argument by argument."""

import sys

import pytest
import torch
from checks import World, same
from reference import Shape

from mscclpp.ext import ep
from mscclpp.ext.ep import compat

pytestmark = pytest.mark.mp

SHAPE = Shape((26, 19), hidden=256, topk=3)


def _group_options(me):
    return {"group": me.group} if me.comm is None else {"group": None, "comm": me.comm}


# ---- vLLM: DeepEPHTAll2AllManager, DeepEPHTPrepareAndFinalize ---------------------------------


def _vllm(me, shape, async_finish):
    world = World(shape)
    sent, got = me.put(world.inputs[me.rank]), world.received[me.rank]
    buffer = ep.Buffer(
        **_group_options(me),
        num_nvl_bytes=1 << 22,
        num_rdma_bytes=0,
        low_latency_mode=False,
        num_qps_per_rank=1,
        explicitly_destroy=True,
        device=me.device,
    )
    ep.Buffer.set_num_sms(20)
    previous = buffer.capture()
    capture = buffer.capture  # handed on as a callable
    layout = buffer.get_dispatch_layout(
        topk_idx=sent.topk_idx,
        num_experts=shape.experts,
        previous_event=previous,
        async_finish=False,
        allocate_on_comm_stream=False,
    )
    per_rank, per_rdma_rank, per_expert, in_rank, event = layout
    config = None if me.size not in (2, 4, 8) else buffer.get_dispatch_config(me.size)
    token_data, idx, weights, counts, handle, event = buffer.dispatch(
        x=sent.payload,
        handle=None,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=sent.topk_idx,
        topk_weights=sent.topk_weights,
        expert_alignment=1,
        config=config,
        previous_event=previous,
        async_finish=async_finish,
        allocate_on_comm_stream=False,
    )
    assert (event.event is not None) == async_finish
    if event.event is not None:
        event.current_stream_wait()
    world.check_received(me.rank, token_data)
    same("topk_idx", idx, got.topk_idx)
    assert torch.tensor(counts, dtype=torch.int32).sum() == (got.topk_idx >= 0).sum()
    combined, _, event = buffer.combine(
        x=me.put(world.outputs[me.rank]),
        handle=handle,
        topk_weights=None,
        config=None if me.size not in (2, 4, 8) else buffer.get_combine_config(me.size),
        previous_event=capture(),
        async_finish=async_finish,
        allocate_on_comm_stream=False,
    )
    if event.event is not None:
        event.current_stream_wait()
    same("combined_x", combined, world.combined(me.rank))
    buffer.destroy()


@pytest.mark.parametrize("async_finish", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_vllm(run_ranks, fp8, async_finish):
    run_ranks(_vllm, 2, Shape((26, 19), hidden=256, topk=3, fp8=fp8), async_finish)


# ---- SGLang: DeepEPBuffer, _DeepEPDispatcherImplNormal ----------------------------------------


class _SglangDispatcher:
    """Two of these share one Buffer (two-batch overlap)."""

    def __init__(self, me, buffer, world):
        self.me, self.buffer, self.world = me, buffer, world
        self.sent = me.put(world.inputs[me.rank])

    def dispatch_a(self):
        self.previous = self.buffer.capture()

    def dispatch_b(self):
        sent, buffer = self.sent, self.buffer
        layout = buffer.get_dispatch_layout(
            sent.topk_idx,
            self.world.shape.experts,
            previous_event=self.previous,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        per_rank, per_rdma_rank, per_expert, in_rank, previous = layout
        recv_x, idx, weights, counts, self.handle, event = buffer.dispatch(
            sent.payload,
            topk_idx=sent.topk_idx,
            topk_weights=sent.topk_weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=previous,
            async_finish=True,
            allocate_on_comm_stream=True,
            expert_alignment=128,
            config=buffer.get_dispatch_config(buffer.group_size),
        )
        event.current_stream_wait()
        assert all(count % 128 == 0 for count in counts)
        self.world.check_received(self.me.rank, recv_x)

    def combine_a(self):
        self.out = self.me.put(self.world.outputs[self.me.rank])
        self.previous = self.buffer.capture()

    def combine_b(self):
        combined, _, event = self.buffer.combine(
            self.out,
            self.handle,
            async_finish=True,
            previous_event=self.previous,
            allocate_on_comm_stream=True,
            config=self.buffer.get_combine_config(self.buffer.group_size),
        )
        event.current_stream_wait()
        same("combined_x", combined, self.world.combined(self.me.rank))


def _sglang(me, shape):
    hidden_bytes, num_nvl_bytes, num_rdma_bytes = shape.hidden * 2, 0, 0
    for config in (ep.Buffer.get_dispatch_config(me.size), ep.Buffer.get_combine_config(me.size)):
        num_nvl_bytes = max(config.get_nvl_buffer_size_hint(hidden_bytes, me.size), num_nvl_bytes)
        num_rdma_bytes = max(
            config.get_rdma_buffer_size_hint(hidden_bytes, me.size), num_rdma_bytes
        )
    assert num_rdma_bytes == 0
    group = me.group if me.comm is None else None
    buffer = ep.Buffer(
        group,
        num_nvl_bytes,
        num_rdma_bytes,
        low_latency_mode=False,
        num_qps_per_rank=max(1, ep.Buffer.num_sms // 2),
        allow_mnnvl=True,
        device=me.device,
        comm=me.comm,
    )
    assert buffer.low_latency_mode is False and buffer.group_size == me.size
    one, two = (_SglangDispatcher(me, buffer, World(shape, seed)) for seed in (1, 2))
    for _ in range(2):
        one.dispatch_a()
        two.dispatch_a()
        one.dispatch_b()
        two.dispatch_b()
        one.combine_a()
        two.combine_a()
        one.combine_b()
        two.combine_b()
    buffer.destroy()


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_sglang(run_ranks, fp8):
    run_ranks(_sglang, 2, Shape((26, 19), hidden=256, topk=3, fp8=fp8))


# ---- Megatron: fused_a2a.py -------------------------------------------------------------------


class FusedDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token_indices, token_probs, num_experts, buffer, async_finish, on_comm):
        previous = ep.EventOverlap(ep.EventHandle()) if async_finish else None
        per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
            token_indices,
            num_experts,
            previous_event=previous,
            async_finish=async_finish,
            allocate_on_comm_stream=on_comm,
        )
        recv_x, idx, probs, counts, handle, after = buffer.dispatch(
            x,
            topk_idx=token_indices,
            topk_weights=token_probs,  # fp32
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=event if async_finish else None,
            async_finish=async_finish,
            allocate_on_comm_stream=on_comm,
        )
        if async_finish:
            after.current_stream_wait()
        ctx.buffer, ctx.handle = buffer, handle
        ctx.async_finish, ctx.on_comm = async_finish, on_comm
        return recv_x, idx, probs, torch.tensor(counts), handle

    @staticmethod
    def backward(ctx, grad_output, grad_indices, grad_probs, grad_counts, grad_handle):
        previous = ep.EventOverlap(ep.EventHandle()) if ctx.async_finish else None
        grad_x, grad_weights, after = ctx.buffer.combine(
            grad_output.contiguous(),
            ctx.handle,
            topk_weights=grad_probs.float(),
            previous_event=previous,
            async_finish=ctx.async_finish,
            allocate_on_comm_stream=ctx.on_comm,
        )
        if ctx.async_finish:
            after.current_stream_wait()
        return grad_x, None, grad_weights, None, None, None, None


class FusedCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, buffer, handle, async_finish, on_comm):
        previous = ep.EventOverlap(ep.EventHandle()) if async_finish else None
        combined, _, after = buffer.combine(
            x,
            handle=handle,
            async_finish=async_finish,
            previous_event=previous,
            allocate_on_comm_stream=on_comm,
        )
        if async_finish:
            after.current_stream_wait()
        ctx.buffer, ctx.handle = buffer, handle
        ctx.async_finish, ctx.on_comm = async_finish, on_comm
        return combined

    @staticmethod
    def backward(ctx, grad_output):
        previous = ep.EventOverlap(ep.EventHandle()) if ctx.async_finish else None
        grad_x, _, _, _, _, after = ctx.buffer.dispatch(
            grad_output.contiguous(),
            handle=ctx.handle,
            previous_event=previous,
            async_finish=ctx.async_finish,
            allocate_on_comm_stream=ctx.on_comm,
        )
        if ctx.async_finish:
            after.current_stream_wait()
        return grad_x, None, None, None, None


def _megatron(me, shape, async_finish, on_comm):
    world = World(shape)
    sent, got = me.put(world.inputs[me.rank]), world.received[me.rank]
    # Megatron passes three arguments; the others say where this test's ranks are.
    group = me.group if me.comm is None else None
    buffer = ep.Buffer(group, 1 << 22, 0, comm=me.comm, device=me.device)
    x = sent.x.clone().requires_grad_()
    probs = sent.topk_weights.clone().requires_grad_()
    recv_x, idx, recv_probs, counts, handle = FusedDispatch.apply(
        x, sent.topk_idx, probs, shape.experts, buffer, async_finish, on_comm
    )
    world.check_received(me.rank, recv_x)
    assert counts.tolist() == got.per_expert
    # An expert does nothing but weight its rows; choices of other ranks do not count.
    local = torch.where(idx >= 0, recv_probs, 0.0)
    weighted = (recv_x.float() * local.sum(1, keepdim=True)).bfloat16()
    out = FusedCombine.apply(weighted, buffer, handle, async_finish, on_comm)
    grad_out = torch.full_like(out, 0.5)
    out.backward(grad_out)

    # In the reference, with autograd over plain torch:
    ref_x = [w.x.float().clone().requires_grad_() for w in world.inputs]
    ref_p = [w.topk_weights.clone().requires_grad_() for w in world.inputs]
    for rank in range(shape.ranks):
        per_token = torch.where(world.inputs[rank].topk_idx >= 0, ref_p[rank], 0.0)
        (ref_x[rank] * per_token.sum(1, keepdim=True) * 0.5).sum().backward()
    for name, mine, wanted in (
        ("x.grad", x.grad, ref_x[me.rank].grad),
        ("probs.grad", probs.grad, ref_p[me.rank].grad),
    ):
        assert mine is not None and mine.shape == wanted.shape
        wanted = wanted.clone()
        scale = wanted.abs().max().clamp_min(1e-6) if wanted.numel() else torch.tensor(1.0)
        error = (mine.cpu().float() - wanted).abs().max() if wanted.numel() else torch.tensor(0.0)
        assert error <= 0.02 * scale, f"{name}: error {error} at scale {scale}"
    buffer.destroy()


@pytest.mark.parametrize(
    "async_finish, on_comm",
    [(False, False), (True, True), (True, False)],
    ids=["sync", "async-comm", "async-compute"],
)
@pytest.mark.parametrize("tokens", [(26, 19), (0, 19), (0, 0)], ids=str)
def test_megatron(run_ranks, tokens, async_finish, on_comm):
    shape = Shape(tokens, hidden=64, topk=3, missing=0.2)
    run_ranks(_megatron, 2, shape, async_finish, on_comm)


def test_deep_ep_by_name(monkeypatch):
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    monkeypatch.delitem(sys.modules, "deep_ep.utils", raising=False)
    compat.install_as_deep_ep()
    compat.install_as_deep_ep()  # again does no harm
    import deep_ep
    from deep_ep import Buffer, Config
    from deep_ep.utils import EventHandle, EventOverlap

    assert (Buffer, Config) == (ep.Buffer, ep.Config) and deep_ep.topk_idx_t == torch.int64
    assert (EventHandle, EventOverlap) == (ep.EventHandle, ep.EventOverlap)
    monkeypatch.setitem(sys.modules, "deep_ep", sys)
    with pytest.raises(ImportError, match="already imported"):
        compat.install_as_deep_ep()
