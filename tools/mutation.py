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
import re
import signal
import subprocess
import sys
import threading
import time

import lint

ROOT = lint.ROOT
FOLDER = ROOT / "build" / "mutation"
TREE = FOLDER / "tree"
RESULTS = FOLDER / "results.json"
SURVIVORS = ROOT / "tools" / "mutation_survivors.txt"
SOURCES = re.compile(r"^src/ext/ep/kernels/.*\.(cuh|cu)$|^include/mscclpp/[a-z_]+_device\.hpp$")
SWITCH = "include/mscclpp/mutation_switch.hpp"
AIM = 0.90
PRESETS = {"plain": "cpu-release", "tsan": "cpu-tsan"}
# The test program that has to notice, by the mutant's file.
TESTS = (("include/", "core_channel_tests"), ("src/ext/ep/", "ep_chaos_tests"))

SWITCH_SOURCE = """#pragma once
#include <cstdlib>
namespace mscclpp {
inline const int kActiveMutant = [] {
  const char* text = std::getenv("MSCCLPP_MUTANT");
  return text ? std::atoi(text) : 0;
}();
inline bool mutantIs(int number) { return kActiveMutant == number; }
}  // namespace mscclpp
"""


@dataclasses.dataclass
class Mutant:
    path: str
    line: int
    what: str
    begin: int  # the expression that is replaced
    end: int
    text: str  # by what; "" for a statement that is left out
    shown: str
    number: int = 0

    def name(self):
        return f"{self.path.removeprefix('src/ext/ep/kernels/')}:{self.line} {self.what}"

    def key(self):
        return (self.path.removeprefix("src/ext/ep/kernels/"), self.what, self.shown)

    def prefix(self):
        if self.text:
            return f"(mutantIs({self.number}) ? ({self.text}) : ("
        return f"(mutantIs({self.number}) ? void() : static_cast<void>("


def split_call(code, open_paren):
    """The end of a call and its arguments, as (begin, end) of each."""
    depth, begin, arguments = 0, open_paren + 1, []
    for at in range(open_paren, len(code)):
        if code[at] in "([{":
            depth += 1
        elif code[at] in ")]}":
            depth -= 1
            if depth == 0:
                return at + 1, arguments + [(begin, at)]
        elif code[at] == "," and depth == 1:
            arguments.append((begin, at))
            begin = at + 1
    raise ValueError("unbalanced parentheses")


# Calls that are left out where they are statements, and what stands for them where they are values.
DROPPED = {
    "syncBlock": None,
    "syncWarp": None,
    "syncBarrier": None,
    "arriveBarrier": None,
    "fenceMbarrierInit": None,
    "fenceProxyAsyncShared": None,
    "fenceProxyAsyncGlobal": None,
    "bulkWait": None,
    "bulkWaitRead": None,
    "arrive": None,
    "waitParity": None,
    "waitReached": "true",
    "waitUntil": "true",
    "storeRelease": None,
    "storeLocalRelease": None,
}
WEAKENED = {
    "storeRelease": "storeRelaxed",
    "storeLocalRelease": "storeRelaxed",
    "loadAcquire": "loadRelaxed",
    "loadLocalAcquire": "loadRelaxed",
    "fetchAddAcqRel": "fetchAddRelaxed",
    "fetchAddLocalAcqRel": "fetchAddLocalRelaxed",
}
# (call, argument, what, new argument)
CHANGED = (
    ("waitParity", 2, "other parity", "({}) ^ 1u"),
    ("waitReached", 2, "epoch before", "({}) - 1u"),
    ("arriveExpectBytes", 1, "16 bytes fewer", "({}) - 16"),
    ("initMbarrier", 1, "one arrival more", "({}) + 1"),
)
# Expressions that are no calls: (pattern, what, new text; "" = the statement is left out).
OTHERS = (
    (r"gridSize\(\) - 1(?= \?)", "first instead of last block", "0u"),
    (r"\blocal\.\w+ = 0(?=;)", "word not reset", ""),
    (r"\bphase \^= 1u(?=;)", "parity never turns", ""),
    (r"(?<=return )loadLocalAcquire\(&localWords\(g\)\.epoch\) \+ 1", "epoch stands still",
     "loadLocalAcquire(&localWords(g).epoch)"),
)
CALLS = "|".join(
    sorted(
        {*DROPPED, *WEAKENED, *(c[0] for c in CHANGED), "fetchAddRelaxed", "fetchAddLocalRelaxed"}
    )
)


