"""Buffers come and go: destroy, re-creation, dropping, process exit."""

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import pytest
import torch
from checks import World, layout_of, round_trip, routing_of, same
from ranks import run_threads
from reference import Shape

from mscclpp.ext import ep

SHAPE = Shape((14, 9), hidden=64, topk=2)


def _again(me):
    descriptors = []
    for seed in range(4):
        with me.buffer(num_nvl_bytes=1 << (20 + seed % 2)) as buffer:
            round_trip(buffer, me, World(SHAPE, seed))
        del buffer
        gc.collect()
        descriptors.append(len(os.listdir("/proc/self/fd")))
    return descriptors


@pytest.mark.mp
def test_destroy_and_make_again(run_ranks, request):
    for descriptors in run_ranks(_again, 2):
        if not request.config.getoption("--threads"):
            assert descriptors[-1] <= descriptors[0], f"open files grow: {descriptors}"


def _destroy_in_flight(me):
    world = World(SHAPE)
    buffer = ep.Buffer(me.group, 1 << 22, comm=me.comm, device=me.device, timeout=20)
    sent = me.put(world.inputs[me.rank])
    handle = buffer.dispatch(sent.x, **routing_of(layout_of(buffer, world, sent), sent))[4]
    out = me.put(world.outputs[me.rank])
    combined, _, event = buffer.combine(out, handle, async_finish=True)
    buffer.destroy()  # waits for the combine
    assert event.event.query()
    same("combined_x", combined, world.combined(me.rank))
    assert handle.rank_offsets is not None


@pytest.mark.mp
def test_destroy_waits_for_work_in_flight(run_ranks):
    run_ranks(_destroy_in_flight, 2)


def _destroy_late(me):
    buffer = ep.Buffer(me.group, 1 << 20, comm=me.comm, device=me.device, timeout=20)
    if me.rank == 1:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            pass
    before = time.monotonic()
    buffer.destroy()
    return before, time.monotonic()


@pytest.mark.mp
def test_destroy_waits_for_the_others(run_ranks):
    (_, end_of_0), (start_of_1, _) = run_ranks(_destroy_late, 2)
    assert end_of_0 >= start_of_1


def _dropped(me, explicitly):
    world = World(SHAPE)
    buffer = ep.Buffer(
        me.group, 1 << 22, comm=me.comm, device=me.device, explicitly_destroy=explicitly
    )
    sent = me.put(world.inputs[me.rank])
    handle = buffer.dispatch(sent.x, **routing_of(layout_of(buffer, world, sent), sent))[4]
    out = me.put(world.outputs[me.rank])
    combined, _, event = buffer.combine(out, handle, async_finish=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del buffer, handle
        gc.collect()
    if me.comm is None:  # the list of warnings is the process's
        assert [w.category for w in caught] == ([ResourceWarning] if explicitly else [])
    event.current_stream_wait()
    same("combined_x", combined, world.combined(me.rank))
    me.synchronize()
    me.barrier()


@pytest.mark.mp
@pytest.mark.parametrize("explicitly", [False, True])
def test_a_buffer_may_be_dropped(run_ranks, explicitly):
    run_ranks(_dropped, 2, explicitly)


def test_dropping_a_buffer_lets_python_run(platform):
    """Dropping waits for work that may need another Python thread."""
    if platform == "cuda" and torch.cuda.device_count() == 0:
        pytest.skip("needs a GPU, found none")
    run_threads(_dropped, 2, platform, (False,), 60)


def _serve(me):
    with me.buffer() as buffer:
        for seed in range(3):
            round_trip(buffer, me, World(SHAPE, seed), biases=seed)


def test_ranks_as_threads(platform):
    """Blocking calls let other Python threads run: otherwise these ranks would wait for ever."""
    if platform == "cuda" and torch.cuda.device_count() == 0:
        pytest.skip("needs a GPU, found none")
    run_threads(_serve, 2, platform, (), 60)


def test_a_blocking_call_lets_python_run(platform):
    """Rank 1 of two threads comes late; while rank 0 waits for it in C++, a third thread counts."""
    if platform == "cuda" and torch.cuda.device_count() == 0:
        pytest.skip("needs a GPU, found none")
    counted = run_threads(_late_thread, 2, platform, (), 60)
    assert counted[1] > 100


def _late_thread(me):
    world, count = World(SHAPE), 0
    with me.buffer() as buffer:
        sent = me.put(world.inputs[me.rank])
        routing = routing_of(layout_of(buffer, world, sent), sent)
        if me.rank == 1:  # rank 0 sits in dispatch by now, or soon
            end = time.monotonic() + 0.3
            while time.monotonic() < end:
                count += 1
        buffer.dispatch(sent.x, **routing)
    return count


SCRIPT = """
import sys, threading
import torch
from checks import World, layout_of, routing_of
from ranks import run_threads
from reference import Shape
from mscclpp.ext import ep

kept = []

def main(me):
    world = World(Shape((14, 9), hidden=64))
    buffer = ep.Buffer(None, 1 << 22, comm=me.comm, device=me.device)
    sent = me.put(world.inputs[me.rank])
    routing = routing_of(layout_of(buffer, world, sent), sent)
    result = buffer.dispatch(sent.x, async_finish=True, **routing)
    pool = buffer.empty_in_pool((10, 64))
    kept.append((buffer, result, pool))

run_threads(main, 2, PLATFORM, (), 60)
print("the end")
ENDING
"""


@pytest.mark.parametrize(
    "ending", ["", "raise SystemExit(0)", "ep.kept = kept"], ids=["plain", "exit", "kept-elsewhere"]
)
def test_a_process_may_end_with_live_buffers(platform, ending):
    """Nothing hangs, crashes or complains when nobody called destroy()."""
    if platform == "cuda" and torch.cuda.device_count() == 0:
        pytest.skip("needs a GPU, found none")
    code = textwrap.dedent(SCRIPT).replace("PLATFORM", repr(platform)).replace("ENDING", ending)
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert (done.returncode, done.stdout) == (0, "the end\n"), done.stderr
    assert done.stderr == ""


def test_no_threads_are_left_in_python(solo):
    before = threading.active_count()
    with solo.buffer() as buffer:
        round_trip(buffer, solo, World(Shape((9,))))
    assert threading.active_count() == before
