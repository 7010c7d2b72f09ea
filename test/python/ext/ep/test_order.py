"""Events, asynchronous calls, sequences of calls, several Buffers, tensors of the pool."""

import gc
import itertools

import pytest
import torch
from checks import World, layout_of, round_trip, routing_of, same
from reference import Shape

from mscclpp.ext import ep

pytestmark = pytest.mark.mp

SHAPE = Shape((28, 17), hidden=128, topk=3)


def _wait(event, how):
    """The three ways to wait for an EventOverlap."""
    assert event.event is not None
    if how == "call":
        event.current_stream_wait()
    elif how == "with":
        with event:
            pass
    else:
        event.event.current_stream_wait()


def _asynchronous(me, previous, allocate, how):
    """Every combination of previous_event and allocate_on_comm_stream, without any other wait."""
    options = {"async_finish": True, "allocate_on_comm_stream": allocate}

    def capture():
        return {**options, "previous_event": ep.Buffer.capture() if previous else None}

    with me.buffer() as buffer:
        for seed in range(3):
            world = World(SHAPE, seed)
            sent, got = me.put(world.inputs[me.rank]), world.received[me.rank]
            layout = layout_of(buffer, world, sent, **capture())
            first = {"previous_event": layout[4]} if previous else {}
            if not previous:
                _wait(layout[4], how)
            recv_x, idx, weights, counts, handle, event = buffer.dispatch(
                sent.payload, **routing_of(layout, sent), **{**capture(), **first}
            )
            _wait(event, how)
            world.check_layout(me.rank, layout)
            world.check_received(me.rank, recv_x)
            assert counts == got.per_expert
            out = me.put(world.outputs[me.rank])
            combined, weights, event = buffer.combine(out, handle, weights, **capture())
            _wait(event, how)
            same("combined_x", combined, world.combined(me.rank))
            same("combined_topk_weights", weights, world.combined_weights(me.rank))


@pytest.mark.parametrize("how", ["call", "with", "handle"])
@pytest.mark.parametrize("allocate", [False, True], ids=["compute", "comm"])
@pytest.mark.parametrize("previous", [False, True], ids=["none", "captured"])
def test_asynchronous_calls(run_ranks, previous, allocate, how):
    run_ranks(_asynchronous, 2, previous, allocate, how)


def _does_not_block(me):
    """Asynchronous calls return before the other ranks have come."""
    world = World(SHAPE)
    with me.buffer() as buffer:
        sent, out = me.put(world.inputs[me.rank]), me.put(world.outputs[me.rank])
        handle = buffer.dispatch(sent.payload, **routing_of(layout_of(buffer, world, sent), sent))[
            4
        ]
        me.synchronize()
        if me.rank == 1:
            me.barrier()
        recv_x, *_, first = buffer.dispatch(sent.payload, handle=handle, async_finish=True)
        combined, _, second = buffer.combine(out, handle, async_finish=True)
        if me.rank == 0:
            assert not first.event.query() and not second.event.query()
            me.barrier()
        first.current_stream_wait()
        second.current_stream_wait()
        world.check_received(me.rank, recv_x)
        same("combined_x", combined, world.combined(me.rank))


def test_asynchronous_calls_do_not_block(run_ranks):
    run_ranks(_does_not_block, 2)


def _inputs_are_dropped(me):
    """Inputs of an asynchronous call may be dropped and their memory written over at once."""
    world = World(SHAPE)
    with me.buffer() as buffer:
        sent = me.put(world.inputs[me.rank])
        layout = layout_of(buffer, world, sent)
        handle = buffer.dispatch(sent.payload, **routing_of(layout, sent))[4]
        outputs = me.put(world.outputs[me.rank])
        for _ in range(5):
            x = sent.x.clone()
            recv_x, *_, event = buffer.dispatch(x, handle=handle, async_finish=True)
            del x
            noise = [torch.full_like(sent.x, 7.0) for _ in range(8)]
            out = outputs.clone()
            combined, _, event_2 = buffer.combine(out, handle, async_finish=True)
            del out
            noise += [torch.full_like(recv_x, 9.0) for _ in range(8)]
            event.current_stream_wait()
            event_2.current_stream_wait()
            world.check_received(me.rank, recv_x)
            same("combined_x", combined, world.combined(me.rank))
            del noise
        buffer.get_dispatch_layout(sent.topk_idx, SHAPE.experts)
        assert len(buffer._in_flight) == 0, "inputs are held although their calls are done"


def test_inputs_of_asynchronous_calls_may_be_dropped(run_ranks):
    run_ranks(_inputs_are_dropped, 2)


