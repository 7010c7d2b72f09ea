"""Starts ranks for tests: as processes with a gloo group, or as threads of one process.

A rank function `f(me, *args)` lives at module level of a test file and runs on every rank with its
own `me: Rank`. `Launcher.run(f, ranks, *args)` returns the results of all ranks in order. If any rank
fails, dies or does not answer in time, it raises RanksFailed with the tracebacks of all of them.
Processes are kept for the next test, and are ended after a failure.
"""

import contextlib
import dataclasses
import importlib
import multiprocessing as mp
import multiprocessing.connection as mpc
import os
import pathlib
import sys
import tempfile
import threading
import time
import traceback
from typing import Any, Callable, Dict, Iterator, List, Optional

HERE = pathlib.Path(__file__).resolve().parent
START_LIMIT = 120.0  # seconds until all processes have imported torch
CALL_LIMIT = 120.0  # seconds for one rank function


class RanksFailed(AssertionError):
    """Some rank raised, died or did not answer; the message has what every rank said."""


@dataclasses.dataclass
class Rank:
    """What a rank function gets."""

    rank: int
    size: int
    platform: str
    group: Any = None  # torch.distributed group, when ranks are processes
    comm: Any = None  # stands for an mpi4py communicator, when ranks are threads

    @property
    def device(self):
        import torch

        if self.platform == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", self.rank % torch.cuda.device_count())

    def barrier(self) -> None:
        """Waits for all ranks, outside of the library."""
        if self.comm is not None:
            self.comm.allgather(None)
        else:
            import torch.distributed as dist

            dist.all_gather_object([None] * self.size, None, self.group)

    def put(self, value: Any) -> Any:
        """A tensor, or Inputs, on this rank's device.

        Not while kernels are pending that wait for another rank: a copy from pageable memory keeps
        the driver's lock until they are done, and a rank of the same process could not launch.
        """
        if self.platform == "cuda":
            import torch

            torch.cuda.current_stream(self.device).synchronize()
        return value.to(self.device)

    def synchronize(self) -> None:
        """Waits for everything that was enqueued on the device."""
        if self.platform == "cuda":
            import torch

            torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def buffer(self, num_nvl_bytes: int = 1 << 22, **options) -> Iterator[Any]:
        """A Buffer that is destroyed at the end, unless the block fails (the others may be stuck)."""
        from mscclpp.ext import ep

        options = {"timeout": 20.0, "device": self.device, **options}
        if self.comm is not None:
            options["comm"] = self.comm
        buffer = ep.Buffer(self.group, num_nvl_bytes, **options)
        yield buffer
        buffer.destroy()


class ThreadComm:
    """What Buffer needs of an mpi4py communicator, among threads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.slots: List[Any] = [None] * size

    def of(self, rank: int) -> Any:
        shared = self

        class One:
            Get_rank = staticmethod(lambda: rank)
            Get_size = staticmethod(lambda: shared.size)

            @staticmethod
            def allgather(item: Any) -> List[Any]:
                shared.slots[rank] = item
                shared.barrier.wait(CALL_LIMIT)
                everyone = list(shared.slots)
                shared.barrier.wait(CALL_LIMIT)
                return everyone

        return One()


def _rank_main(rank: int, size: int, platform: str, store: str, pipe: mpc.Connection) -> None:
    """The life of a rank process: calls in, results out."""
    sys.path.insert(0, str(HERE))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if platform == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    me = Rank(rank, size, platform, group=dist.group.WORLD)
    pipe.send(("ready", None))
    while True:
        call = pipe.recv()
        if call is None:
            break
        module, name, args = call
        try:
            function = getattr(importlib.import_module(module), name)
            pipe.send(("ok", function(me, *args)))
        except BaseException:  # also SystemExit: the parent decides
            pipe.send(("error", traceback.format_exc()))
    dist.destroy_process_group()


class ProcessPool:
    """`size` rank processes."""

    def __init__(self, size: int, platform: str) -> None:
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory(prefix="ep_ranks_")
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main,
                args=(rank, size, platform, f"{self.folder.name}/store", theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.collect(START_LIMIT)

    def run(self, function: Callable, args: tuple, limit: float) -> List[Any]:
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__name__, args))
        return self.collect(limit)

    def collect(self, limit: float) -> List[Any]:
        deadline = time.monotonic() + limit
        waiting: Dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        answers: Dict[int, Any] = {}
        while waiting and time.monotonic() < deadline:
            for pipe in mpc.wait(list(waiting), timeout=deadline - time.monotonic()):
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join(5)
                    answers[rank] = ("error", f"died, exit code {self.processes[rank].exitcode}")
                if answers[rank][0] == "error":  # the others have little time left
                    deadline = min(deadline, time.monotonic() + 30)
        for rank in waiting.values():
            answers[rank] = ("error", f"no answer (limit {limit:.0f} s)")
        return _results(answers)

    def end(self, kill: bool = False) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(0 if kill else 20)
            if process.exitcode is None:
                process.kill()
                process.join()
        self.folder.cleanup()


def _results(answers: Dict[int, Any]) -> List[Any]:
    if all(kind != "error" for kind, _ in answers.values()):
        return [answers[rank][1] for rank in sorted(answers)]
    texts = []
    for rank, (kind, value) in sorted(answers.items()):
        texts.append(f"---- rank {rank}: {value if kind == 'error' else 'no error'}")
    raise RanksFailed("\n" + "\n".join(texts))


def run_threads(function: Callable, size: int, platform: str, args: tuple, limit: float) -> List:
    """Runs the ranks as threads; on CUDA each has a stream of its own."""
    import torch

    torch.arange(1)  # torch's first argument check imports numpy, and deadlocks from two threads
    comm, answers = ThreadComm(size), {}

    def main(rank: int) -> None:
        me = Rank(rank, size, platform, comm=comm.of(rank))
        try:
            if platform == "cuda":
                torch.cuda.set_device(me.device)
                with torch.cuda.stream(torch.cuda.Stream()):
                    answers[rank] = ("ok", function(me, *args))
            else:
                answers[rank] = ("ok", function(me, *args))
        except BaseException:
            answers[rank] = ("error", traceback.format_exc())
            comm.barrier.abort()

    threads = [threading.Thread(target=main, args=(r,), daemon=True) for r in range(size)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + limit
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    for rank, thread in enumerate(threads):
        if thread.is_alive():
            answers[rank] = ("error", f"no answer (limit {limit:.0f} s)")
    return _results(answers)


class Launcher:
    """Runs rank functions; keeps one pool of processes per number of ranks."""

    def __init__(self, platform: str, threads: bool) -> None:
        self.platform = platform
        self.threads = threads
        self.pools: Dict[int, ProcessPool] = {}

    def why_not(self, ranks: int) -> Optional[str]:
        """The reason to skip a test of so many ranks, or None."""
        if self.platform == "cpu":
            return None
        import torch

        found = torch.cuda.device_count()
        if found == 0:
            return "needs a GPU, found none"
        if found < ranks and not self.threads:
            return f"{ranks} processes need {ranks} GPUs, found {found} (try --threads)"
        return None

    def run(
        self, function: Callable, ranks: int, *args: Any, limit: float = CALL_LIMIT
    ) -> List[Any]:
        if self.threads:
            return run_threads(function, ranks, self.platform, args, limit)
        if ranks not in self.pools:
            self.pools[ranks] = ProcessPool(ranks, self.platform)
        try:
            return self.pools[ranks].run(function, args, limit)
        except RanksFailed:
            self.pools.pop(ranks).end(kill=True)
            raise

    def close(self) -> None:
        while self.pools:
            self.pools.popitem()[1].end()
