"""The low-latency calls of vLLM and SGLang, argument by argument."""

import pytest
import torch
from low_latency_checks import BF16, dispatch, ll_buffer, shape_for
from low_latency_reference import FORMATS, Format, LlWorld, host

from mscclpp.ext import ep

pytestmark = pytest.mark.mp


def _vllm(me, shape, form):
    """DeepEPLLAll2AllManager and DeepEPLLPrepareAndFinalize."""
    group = {"group": me.group} if me.comm is None else {"group": None, "comm": me.comm}
    buffer = ep.Buffer(
        **group,
        num_nvl_bytes=1 << 20,
        num_rdma_bytes=ep.Buffer.get_low_latency_rdma_size_hint(
            num_max_dispatch_tokens_per_rank=shape.max_tokens,
            hidden=shape.hidden,
            num_ranks=me.size,
            num_experts=shape.experts,
        ),
        low_latency_mode=True,
        num_qps_per_rank=shape.experts // me.size,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        explicitly_destroy=True,
        enable_shrink=True,
        device=me.device,
    )
    assert buffer.low_latency_mode is True and buffer.enable_shrink is True
    for call in range(3):
        world = LlWorld(shape, call)
        sent = me.put(world.inputs[me.rank])
        expert_x, num_tokens, handle, _, hook = buffer.low_latency_dispatch(
            sent.x,
            sent.topk_idx,
            shape.max_tokens,
            shape.experts,
            use_fp8=form.use_fp8,
            round_scale=form.use_ue8m0,
            use_ue8m0=form.use_ue8m0,
            async_finish=False,
            return_recv_hook=True,
        )
        hook()
        world.check_dispatch(me.rank, form, expert_x, num_tokens, handle)
        fused = me.put(world.outputs(me.rank, form, expert_x))
        output, defer = torch.empty_like(sent.x), call % 2 > 0
        _, _, receive = buffer.low_latency_combine(
            fused,
            sent.topk_idx,
            sent.topk_weights,
            handle,
            async_finish=False,
            zero_copy=False,
            return_recv_hook=defer,
            out=output,
        )
        if defer:
            receive()
        world.check_combined(me.rank, form, output)
        mask = torch.zeros(me.size, device=me.device, dtype=torch.int32)
        buffer.low_latency_query_mask_buffer(mask)
        assert host(mask).tolist() == [0] * me.size
        buffer.low_latency_clean_mask_buffer()
        buffer.get_local_buffer_tensor(dtype=torch.uint8, use_rdma_buffer=True).zero_()
    buffer.destroy()


def _sglang(me, shape, form, return_recv_hook):
    """DeepEPBuffer and _DeepEPDispatcherImplLowLatency; with another dispatcher between (two-batch
    overlap) the halves interleave."""
    num_rdma_bytes = max(
        ep.Buffer.get_low_latency_rdma_size_hint(
            shape.max_tokens, shape.hidden, me.size, shape.experts
        ),
        0,
    )
    buffer = ep.Buffer(
        me.group if me.comm is None else None,
        1 << 20,
        num_rdma_bytes,
        low_latency_mode=True,
        num_qps_per_rank=shape.experts // me.size,
        allow_mnnvl=True,
        comm=me.comm,
        device=me.device,
    )
    if buffer.low_latency_mode and buffer.group_size == me.size:
        buffer.clean_low_latency_buffer(shape.max_tokens, shape.hidden, shape.experts)
    how = {"async_finish": not return_recv_hook, "return_recv_hook": return_recv_hook}
    for call in range(0, 6, 2):
        worlds = [LlWorld(shape, call), LlWorld(shape, call + 1)]
        states = []
        for world in worlds:
            sent = me.put(world.inputs[me.rank])
            states.append(
                buffer.low_latency_dispatch(
                    sent.x,
                    sent.topk_idx,
                    shape.max_tokens,
                    shape.experts,
                    use_fp8=form.use_fp8,
                    **how,
                    round_scale=form.round_scale,
                    use_ue8m0=form.use_ue8m0,
                )
            )
        combined = []
        for world, (recv, masked_m, handle, event, hook) in zip(worlds, states):
            hook() if return_recv_hook else event.current_stream_wait()
            world.check_dispatch(me.rank, form, recv, masked_m, handle)
        for world, (recv, masked_m, handle, event, hook) in zip(worlds, states):
            sent, x = me.put(world.inputs[me.rank]), me.put(world.outputs(me.rank, form, recv))
            # Two streams without overlap with the experts: what remains of it means nothing.
            extra = {"overlap": False, "num_sms": 3, "src_signals": None} if call else {}
            extra.update({"packed_recv_count": masked_m, "block_m": 64, "threshold": 7})
            combined.append(
                buffer.low_latency_combine(
                    x=x,
                    topk_idx=sent.topk_idx,
                    topk_weights=sent.topk_weights,
                    handle=handle,
                    **how,
                    **extra,
                )
            )
        for world, (hidden_states, event, hook) in zip(worlds, combined):
            hook() if return_recv_hook else event.current_stream_wait()
            world.check_combined(me.rank, form, hidden_states)
    buffer.destroy()


@pytest.mark.parametrize("form", ["bf16", "fp8", "ue8m0"])
def test_vllm(run_ranks, form):
    run_ranks(_vllm, 2, shape_for(2), FORMATS[form])


@pytest.mark.parametrize("return_recv_hook", [True, False], ids=["hook", "async"])
@pytest.mark.parametrize("form", ["bf16", "fp8", "ue8m0"])
def test_sglang(run_ranks, form, return_recv_hook):
    run_ranks(_sglang, 2, shape_for(2), FORMATS[form], return_recv_hook)


def _bf16_with_ue8m0(me, shape):
    """SGLang leaves round_scale and use_ue8m0 set when it asks for bfloat16: they mean nothing."""
    with ll_buffer(me, shape) as buffer:
        world, form = LlWorld(shape), Format(False, True, True)
        recv_x, count, handle, *_ = dispatch(me, buffer, world, form)
        world.check_dispatch(me.rank, BF16, recv_x, count, handle)


def test_bf16_ignores_the_format_of_scales(run_ranks):
    run_ranks(_bf16_with_ue8m0, 2, shape_for(2))
