"""Low-latency calls against the reference, used by several test files."""

import torch
from low_latency_reference import FORMATS, LlShape

from mscclpp.ext import ep

TOKENS = (7, 3, 9, 5)
BF16, FP8 = FORMATS["bf16"], FORMATS["fp8"]


def shape_for(ranks, **options):
    return LlShape(TOKENS[:ranks], **options)


def size_hint(*shapes, **options):
    return max(
        ep.Buffer.get_low_latency_rdma_size_hint(
            s.max_tokens, s.hidden, s.ranks, s.experts, **options
        )
        for s in shapes
    )


def ll_buffer(me, *shapes, **options):
    """A Buffer whose region holds these shapes, and no byte more."""
    options = {"num_nvl_bytes": 1 << 20, "num_rdma_bytes": size_hint(*shapes), **options}
    return me.buffer(low_latency_mode=True, **options)


def dispatch(me, buffer, world, form, **options):
    """(recv_x, count, handle, event, hook) of one call with this rank's part of the world."""
    shape, sent = world.shape, me.put(world.inputs[me.rank])
    return buffer.low_latency_dispatch(
        sent.x, sent.topk_idx, shape.max_tokens, shape.experts, **form.keywords, **options
    )


def combine(me, buffer, world, form, recv_x, handle, *, zero_copy=False, out=False, **options):
    """(combined_x, event, hook): experts' outputs for what was received, brought back."""
    sent = me.put(world.inputs[me.rank])
    x = me.put(world.outputs(me.rank, form, recv_x))
    if zero_copy:  # the tensor that is passed must not be read
        buffer.get_next_low_latency_combine_buffer(handle).copy_(x)
        x = torch.full_like(x, 3.0)
    if out:
        options["out"] = torch.full_like(sent.x, float("nan"))
    combined, event, hook = buffer.low_latency_combine(
        x, sent.topk_idx, sent.topk_weights, handle, zero_copy=zero_copy, **options
    )
    if out:
        assert combined is options["out"]
    if options.get("return_recv_hook"):  # the send half has read it
        x.fill_(5.0)
    return combined, event, hook


def received(event, hook, async_finish=False, return_recv_hook=False):
    """Waits as the call demands; checks what it returned for that."""
    assert isinstance(event, ep.EventOverlap)
    assert (event.event is not None) == async_finish
    assert (hook is not None) == return_recv_hook
    if hook is not None:
        assert hook() is None
    event.current_stream_wait()


def ll_round_trip(
    me, buffer, world, form, *, zero_copy=False, out=False, reduce="rank", use_logfmt=False, **how
):
    recv_x, count, handle, event, hook = dispatch(me, buffer, world, form, **how)
    received(event, hook, **how)
    world.check_dispatch(me.rank, form, recv_x, count, handle)
    options = {"zero_copy": zero_copy, "out": out, "combine_reduce": reduce, **how}
    combined, event, hook = combine(
        me, buffer, world, form, recv_x, handle, use_logfmt=use_logfmt, **options
    )
    received(event, hook, **how)
    world.check_combined(me.rank, form, combined, "logfmt" if use_logfmt else reduce)
    return combined
