#!/usr/bin/env python3
"""Removes or weakens one synchronisation in the kernels at a time: does a test notice?

    tools/mutation.py                       every mutant (hours on 2 cores)
    tools/mutation.py --sample 20           20 of them, evenly spread
    tools/mutation.py --only combine.cuh:86 the mutants of one file, or of one line
    tools/mutation.py --list                the mutants, without running anything

The sources are copied to build/mutation/tree and built there twice: plain, whose tests run in FIFO
order and then with chaos seeds, and under ThreadSanitizer. A mutant that no run notices is a
survivor. Survivors that change nothing a user could see are listed with the reason in
tools/mutation_survivors.txt. Fails when fewer than 90 % are noticed or a survivor is not explained.
Standard library only.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import lint

ROOT = lint.ROOT
TREE = ROOT / "build" / "mutation" / "tree"
SURVIVORS = ROOT / "tools" / "mutation_survivors.txt"
SOURCES = re.compile(r"^src/ext/ep/kernels/.*\.(cuh|cu)$|^include/mscclpp/[a-z_]+_device\.hpp$")
AIM = 0.90


@dataclasses.dataclass(frozen=True)
class Mutant:
    path: str
    line: int
    what: str
    begin: int  # the replaced part of the file
    end: int
    text: str
    shown: str

    def name(self):
        return f"{self.path.removeprefix('src/ext/ep/kernels/')}:{self.line} {self.what}"


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


# A call that may be left out where it is a statement, and what stands for it where it is a value.
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
CALLS = "|".join(
    sorted(
        {*DROPPED, *WEAKENED, *(c[0] for c in CHANGED), "fetchAddRelaxed", "fetchAddLocalRelaxed"}
    )
)


def mutants_of(path):
    source = (ROOT / path).read_text()
    code = lint.strip_comments(source)
    if len(code) != len(source):  # string literals were shortened: positions would be wrong
        code = blank_comments(source)
    for call in re.finditer(rf"(?<![\w.>])((?:device::)?)\b({CALLS})\b(<[^<>;()]*>)?\(", code):
        prefix, name, template = call[1], call[2], call[3] or ""
        before = code[: call.start()].rstrip()
        if re.search(r"(\bbool|\bvoid|\bauto|\bT|_t)$", before):
            continue  # a declaration
        end, arguments = split_call(code, call.end() - 1)
        line = code.count("\n", 0, call.start()) + 1
        shown = " ".join(source[call.start() : end].split())
        statement = code[end:].lstrip().startswith(";") and before[-1:] in ";{})"

        def mutant(what, begin, stop, text):
            return Mutant(str(path), line, what, begin, stop, text, shown)

        if name in DROPPED:
            value = "" if statement else DROPPED[name]
            if value is not None:
                yield mutant(f"drop {name}", call.start(), end, value)
        if name in WEAKENED:
            text = prefix + WEAKENED[name] + template + source[call.end() - 1 : end]
            yield mutant(f"{name} -> {WEAKENED[name]}", call.start(), end, text)
        for changed, index, what, new in CHANGED:
            if changed == name and index < len(arguments):
                begin, stop = arguments[index]
                yield mutant(
                    f"{name} {what}", begin, stop, " " + new.format(source[begin:stop].strip())
                )
        if name in ("bulkWait", "bulkWaitRead"):
            text = f"{prefix}{name}<({template[1:-1]}) + 1>()"
            yield mutant(f"{name} one group fewer", call.start(), end, text)
        if name.startswith("fetchAdd") and len(arguments) == 2:
            target, added = (source[b:e].strip() for b, e in arguments)
            text = (
                f"[&] {{ auto* split = {target}; const auto old = {prefix}loadRelaxed(split); "
                f"{prefix}storeRelaxed(split, old + ({added})); return old; }}()"
            )
            yield mutant(f"{name} as load and store", call.start(), end, text)


def blank_comments(text):
    keep_lines = lambda m: re.sub(r"[^\n]", " ", m[0])
    return re.sub(r"//[^\n]*|/\*.*?\*/", keep_lines, text, flags=re.S)


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
class Run:
    """One way of running the tests."""

    name: str
    preset: str
    seeds: int
    options: argparse.Namespace
    limit: float = 3600.0

    def build(self):
        command = ["cmake", "--build", TREE / "build" / self.preset, "-j", self.options.jobs]
        return run(command, 3600)

    def test(self):
        command = ["ctest", "--test-dir", TREE / "build" / self.preset, "-j", self.options.jobs]
        command += ["-L", self.options.labels, "-LE", "gpu|slow", "--stop-on-failure"]
        command += ["--output-on-failure", "--no-tests=error"]
        if self.options.tests:
            command += ["-R", self.options.tests]
        return run(command, self.limit, {"MSCCLPP_TEST_SEEDS": str(self.seeds)})


def prepare(runs, jobs):
    print(f"copying the sources to {TREE.relative_to(ROOT)} and building them", flush=True)
    for path in lint.all_files():
        target = TREE / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != (ROOT / path).read_bytes():
            shutil.copy(ROOT / path, target)
    for preset in sorted({r.preset for r in runs}):
        code, output = run(
            ["cmake", "--preset", preset, "-DMSCCLPP_BUILD_TESTS=ON", "-DMSCCLPP_WERROR=OFF"], 600
        )
        if code != 0:
            sys.exit(f"mutation.py: cmake --preset {preset} failed:\n{output}")
    for each in runs:
        code, output = each.build()
        start = time.monotonic()
        code, output = (code, output) if code else each.test()
        if code != 0:
            sys.exit(f"mutation.py: the unchanged sources fail ({each.name}):\n{output[-4000:]}")
        seconds = time.monotonic() - start
        each.limit = 3 * seconds + 60
        print(f"  unchanged, {each.name}: passes in {seconds:.0f} s", flush=True)


def judge(mutant, runs):
    """Who noticed: a run's name, 'invalid' (does not compile) or 'survived'."""
    path = TREE / mutant.path
    source = path.read_text()
    path.write_text(source[: mutant.begin] + mutant.text + source[mutant.end :])
    try:
        for each in runs:
            code, output = each.build()
            if code != 0:
                return "invalid", output
            code, output = each.test()
            if code != 0:
                return each.name, output
        return "survived", ""
    finally:
        path.write_text(source)


