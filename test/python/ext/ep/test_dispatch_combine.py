"""Dispatch and combine on several ranks, bit by bit against the reference."""

import dataclasses

import pytest
import torch
from checks import World, layout_of, round_trip, routing_of, same
from reference import Shape

pytestmark = pytest.mark.mp

SHAPES = {
    "bf16-1rank": Shape((17,)),
    "bf16-2ranks": Shape((33, 20)),
    "bf16-3ranks": Shape((16, 5, 23), hidden=136, experts=9, topk=3),
    "bf16-4ranks": Shape((24, 24, 24, 24), hidden=256, experts=16, topk=6),
    "bf16-hidden8": Shape((9, 9), hidden=8),
    "top1": Shape((31, 18), topk=1),
    "top32": Shape((6, 7), topk=32, experts=64),
    "fp8-2ranks": Shape((20, 28), hidden=256, fp8=True),
    "fp8-partial-block": Shape((20, 28), hidden=200, fp8=True),
    "fp8-4ranks": Shape((8, 19, 3, 12), hidden=384, experts=16, topk=4, fp8=True),
    "missing-choices": Shape((30, 30), topk=4, missing=0.5),
    "no-choice-at-all": Shape((12, 12), missing=1.0),
    "skewed": Shape((40, 40, 40, 40), skew=0.9, experts=16, topk=2),
    "no-tokens-on-rank0": Shape((0, 21)),
    "no-tokens-on-rank1-of-3": Shape((14, 0, 8), experts=6),
    "no-tokens-at-all": Shape((0, 0)),
    "no-tokens-fp8": Shape((0, 11), hidden=128, fp8=True),
}


def _every(me, shape):
    with me.buffer() as buffer:
        world = World(shape)
        round_trip(buffer, me, world, alignment=1, biases=0)
        round_trip(buffer, me, World(shape, seed=1), alignment=8, biases=1)
        round_trip(buffer, me, world, alignment=128, biases=2)


@pytest.mark.parametrize("name", SHAPES)
def test_round_trip(run_ranks, name):
    run_ranks(_every, SHAPES[name].ranks, SHAPES[name])


def _small_memory(me, shape):
    # The pool holds nothing and the staging area a few rows: every output is staged in pieces.
    with me.buffer(num_nvl_bytes=1 << 15, staging_bytes=3 << 13) as buffer:
        assert buffer.runtime.pool_bytes_free() <= 1 << 13
        round_trip(buffer, me, World(shape), biases=2)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_outputs_that_do_not_fit_the_pool_are_staged(run_ranks, fp8):
    run_ranks(_small_memory, 2, Shape((60, 50), hidden=256, fp8=fp8))


def _cached(me, shape):
    with me.buffer() as buffer:
        world = World(shape)
        handle = round_trip(buffer, me, world)
        for seed in (1, 2):  # other values, same routing
            other = World(shape, seed, routing_of_seed=0)
            sent = me.put(other.inputs[me.rank])
            result = buffer.dispatch(sent.payload, handle=handle)
            assert result[1:5] == (None, None, None, None)
            assert (type(result[0]) is tuple) == shape.fp8
            other.check_received(me.rank, result[0])
            combined, _, _ = buffer.combine(me.put(other.outputs[me.rank]), handle)
            same("combined_x", combined, other.combined(me.rank))


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_a_handle_replays_the_routing(run_ranks, fp8):
    run_ranks(_cached, 2, Shape((25, 14), hidden=128, fp8=fp8))