def _sequence(me, order):
    """Several handles are open at a time, and combines come in any order."""
    worlds = {name: World(SHAPE, seed) for seed, name in enumerate("abc")}
    handles = {}
    with me.buffer() as buffer:
        for step in order:
            name, world = step.lower(), worlds[step.lower()]
            sent = me.put(world.inputs[me.rank])
            if step.islower():
                layout = layout_of(buffer, world, sent)
                recv_x, *_, handles[name], _ = buffer.dispatch(
                    sent.payload, **routing_of(layout, sent)
                )
                world.check_received(me.rank, recv_x)
            else:
                out = me.put(world.outputs[me.rank])
                combined, _, _ = buffer.combine(out, handles[name])
                same(f"combined_x of {name}", combined, world.combined(me.rank))


@pytest.mark.parametrize("order", ["abAB", "abBA", "abcCABabCBA", "aAAAbB", "aaaaAbBbA"])
def test_sequences(run_ranks, order):
    run_ranks(_sequence, 2, order)


def _two_buffers(me):
    with me.buffer() as first, me.buffer(num_nvl_bytes=1 << 21) as second:
        a, b = World(SHAPE, 1), World(SHAPE, 2)
        sent_a, sent_b = me.put(a.inputs[me.rank]), me.put(b.inputs[me.rank])
        for _ in range(2):
            la, lb = layout_of(first, a, sent_a), layout_of(second, b, sent_b)
            xa, *_, ha, ea = first.dispatch(
                sent_a.payload, **routing_of(la, sent_a), async_finish=True
            )
            xb, *_, hb, eb = second.dispatch(
                sent_b.payload, **routing_of(lb, sent_b), async_finish=True
            )
            cb, _, fb = second.combine(
                me.put(b.outputs[me.rank]), hb, previous_event=eb, async_finish=True
            )
            ca, _, fa = first.combine(
                me.put(a.outputs[me.rank]), ha, previous_event=ea, async_finish=True
            )
            for event in (ea, eb, fa, fb):
                event.current_stream_wait()
            a.check_received(me.rank, xa)
            b.check_received(me.rank, xb)
            same("combined_x of the first", ca, a.combined(me.rank))
            same("combined_x of the second", cb, b.combined(me.rank))
        with pytest.raises(ep.EpInvalidArgument, match="another Buffer"):
            first.combine(me.put(b.outputs[me.rank]), hb)


def test_two_buffers_side_by_side(run_ranks):
    run_ranks(_two_buffers, 2)


def _chain(me):
    """One Buffer's asynchronous output is the other's input: only the event orders the two."""
    world = World(SHAPE)
    with me.buffer() as first, me.buffer() as second:
        sent = me.put(world.inputs[me.rank])
        layout = layout_of(first, world, sent)
        handles = [b.dispatch(sent.payload, **routing_of(layout, sent))[4] for b in (first, second)]
        out = me.put(world.outputs[me.rank])
        wanted = [world.combined(rank) for rank in range(me.size)]
        got = world.received[me.rank]
        rows = [wanted[r][t] for r, t in zip(got.source_rank.tolist(), got.source_token.tolist())]
        me.synchronize()
        for _ in range(10):
            combined, _, event = first.combine(out, handles[0], async_finish=True)
            recv_x, *_, event = second.dispatch(
                combined, handle=handles[1], previous_event=event, async_finish=True
            )
            event.current_stream_wait()
            same("recv_x", recv_x, torch.stack(rows))


def test_previous_event_of_another_buffer(run_ranks):
    run_ranks(_chain, 2)


def _side_stream(me):
    """previous_event of a stream that is not the current one; the current one is not waited for."""
    world = World(SHAPE)
    with me.buffer() as buffer:
        sent = me.put(world.inputs[me.rank])
        routing = routing_of(layout_of(buffer, world, sent), sent)
        handle = buffer.dispatch(sent.payload, **routing)[4]
        side, x = torch.cuda.Stream(me.device), torch.zeros_like(sent.x)
        busy = torch.randn(2048, 2048, device=me.device)
        me.synchronize()
        for _ in range(3):
            x.zero_()
            side.wait_stream(torch.cuda.current_stream(me.device))
            with torch.cuda.stream(side):
                for _ in range(10):
                    busy = (busy @ busy).clamp(-1, 1)
                x.copy_(sent.x)
                event = ep.Buffer.capture()
            recv_x, *_ = buffer.dispatch(x, handle=handle, previous_event=event)
            world.check_received(me.rank, recv_x)


def test_previous_event_of_another_stream(run_ranks, platform):
    if platform != "cuda":
        pytest.skip("needs a GPU: the CPU has one stream")
    run_ranks(_side_stream, 2)