def explained_survivors():
    """Lines `file | what | the statement | reason`."""
    found = set()
    if SURVIVORS.exists():
        for line in SURVIVORS.read_text().splitlines():
            parts = [part.strip() for part in line.split(" | ")]
            if line.strip() and not line.startswith("#"):
                if len(parts) != 4 or not parts[3]:
                    sys.exit(
                        f"mutation.py: {SURVIVORS.name}: not `file | what | code | reason`: {line}"
                    )
                found.add(tuple(parts[:3]))
    return found


def choose(options):
    found = []
    for path in lint.all_files():
        if SOURCES.search(str(path)):
            found += mutants_of(path)
    if options.only:
        name, _, line = options.only.partition(":")
        found = [m for m in found if m.path.endswith(name) and (not line or m.line == int(line))]
    if options.sample and options.sample < len(found):
        found = [found[i * len(found) // options.sample] for i in range(options.sample)]
    if not found:
        sys.exit("mutation.py: there is no such mutant")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", metavar="FILE[:LINE]")
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seeds", type=int, default=50, help="chaos seeds per test")
    parser.add_argument("--labels", default="chaos", help="ctest labels of the tests to run")
    parser.add_argument("--tests", help="only the ctest entries whose name matches")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    mutants = choose(options)
    if options.list:
        for mutant in mutants:
            print(f"{mutant.name():60} {mutant.shown[:80]}")
        print(f"{len(mutants)} mutants")
        return 0

    runs = [
        Run("one seed", "cpu-release", 1, options),
        Run("chaos", "cpu-release", options.seeds, options),
        Run("tsan", "cpu-tsan", 1, options),
    ]
    prepare(runs, options.jobs)
    explained, unexplained, counts = explained_survivors(), [], collections.Counter()
    for number, mutant in enumerate(mutants, 1):
        start = time.monotonic()
        by, output = judge(mutant, runs)
        key = (mutant.path.removeprefix("src/ext/ep/kernels/"), mutant.what, mutant.shown)
        if by == "survived" and key not in explained:
            unexplained.append(" | ".join(key))
        counts[by] += 1
        seconds = time.monotonic() - start
        print(f"[{number}/{len(mutants)}] {mutant.name():62} {by} ({seconds:.0f} s)", flush=True)
        if by == "invalid":
            print("  " + output[-300:].replace("\n", "\n  "))

    valid = len(mutants) - counts["invalid"]
    share = (valid - counts["survived"]) / valid if valid else 0.0
    print("\n" + ", ".join(f"{name}: {count}" for name, count in counts.most_common()))
    print(f"{valid - counts['survived']} of {valid} mutants noticed: {100 * share:.1f} %")
    for line in unexplained:
        print(f"survivor without a reason in {SURVIVORS.relative_to(ROOT)}: {line}")
    return 0 if share >= AIM and not unexplained else 1


if __name__ == "__main__":
    sys.exit(main())
