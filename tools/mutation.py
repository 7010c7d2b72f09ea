#!/usr/bin/env python3
"""Removes or weakens one synchronisation in the kernels at a time: does a test notice?

    tools/mutation.py                       every mutant, sampled detectors below
    tools/mutation.py --only combine.cuh:86 the mutants of one file, or of one line
    tools/mutation.py --sample 20           20 of them, evenly spread
    tools/mutation.py --list                the mutants, without building or running anything

The sources are copied to build/mutation/tree. There every mutant is put into the code at once, behind
a switch (MSCCLPP_MUTANT=number in the environment), and the tests are built twice: plain and under
ThreadSanitizer. Each mutant then runs under three detectors, one after the other until one notices:
in order (fifo), under chaos seeds (chaos), and in order under ThreadSanitizer (tsan); --all runs all
three. Results are kept in build/mutation/results.json as long as the sources stay the same, so that an
interrupted run goes on where it was.

A mutant that no detector notices is a survivor. Survivors that change nothing a caller could see are
listed with the reason in tools/mutation_survivors.txt. Exit code 0 only if at least 90 % of the others
are noticed and no survivor is unexplained. docs/mutation.md tells more. Standard library only.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import lint
from mutants import SWITCH, SWITCH_SOURCE, all_mutants, with_switches

ROOT = lint.ROOT
FOLDER = ROOT / "build" / "mutation"
TREE = FOLDER / "tree"
RESULTS = FOLDER / "results.json"
SURVIVORS = ROOT / "tools" / "mutation_survivors.txt"
AIM = 0.90
PRESETS = {"plain": "cpu-release", "tsan": "cpu-tsan"}
# The test program that has to notice, by the mutant's file.
TESTS = (
    ("include/mscclpp/fifo_", "core_port_tests"),
    ("include/mscclpp/port_", "core_port_tests"),
    ("src/core/", "core_port_tests"),
    ("include/", "core_channel_tests"),
    ("src/ext/ep/", "ep_chaos_tests"),
)


def run(command, timeout, env=None):
    """Exit code and output; 124 when it ran past its time, with everything it started ended."""
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=TREE,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return 124, output


@dataclasses.dataclass
class Detector:
    name: str
    build: str
    seeds: int
    limit: float = 600.0

    def __call__(self, program, number=0):
        binary = TREE / "build" / PRESETS[self.build] / "bin" / program
        env = {
            "MSCCLPP_MUTANT": str(number),
            "MSCCLPP_TEST_SEEDS": str(self.seeds),
            "TSAN_OPTIONS": "atexit_sleep_ms=0:halt_on_error=1",
        }
        return run([binary, "--gtest_fail_fast", "--gtest_brief=1"], self.limit, env)


def program_for(mutant):
    return next(program for start, program in TESTS if mutant.path.startswith(start))


def write_tree(mutants):
    """Copies what changed; returns a digest of everything that a result depends on."""
    by_path = collections.defaultdict(list)
    for mutant in mutants:
        by_path[mutant.path].append(mutant)
    digest = hashlib.sha256()
    contents = {pathlib.Path(SWITCH): SWITCH_SOURCE.encode()}
    for path in lint.all_files():
        if not (ROOT / path).is_file() or str(path).startswith(("docs/", "python/", "tools/")):
            continue
        if str(path) in by_path:
            contents[path] = with_switches(path, by_path[str(path)]).encode()
        else:
            contents[path] = (ROOT / path).read_bytes()
    for path in sorted(contents):
        digest.update(str(path).encode() + b"\0" + contents[path] + b"\0")
        target = TREE / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != contents[path]:
            target.write_bytes(contents[path])
    return digest.hexdigest()


def build(programs, jobs):
    for preset in sorted(set(PRESETS.values())):
        print(f"building {preset} with all mutants", flush=True)
        settings = ["-DMSCCLPP_BUILD_TESTS=ON", "-DMSCCLPP_BUILD_CLI=OFF", "-DMSCCLPP_WERROR=OFF"]
        for command in (
            ["cmake", "--preset", preset, *settings],
            ["cmake", "--build", f"build/{preset}", "-j", jobs, "--target", *programs],
        ):
            code, output = run(command, 3600)
            if code != 0:
                sys.exit(f"mutation.py: {' '.join(map(str, command))} failed:\n{output[-6000:]}")


def calibrate(detectors, programs):
    """The unchanged code must pass; how long it takes bounds the mutants."""
    for detector in detectors:
        start = time.monotonic()
        for program in programs:
            code, output = detector(program)
            if code != 0:
                sys.exit(
                    f"mutation.py: the unchanged {program} fails ({detector.name}):\n{output[-4000:]}"
                )
        seconds = time.monotonic() - start
        detector.limit = 5 * seconds + 60
        print(f"unchanged, {detector.name}: passes in {seconds:.0f} s", flush=True)


def judge(mutant, detectors, every):
    """Names of the detectors that noticed."""
    noticed = []
    for detector in detectors:
        code, _ = detector(program_for(mutant), mutant.number)
        if code != 0:
            noticed.append(detector.name)
            if not every:
                break
    return noticed


def explained_survivors():
    """Lines `file | what | the statement | reason`."""
    found = {}
    if SURVIVORS.exists():
        for line in SURVIVORS.read_text().splitlines():
            parts = [part.strip() for part in line.split(" | ")]
            if line.strip() and not line.startswith("#"):
                if len(parts) != 4 or not parts[3]:
                    sys.exit(
                        f"mutation.py: {SURVIVORS.name}: not `file | what | code | reason`: {line}"
                    )
                found[tuple(parts[:3])] = parts[3]
    return found


def choose(mutants, options):
    found = mutants
    if options.only:
        name, _, line = options.only.partition(":")
        found = [m for m in found if m.path.endswith(name) and (not line or m.line == int(line))]
    if options.sample and options.sample < len(found):
        found = [found[i * len(found) // options.sample] for i in range(options.sample)]
    if not found:
        sys.exit("mutation.py: there is no such mutant")
    return found


def load_results(digest, fresh):
    if not fresh and RESULTS.exists():
        stored = json.loads(RESULTS.read_text())
        if stored["digest"] == digest:
            return stored
    return {"digest": digest, "noticed": {}}


def run_mutants(chosen, detectors, options, stored):
    lock = threading.Lock()
    done = 0

    def one(mutant):
        nonlocal done
        start = time.monotonic()
        name = f"{mutant.number} {options.seeds} {options.all}"
        noticed = stored["noticed"].get(name)
        if noticed is None:
            noticed = judge(mutant, detectors, options.all)
        with lock:
            done += 1
            stored["noticed"][name] = noticed
            RESULTS.write_text(json.dumps(stored))
            seconds = time.monotonic() - start
            print(
                f"[{done}/{len(chosen)}] {mutant.name():66} "
                f"{' '.join(noticed) or 'SURVIVED'} ({seconds:.0f} s)",
                flush=True,
            )
        return noticed

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        return list(pool.map(one, chosen))


def report(chosen, results, detectors):
    explained = explained_survivors()
    counts = collections.Counter(name for noticed in results for name in noticed)
    survivors = [m for m, noticed in zip(chosen, results) if not noticed]
    unexplained = [m for m in survivors if m.key() not in explained]
    caught = len(chosen) - len(survivors)
    equivalent = len(survivors) - len(unexplained)
    print()
    for detector in detectors:
        print(f"{detector.name:6} {counts[detector.name]:4}")
    for mutant in survivors:
        print(f"survived: {mutant.name()}: {explained.get(mutant.key(), 'NO REASON GIVEN')}")
    share = caught / len(chosen)
    print(
        f"{caught} of {len(chosen)} mutants noticed: {100 * share:.1f} %; of {len(survivors)} "
        f"survivors {equivalent} are explained"
    )
    for mutant in unexplained:
        print(f"to explain in {SURVIVORS.relative_to(ROOT)}: {' | '.join(mutant.key())} | ...")
    return 0 if share >= AIM and not unexplained else 1


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    parser.add_argument("--only", metavar="FILE[:LINE]", help="the mutants of one file or line")
    parser.add_argument("--sample", type=int, metavar="N", help="N mutants, evenly spread")
    parser.add_argument("--seeds", type=int, default=50, help="chaos seeds per test (50)")
    parser.add_argument("--all", action="store_true", help="run all detectors on every mutant")
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    options = parser.parse_args()
    mutants = all_mutants()
    chosen = choose(mutants, options)
    if options.list:
        for mutant in chosen:
            print(f"{mutant.number:4} {mutant.name():62} {mutant.shown[:70]}")
        print(f"{len(chosen)} mutants")
        return 0
    digest = write_tree(mutants)
    programs = sorted({program_for(m) for m in chosen})
    build(programs, options.jobs)
    detectors = [
        Detector("fifo", "plain", 0),
        Detector("chaos", "plain", options.seeds),
        Detector("tsan", "tsan", 0),
    ]
    calibrate(detectors, programs)
    stored = load_results(digest, options.fresh)
    return report(chosen, run_mutants(chosen, detectors, options, stored), detectors)


if __name__ == "__main__":
    sys.exit(main())
