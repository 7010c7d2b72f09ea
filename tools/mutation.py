#!/usr/bin/env python3
"""Removes or weakens one synchronisation in the kernels at a time: does a test notice?

    tools/mutation.py                       every mutant, sampled detectors below
    tools/mutation.py --only combine.cuh:86 the mutants of one file, or of one line
    tools/mutation.py --sample 20           20 of them, evenly spread
    tools/mutation.py --list                the mutants, without building or running anything

The sources are copied to build/mutation/tree. There every mutant is put into the code at once, behind
a switch (MSCCLPP_MUTANT=number in the environment), and the tests are built twice: plain and under
ThreadSanitizer. Each mutant then runs under four detectors, one after the other until one notices:
in order (fifo), in order under ThreadSanitizer (tsan), under chaos seeds (chaos) and under some chaos
seeds with ThreadSanitizer (tsan+chaos); --all runs all four. Results are kept in build/mutation/results.json as long
as the sources stay the same, so that an interrupted run goes on where it was.

A mutant that no detector notices is a survivor and needs a line in tools/mutation_survivors.txt:
"equivalent" with the reason why nothing changes that a caller could see, or "open" with what is
missing. Exit code 0 only if every survivor has one, and at least 90 % of the mutants that are not
equivalent are noticed. docs/mutation.md tells more. Standard library only.
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
    ("include/mscclpp/device/cpu/line", "ep_chaos_tests"),
    ("include/mscclpp/fifo_", "core_port_chaos_tests"),
    ("include/mscclpp/port_", "core_port_chaos_tests"),
    ("src/core/", "core_port_chaos_tests"),
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

    def notices(self, program, number):
        code, _ = self(program, number)
        if code == 124:  # a busy machine is not the mutant's doing: a hang is one twice
            code, _ = self(program, number)
        return code != 0


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
        detector.limit = 3 * seconds + 20
        print(f"unchanged, {detector.name}: passes in {seconds:.0f} s", flush=True)


def judge(mutant, detectors, every):
    """Names of the detectors that noticed."""
    noticed = []
    for detector in detectors:
        if detector.notices(program_for(mutant), mutant.number):
            noticed.append(detector.name)
            if not every:
                break
    return noticed


def explained_survivors():
    """Lines `file | what | the statement | equivalent: reason`, or open: what is missing."""
    found = {}
    if SURVIVORS.exists():
        for line in SURVIVORS.read_text().splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            parts = [part.strip() for part in line.split(" | ")]
            if len(parts) < 4 or not parts[-1].startswith(("equivalent: ", "open: ")):
                sys.exit(
                    f"mutation.py: {SURVIVORS.name}: not `file | what | code | equivalent: "
                    f"reason` nor `... | open: what is missing`: {line}"
                )
            # The code may have an "|" of its own.
            found[parts[0], parts[1], " | ".join(parts[2:-1])] = parts[-1]
    return found


def choose(mutants, options):
    found = mutants
    if options.only:
        wanted = [only.partition(":") for only in options.only]
        found = [
            m
            for m in found
            if any(m.path.endswith(file) and line in ("", str(m.line)) for file, _, line in wanted)
        ]
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
    equivalent = sum(explained.get(m.key(), "").startswith("equivalent") for m in survivors)
    stale = {key: "no longer a mutant" for key in set(explained) - {m.key() for m in all_mutants()}}
    # An open one may be noticed by some seeds; an equivalent one never.
    stale |= {
        m.key(): "noticed"
        for m, by in zip(chosen, results)
        if by and explained.get(m.key(), "").startswith("equivalent")
    }
    print()
    for detector in detectors:
        print(f"{detector.name:10} {counts[detector.name]:4}")
    for mutant in survivors:
        print(f"survived: {mutant.name()}: {explained.get(mutant.key(), 'NO REASON GIVEN')}")
    judged = len(chosen) - equivalent
    share = caught / judged if judged else 1.0
    print(
        f"{caught} of {len(chosen)} mutants noticed: {100 * caught / len(chosen):.1f} %\n"
        f"{len(survivors)} survivors: {equivalent} equivalent, "
        f"{len(survivors) - equivalent - len(unexplained)} open, {len(unexplained)} unexplained\n"
        f"without the equivalent ones {caught} of {judged}: {100 * share:.1f} %"
    )
    for key, why in sorted(stale.items()):
        print(f"{why}, take it out of {SURVIVORS.name}: {' | '.join(key)}")
    for mutant in unexplained:
        print(f"to explain in {SURVIVORS.relative_to(ROOT)}: {' | '.join(mutant.key())} | ...")
    return 0 if share >= AIM and not unexplained and not stale else 1


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    parser.add_argument(
        "--only", nargs="+", metavar="FILE[:LINE]", help="the mutants of these files or lines"
    )
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
        Detector("tsan", "tsan", 0),
        Detector("chaos", "plain", options.seeds),
        Detector("tsan+chaos", "tsan", max(options.seeds * 2 // 5, 1)),
    ]
    calibrate(detectors, programs)
    stored = load_results(digest, options.fresh)
    return report(chosen, run_mutants(chosen, detectors, options, stored), detectors)


if __name__ == "__main__":
    sys.exit(main())
