#!/usr/bin/env python3
"""Port channels over verbs beside perftest, both over the two RDMA devices of the virtual machine.

    tools/rxe_vm/run.py tools/rxe_vm/bench.py build/cpu-release/bin/port_bench

Runs in the virtual machine only. Every line is the median of some rounds; a round runs port_bench
and, right behind it, ib_write_bw or ib_atomic_bw (Debian: perftest). An emulated machine tells how
the two compare, and nothing about speed. Standard library only.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

SIZES = (65536, 262144, 1048576)
WRITE_BYTES = 1 << 25
ADDS = 8192
GID_INDEX = "1"  # the IPv4 address


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"exit code {done.returncode} of {' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def port_bench(program, name, folder):
    out = folder / "port_bench.json"
    run(
        [program, f"--benchmark_filter=^{name}/", "--benchmark_repetitions=1"]
        + [f"--benchmark_out={out}", "--benchmark_out_format=json"]
    )
    (result,) = json.loads(out.read_text())["benchmarks"]
    return result


def perftest(program, *options):
    """What the client reports; the server's device is the other one."""
    common = [program, "-x", GID_INDEX, "-F", *options]
    with subprocess.Popen(
        [*common, "-d", "rxe1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        # It listens before it prints anything that tells: the client is started until it finds it.
        for _ in range(100):
            client = subprocess.run(
                [*common, "-d", "rxe0", "127.0.0.1"], capture_output=True, text=True, check=False
            )
            if client.returncode == 0 or server.poll() is not None:
                break
        server.communicate()
    if client.returncode != 0:
        sys.exit(f"{program} failed:\n{client.stdout}{client.stderr}")
    values = [line.split() for line in client.stdout.splitlines() if line.strip()]
    return next(row for row in reversed(values) if len(row) == 5 and row[0].isdigit())


def compare(title, rounds, ours, bare, unit):
    pairs = [(ours(), bare()) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        f"{title:<24}{statistics.median(a for a, _ in pairs):>10.1f}"
        f"{statistics.median(b for _, b in pairs):>10.1f}  {unit:<8}"
        f"{ratio:>8.2f}   {min(a / b for a, b in pairs):.2f} to {max(a / b for a, b in pairs):.2f}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("port_bench")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for program in ("ib_write_bw", "ib_atomic_bw"):
        if not shutil.which(program):
            sys.exit(f"{program} is not installed: apt-get install perftest")

    print(f"{'':<24}{'ours':>10}{'bare':>10}  {'':<8}{'ratio':>8}   of single rounds")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for size in SIZES:
            compare(
                f"put, {size >> 10} KiB",
                options.rounds,
                lambda size=size: port_bench(
                    options.port_bench, f"put/cpu/verbs/singles/{size}", folder
                )["GB/s"]
                * 1e3,
                # MiB per second
                lambda size=size: float(
                    perftest(
                        "ib_write_bw", "-s", str(size), "-n", str(max(WRITE_BYTES // size, 32))
                    )[3]
                )
                * 1.048576,
                "MB/s",
            )
        compare(
            "64-bit adds",
            options.rounds,
            lambda: port_bench(options.port_bench, "adds/cpu/verbs/1x1", folder)["items_per_second"]
            / 1e3,
            lambda: float(perftest("ib_atomic_bw", "-A", "FETCH_AND_ADD", "-n", str(ADDS))[4]) * 1e3,
            "1000/s",
        )


if __name__ == "__main__":
    main()
