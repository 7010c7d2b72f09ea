"""Ranks that play several nodes on one host: dispatch and combine go between nodes by themselves."""

import pytest
import torch
from checks import World, layout_of, round_trip, routing_of, same
from reference import Shape

from mscclpp.ext import ep

pytestmark = pytest.mark.mp

SHAPES = {
    "2-nodes-of-1": Shape((33, 20), ranks_per_node=1),
    "2-nodes-of-2": Shape((24, 9, 0, 31), hidden=136, experts=16, topk=6, ranks_per_node=2),
    "4-nodes-of-1": Shape((8, 19, 3, 12), experts=16, topk=4, missing=0.3, ranks_per_node=1),
    "unequal-nodes": Shape((16, 5, 23), hidden=72, experts=9, topk=3, ranks_per_node=2),
    "fp8": Shape((20, 28), hidden=200, fp8=True, ranks_per_node=1),
}


def _transports(me):
    return ("cuda_ipc" if me.platform == "cuda" else "shm", "tcp")


def _every(me, shape):
    for transport in _transports(me):
        with me.buffer(ranks_per_node=shape.ranks_per_node, transport=transport) as buffer:
            round_trip(buffer, me, World(shape), biases=2)
            round_trip(buffer, me, World(shape, seed=1), alignment=8, biases=1)


@pytest.mark.parametrize("name", SHAPES)
def test_round_trip(run_ranks, name):
    run_ranks(_every, SHAPES[name].ranks, SHAPES[name])


def _modes(me, shape, worst):
    with me.buffer(ranks_per_node=shape.ranks_per_node, transport=_transports(me)[0]) as buffer:
        world = World(shape)
        sent, got = me.put(world.inputs[me.rank]), world.received[me.rank]
        layout = layout_of(buffer, world, sent)
        recv_x, idx, _, counts, handle, event = buffer.dispatch(
            sent.payload, num_worst_tokens=worst, async_finish=True, **routing_of(layout, sent)
        )
        event.current_stream_wait()
        assert counts == [] and recv_x.shape == (worst, shape.hidden)
        n = got.x.size(0)
        world.check_received(me.rank, recv_x, slice(0, n))
        assert (idx[n:] == -1).all()
        out = torch.full((worst, shape.hidden), float("nan"), dtype=torch.bfloat16)
        out[:n] = world.outputs[me.rank]
        combined, _, event = buffer.combine(me.put(out), handle, async_finish=True)
        event.current_stream_wait()
        same("combined_x", combined, world.combined(me.rank))
        again, *_ = buffer.dispatch(sent.payload, handle=handle)
        world.check_received(me.rank, again, slice(0, n))


def test_worst_case_and_cached_handle(run_ranks):
    run_ranks(_modes, 4, Shape((30, 22, 5, 0), experts=8, topk=3, ranks_per_node=2), 100)


def _bad_arguments(me, shape):
    with pytest.raises(ep.EpInvalidArgument, match="shm"):
        with me.buffer(ranks_per_node=shape.ranks_per_node, transport="carrier pigeon"):
            pass
    with me.buffer(ranks_per_node=shape.ranks_per_node, transport=_transports(me)[0]) as buffer:
        sent = me.put(World(shape).inputs[me.rank])
        layout = list(layout_of(buffer, World(shape), sent))
        layout[1] = layout[0].repeat(3)
        with pytest.raises(ep.EpInvalidArgument, match="num_tokens_per_rdma_rank"):
            buffer.dispatch(sent.payload, **routing_of(layout, sent))
        round_trip(buffer, me, World(shape))


def test_bad_arguments_are_named(run_ranks):
    run_ranks(_bad_arguments, 2, Shape((3, 4), ranks_per_node=1))