def _pool(me):
    world = World(SHAPE)
    with me.buffer() as buffer:
        sent = me.put(world.inputs[me.rank])
        layout = layout_of(buffer, world, sent)
        recv_x, *_, handle, _ = buffer.dispatch(sent.payload, **routing_of(layout, sent))
        assert buffer.in_pool(recv_x)
        free = buffer.runtime.pool_bytes_free()
        out = buffer.empty_in_pool(recv_x.shape)
        assert buffer.in_pool(out) and out.shape == recv_x.shape and out.dtype == torch.bfloat16
        assert buffer.runtime.pool_bytes_free() < free
        out.copy_(me.put(world.outputs[me.rank]))
        ordinary = out.clone()
        assert not buffer.in_pool(ordinary)
        for x in (out, ordinary):
            combined, _, _ = buffer.combine(x, handle)
            same("combined_x", combined, world.combined(me.rank))
        view = out[1:]  # views keep the memory
        del out, x
        assert buffer.runtime.pool_bytes_free() < free
        del view
        assert buffer.runtime.pool_bytes_free() == free, "dropped tensors must go back to the pool"
        large = buffer.empty_in_pool((1 << 21, 8))
        assert not buffer.in_pool(large)  # full: ordinary memory
        for dtype in (torch.float32, torch.int64, torch.float8_e4m3fn, torch.bool, torch.uint8):
            made = buffer.empty_in_pool((3, 16), dtype)
            assert made.dtype == dtype and made.shape == (3, 16) and made.device == sent.x.device
            assert buffer.in_pool(made)


def test_pool_tensors(run_ranks):
    run_ranks(_pool, 2)


def _dropped_outputs(me):
    """Neither the handle nor the event holds what the dispatch received."""
    world = World(SHAPE)
    with me.buffer() as buffer:
        sent = me.put(world.inputs[me.rank])
        routing = routing_of(layout_of(buffer, world, sent), sent)
        free = buffer.runtime.pool_bytes_free()
        recv_x, *others, handle, event = buffer.dispatch(sent.x, async_finish=True, **routing)
        assert buffer.runtime.pool_bytes_free() < free
        event.current_stream_wait()
        me.synchronize()
        del recv_x, others
        kept = handle.recv_tokens_per_expert  # in the pool or not, it is small
        assert buffer.runtime.pool_bytes_free() > free - 4096, "something holds received rows"
        assert kept.sum() > 0


def test_dropped_outputs_go_back_to_the_pool(run_ranks):
    run_ranks(_dropped_outputs, 2)


def _held_outputs(me):
    """Outputs belong to the caller: later calls and the end of the Buffer leave them alone."""
    worlds, held = [World(SHAPE, seed) for seed in range(6)], []
    with me.buffer() as buffer:
        for world in worlds:
            sent = me.put(world.inputs[me.rank])
            layout = layout_of(buffer, world, sent)
            recv_x, *_, handle, _ = buffer.dispatch(sent.payload, **routing_of(layout, sent))
            out = me.put(world.outputs[me.rank])
            held.append((recv_x, buffer.combine(out, handle)[0]))
    del buffer, handle
    gc.collect()
    for world, (recv_x, combined) in zip(worlds, held):
        world.check_received(me.rank, recv_x)
        same("combined_x", combined, world.combined(me.rank))


def test_outputs_outlive_later_calls_and_the_buffer(run_ranks):
    run_ranks(_held_outputs, 2)


def _late_rank(me, rounds):
    """One rank computes between its calls: the others must wait for it, and it for nobody."""
    with me.buffer() as buffer:
        busy = torch.randn(300, 300, device=me.device)
        for seed in range(rounds):
            if seed % me.size == me.rank:
                for _ in range(60):
                    busy = (busy @ busy).clamp(-1, 1)
            round_trip(buffer, me, World(SHAPE, seed), biases=seed % 3)


def test_late_ranks(run_ranks):
    run_ranks(_late_rank, 2, 6)


def test_event_overlap_without_event():
    event = ep.EventOverlap()
    assert event.event is None and event.extra_tensors is None
    event.current_stream_wait()
    with event as entered:
        assert entered is event
    tensor = torch.zeros(1)
    assert ep.EventOverlap(None, (tensor,)).extra_tensors[0] is tensor


def test_captured_event():
    event = ep.Buffer.capture()
    assert isinstance(event, ep.EventOverlap) and isinstance(event.event, ep.EventHandle)
    event.current_stream_wait()
    event.event.synchronize()
    assert event.event.query()


@pytest.mark.parametrize("what", [1, "event", object()], ids=["int", "str", "object"])
def test_previous_event_of_a_wrong_type(solo, what):
    with solo.buffer() as buffer:
        topk_idx = torch.zeros(4, 2, dtype=torch.int64, device=solo.device)
        with pytest.raises(ep.EpInvalidArgument, match="must be an EventOverlap"):
            buffer.get_dispatch_layout(topk_idx, 8, previous_event=what)


def test_every_order_is_covered():
    """The sequences above hold each pair of neighbouring calls."""
    orders = ["abAB", "abBA", "abcCABabCBA", "aAAAbB", "aaaaAbBbA"]
    kinds = {tuple(c.islower() for c in pair) for o in orders for pair in itertools.pairwise(o)}
    assert kinds == set(itertools.product((True, False), repeat=2))