def blank_comments(text):
    keep_lines = lambda m: re.sub(r"[^\n]", " ", m[0])
    return re.sub(r"//[^\n]*|/\*.*?\*/", keep_lines, text, flags=re.S)


def mutants_of(path):
    source = (ROOT / path).read_text()
    code = blank_comments(source)
    for call in re.finditer(rf"(?<![\w.>])((?:device::)?)\b({CALLS})\b(<[^<>;()]*>)?\(", code):
        before = code[: call.start()].rstrip()
        if re.search(r"(\bbool|\bvoid|\bauto|\bT|_t)$", before):
            continue  # a declaration
        yield from mutants_of_call(path, source, code, call, before)
    for pattern, what, text in OTHERS:
        for found in re.finditer(pattern, code):
            line = code.count("\n", 0, found.start()) + 1
            yield Mutant(str(path), line, what, found.start(), found.end(), text, found[0])


def mutants_of_call(path, source, code, call, before):
    prefix, name, template = call[1], call[2], call[3] or ""
    end, arguments = split_call(code, call.end() - 1)
    line = code.count("\n", 0, call.start()) + 1
    shown = " ".join(source[call.start() : end].split())
    statement = code[end:].lstrip().startswith(";") and before[-1:] in ";{})"

    def mutant(what, text, begin=call.start(), stop=end):
        return Mutant(str(path), line, what, begin, stop, text, shown)

    if name in DROPPED:
        text = "" if statement else DROPPED[name]
        if text is not None:
            yield mutant(f"drop {name}", text)
    if name in WEAKENED:
        weak = prefix + WEAKENED[name] + template + source[call.end() - 1 : end]
        yield mutant(f"{name} -> {WEAKENED[name]}", weak)
    for changed, index, what, new in CHANGED:
        if changed == name and index < len(arguments):
            begin, stop = arguments[index]
            text = new.format(source[begin:stop].strip())
            yield mutant(f"{name} {what}", text, begin, stop)
    if name in ("bulkWait", "bulkWaitRead"):
        yield mutant(f"{name} one group fewer", f"{prefix}{name}<({template[1:-1]}) + 1>()")
    if name.startswith("fetchAdd") and len(arguments) == 2:
        target, added = (source[b:e].strip() for b, e in arguments)
        yield mutant(
            f"{name} as load and store",
            f"[&] {{ auto* split = {target}; const auto old = {prefix}loadRelaxed(split); "
            f"{prefix}storeRelaxed(split, old + ({added})); return old; }}()",
        )


def with_switches(path, mutants):
    """The source with every mutant in it, each behind its switch."""
    source = (ROOT / path).read_text()
    # Wrapping only: outer expressions open first and close last, so that mutants may nest.
    opens = sorted(mutants, key=lambda m: (m.begin, -m.end, m.number))
    closes = sorted(mutants, key=lambda m: (m.end, -m.begin, -m.number))
    parts, at = [], 0
    edits = [(m.begin, 1, i, m.prefix()) for i, m in enumerate(opens)]
    edits += [(m.end, 0, i, "))") for i, m in enumerate(closes)]
    for position, _, _, text in sorted(edits):
        parts += [source[at:position], text]
        at = position
    text = "".join(parts) + source[at:]
    include = f'#include <{SWITCH.removeprefix("include/")}>\n'
    if "#pragma once\n" in text:
        return text.replace("#pragma once\n", "#pragma once\n" + include, 1)
    return include + text


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


def all_mutants():
    found = []
    for path in lint.all_files():
        if SOURCES.search(str(path)):
            found += sorted(mutants_of(path), key=lambda m: (m.begin, m.end, m.what))
    for number, mutant in enumerate(found, 1):
        mutant.number = number
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