def _worst(me, shape, worst):
    with me.buffer() as buffer:
        world = World(shape)
        sent, got = me.put(world.inputs[me.rank]), world.received[me.rank]
        layout = layout_of(buffer, world, sent)
        for _ in range(2):
            recv_x, idx, weights, counts, handle, _ = buffer.dispatch(
                sent.payload, num_worst_tokens=worst, **routing_of(layout, sent)
            )
            n = got.x.size(0)
            assert counts == []
            assert recv_x.shape == (worst, shape.hidden) and handle.num_recv_tokens == worst
            world.check_received(me.rank, recv_x, slice(0, n))
            same("recv_topk_idx", idx[:n], got.topk_idx)
            assert (idx[n:] == -1).all()
            same("recv_topk_weights", weights[:n], got.topk_weights)
            same("counts", handle.recv_tokens_per_expert, torch.tensor(got.per_expert).int())
            out = torch.full((worst, shape.hidden), float("nan"), dtype=torch.bfloat16)
            out[:n] = world.outputs[me.rank]  # unused rows must not be read into a sum
            combined, _, _ = buffer.combine(me.put(out), handle)
            same("combined_x", combined, world.combined(me.rank))


@pytest.mark.parametrize("tokens", [(30, 22), (0, 9), (0, 0)], ids=str)
def test_num_worst_tokens(run_ranks, tokens):
    run_ranks(_worst, 2, Shape(tokens), 64)


def _expert_map(me, shape, hosts):
    with me.buffer() as buffer:
        world = World(shape, hosts=torch.tensor(hosts))
        sent, got = me.put(world.inputs[me.rank]), world.received[me.rank]
        experts = buffer.create_expert_map(hosts)
        layout = layout_of(buffer, world, sent, expert_map=experts)
        world.check_layout(me.rank, layout)
        recv_x, idx, weights, counts, handle, _ = buffer.dispatch(
            sent.payload, expert_map=experts, **routing_of(layout, sent)
        )
        world.check_received(me.rank, recv_x)
        same("recv_topk_idx", idx, got.topk_idx)
        assert counts == got.per_expert
        combined, _, _ = buffer.combine(me.put(world.outputs[me.rank]), handle)
        same("combined_x", combined, world.combined(me.rank))


def test_expert_map(run_ranks):
    run_ranks(_expert_map, 2, Shape((20, 30), experts=7), [1, 0, 1, 1, 0, 1, 1])


def _scales(me, shape):
    world = World(shape)
    with me.buffer() as buffer:
        sent = me.put(world.inputs[me.rank])
        routing = routing_of(layout_of(buffer, world, sent), sent)
        by_columns = sent.scales.t().contiguous().t()
        assert not by_columns.is_contiguous()
        recv_x, *_ = buffer.dispatch((sent.x, by_columns), **routing)
        world.check_received(me.rank, recv_x)
        packed = sent.scales.view(torch.int32)
        (x, scales), *_ = buffer.dispatch((sent.x, packed), **routing)
        assert scales.dtype == torch.int32
        world.check_received(me.rank, (x, scales.view(torch.float32)))


def test_scales_of_any_stride_and_packed(run_ranks):
    run_ranks(_scales, 2, Shape((20, 28), hidden=512, fp8=True))


def _without_topk(me, shape):
    world = World(shape)
    with me.buffer() as buffer:
        sent = me.put(world.inputs[me.rank])
        routing = routing_of(layout_of(buffer, world, sent), sent)
        routing.update(topk_idx=None, topk_weights=None)
        recv_x, idx, weights, counts, handle, _ = buffer.dispatch(sent.payload, **routing)
        world.check_received(me.rank, recv_x)
        assert idx is None and weights is None
        combined, weights, _ = buffer.combine(me.put(world.outputs[me.rank]), handle)
        same("combined_x", combined, world.combined(me.rank))
        assert weights is None


def test_without_topk(run_ranks):
    run_ranks(_without_topk, 2, Shape((20, 28)))


def _many_shapes_one_buffer(me):
    with me.buffer() as buffer:
        for seed, hidden in enumerate((64, 256, 8, 128)):
            shape = Shape((20 + seed, 7 * seed), hidden=hidden, topk=1 + seed)
            round_trip(buffer, me, World(shape, seed), biases=seed % 3)
            fp8 = dataclasses.replace(shape, fp8=True)
            round_trip(buffer, me, World(fp8, seed))


def test_shapes_change_between_calls(run_ranks):
    run_ranks(_many_shapes_one_buffer, 2)
