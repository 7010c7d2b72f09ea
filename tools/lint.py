#!/usr/bin/env python3
"""Checks that compilers do not make: formatting, names, project rules, headers alone.

    tools/lint.py                 everything (make lint)
    tools/lint.py --fast          only the project rules and the formatting (a second)
    tools/lint.py --fix-format    formats the C++ sources in place (make format)

Exit code 0 only if nothing was found. Standard library only.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cpu-release"
CPP_SUFFIXES = {".cc", ".cu", ".cuh", ".hpp"}
HEADER_SUFFIXES = {".cuh", ".hpp"}
TEXT_SUFFIXES = CPP_SUFFIXES | {".cmake", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml"}
# The same versions on every distribution: other versions format and name differently.
CLANG_FORMAT, CLANG_TIDY = "clang-format-14", "clang-tidy-19"
WARN_LINES, MAX_LINES = 400, 600


@dataclasses.dataclass(frozen=True)
class Rule:
    """A pattern that must not occur in the code (comments and strings excluded) of some files."""

    pattern: str
    where: str  # matches the path from the root
    reason: str
    bad: str  # a line that the rule must find: checked at every run
    good: str  # a line that it must leave alone


# Sources that are built for both platforms.
KERNELS = r"^src/ext/ep/kernels/|^include/mscclpp/(?!device/).*_device\.hpp$|\.cuh$"
RULES = (
    Rule(
        r"\b__shared__\b",
        KERNELS,
        "shared memory comes from sharedStorage<T>()",
        "__shared__ int x;",
        "auto& s = sharedStorage<Storage>();",
    ),
    Rule(
        r"\b(threadIdx|blockIdx|blockDim|gridDim)\b",
        KERNELS,
        "use threadIndex(), blockIndex(), ...",
        "int i = threadIdx.x;",
        "unsigned i = threadIndex();",
    ),
    Rule(
        r"\b__(shfl|ballot|any|all|activemask|reduce|match)(_|\b)",
        KERNELS,
        "use shuffle(), ballot(), ...",
        "v = __shfl_sync(m, v, 0);",
        "v = shuffle(v, 0);",
    ),
    Rule(
        r"\b__sync(threads|warp)",
        KERNELS,
        "use syncBlock(), syncWarp()",
        "__syncthreads();",
        "syncBlock();",
    ),
    Rule(
        r"\b(__threadfence|__nanosleep|__trap)|(?<!\.)(?<!::)(?<!bool )\batomic(Add|CAS|Exch|Or|Max)\b"
        r"|\bcuda::(std::)?atomic",
        KERNELS,
        "atomics and waits come from mscclpp/device/",
        "atomicAdd(p, 1);",
        "fetchAddRelaxed(p, 1);",
    ),
    Rule(
        r"\basm\b|\b__asm__\b",
        KERNELS,
        "PTX lives in include/mscclpp/device/cuda/",
        'asm volatile("trap;");',
        "assembleRow(row);",
    ),
    Rule(
        r"\bvolatile\b",
        KERNELS,
        "use loadRelaxed(), storeRelaxed()",
        "volatile int* p = q;",
        "const int v = loadRelaxed(q);",
    ),
    Rule(
        r"\bthread_local\b",
        KERNELS,
        "a CPU thread runs many GPU threads",
        "thread_local int x;",
        "int x;",
    ),
    Rule(
        r"^\s+static\s+(?!constexpr\b|inline\b|_assert)[^()]*[;={]",
        KERNELS,
        "a static local is shared by all threads",
        "  static int calls = 0;",
        "  static constexpr int kLanes = 32;",
    ),
    Rule(
        r"\bgetenv\b",
        r"^(src/(?!core/env\.cc$|device_cpu/)|include/)",
        "environment variables are read in src/core/env.cc",
        'auto* v = getenv("X");',
        "const auto v = env().timeout;",
    ),
    Rule(
        r"#include\s*<(mscclpp/ext/|.*\bep/)|namespace\s+(mscclpp::)?ep\b",
        r"^(src/core/|src/device_cpu/|include/mscclpp/(?!ext/))",
        "the layers below ext/ep know nothing of it",
        "#include <mscclpp/ext/ep/buffer.hpp>",
        "#include <mscclpp/semaphore.hpp>",
    ),
    Rule(
        r"#include\s*<(nanobind|Python\.h|pybind|torch|ATen|c10)",
        r"^(?!src/ext/ep/bindings).*\.(cc|cu|cuh|hpp)$",
        "only src/ext/ep/bindings*.cc know Python, nothing knows torch",
        "#include <nanobind/nanobind.h>",
        "#include <new>",
    ),
    Rule(
        r"\b(sleep_for|usleep|nanosleep)\b",
        r"^test/.*\.cc$",
        "a test waits for an event, never for time",
        "std::this_thread::sleep_for(1ms);",
        "event.synchronize();",
    ),
    Rule(
        r"\bboost::",
        r"^include/",
        "no Boost name in a public header",
        "boost::context::fiber f;",
        "Fiber f;",
    ),
)
# An exception, with its reason, at the end of the line: `// lint-ok: this is the work that is timed`.
ALLOWED = re.compile(r"// lint-ok: \w")
# In any text file, comments included.
FORBIDDEN_TEXT = re.compile("|".join((r"/" + r"root/", r"/" + r"work/", r"/home/[a-z]+/")))


def strip_comments(text):
    """Blanks comments and the insides of string literals; keeps line numbers."""
    token = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.S)
    keep = lambda m: re.sub(r"[^\n]", " ", m[0]) if m[0][0] == "/" else '""'
    lines = text.split("\n")
    for i, line in enumerate(lines):  # an include's name is no string
        if line.lstrip().startswith("#include"):
            lines[i] = line.replace('"', "<", 1).replace('"', ">", 1)
    return token.sub(keep, "\n".join(lines))


def all_files():
    listed = (
        subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if shutil.which("git")
        else None
    )
    if listed and listed.returncode == 0:
        names = listed.stdout.split("\n")
    else:  # a copy without git
        skipped = {"build", ".venv", ".git", ".cache", "dist", "__pycache__", ".pytest_cache"}
        names = []
        for folder, folders, files in os.walk(ROOT):
            folders[:] = [f for f in folders if f not in skipped and not f.endswith(".egg-info")]
            names += [os.path.relpath(os.path.join(folder, f), ROOT) for f in files]
    return sorted(pathlib.PurePosixPath(n) for n in names if n and (ROOT / n).is_file())


def check_rules_find_their_examples():
    for rule in RULES:
        assert re.search(rule.pattern, strip_comments(rule.bad), re.M), f"blind rule: {rule}"
        assert not re.search(rule.pattern, strip_comments(rule.good), re.M), f"wrong rule: {rule}"
    assert not re.search("threadIdx", strip_comments("// threadIdx\n/* threadIdx */"))


def check_rules(files):
    problems = []
    for path in files:
        if path.suffix not in CPP_SUFFIXES:
            continue
        text = (ROOT / path).read_text()
        code, original = strip_comments(text), text.split("\n")
        rules = [r for r in RULES if re.search(r.where, str(path))]
        for number, line in enumerate(code.split("\n"), 1):
            problems += [
                f"{path}:{number}: {r.reason}: {line.strip()[:60]}"
                for r in rules
                if re.search(r.pattern, line) and not ALLOWED.search(original[number - 1])
            ]
        if path.suffix in HEADER_SUFFIXES and "#pragma once" not in code:
            problems.append(f"{path}:1: a header needs #pragma once")
    return problems


def check_files(files):
    problems = []
    for path in files:
        if path.suffix not in TEXT_SUFFIXES:
            continue
        text = (ROOT / path).read_text()
        for number, line in enumerate(text.split("\n"), 1):
            if FORBIDDEN_TEXT.search(line):
                problems.append(
                    f"{path}:{number}: a path of somebody's machine: {line.strip()[:60]}"
                )
        if path.suffix in CPP_SUFFIXES | {".py"}:
            lines = text.count("\n")
            if lines > MAX_LINES:
                problems.append(f"{path}: {lines} lines, the limit is {MAX_LINES}: split it")
            elif lines > WARN_LINES:
                print(f"warning: {path}: {lines} lines, aim for {WARN_LINES}")
        if path.suffix in CPP_SUFFIXES and not re.fullmatch(r"[a-z0-9_]+", path.stem):
            problems.append(f"{path}: file names are snake_case")
        tests = path.parts[0] == "test" and path.suffix in {".cc", ".cu"}
        if (
            tests
            and re.search(r"^\s*(TYPED_)?TEST(_[FP])?\(", text, re.M)
            and not path.stem.endswith(("_tests", "_suite"))
        ):
            problems.append(f"{path}: a file with tests is named <source>_tests")
    return problems


def check_links(files):
    """Relative links of the Markdown files lead somewhere."""
    problems = []
    for path in files:
        if path.suffix != ".md":
            continue
        text = re.sub(r"```.*?```", "", (ROOT / path).read_text(), flags=re.S)
        for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text):
            if not re.match(r"[a-z]+:", target) and not (ROOT / path.parent / target).exists():
                problems.append(f"{path}: dead link {target}")
    return problems


def tool(name):
    if shutil.which(name) is None:
        sys.exit(f"lint.py: {name} was not found: run tools/setup.sh test")
    return name


def check_format(files, fix=False):
    sources = [str(p) for p in files if p.suffix in CPP_SUFFIXES]
    if not sources:
        return []
    mode = ["-i"] if fix else ["--dry-run"]
    done = subprocess.run(
        [tool(CLANG_FORMAT), *mode, *sources], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = re.findall(r"^(\S+?):\d+:\d+: (?:warning|error):", done.stderr, re.M)
    if done.returncode != 0 and not found:
        found = [done.stderr]
    return [f"{path}: not formatted: make format" for path in sorted(set(found))]


def configure():
    done = subprocess.run(
        ["cmake", "--preset", "cpu-release", "-DMSCCLPP_BUILD_TESTS=ON"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"lint.py: cmake --preset cpu-release failed:\n{done.stdout}\n{done.stderr}")


def check_headers(jobs):
    done = subprocess.run(
        ["cmake", "--build", BUILD, "-j", str(jobs), "--target", "mscclpp_header_check"],
        capture_output=True,
        text=True,
        check=False,
    )
    return (
        [] if done.returncode == 0 else ["a public header does not compile alone:\n" + done.stdout]
    )


def check_names(jobs):
    tidy = tool(CLANG_TIDY)
    database = json.loads((BUILD / "compile_commands.json").read_text())
    sources = sorted({e["file"] for e in database if not e["file"].startswith(f"{ROOT}/build/")})

    def run(source):
        return subprocess.run(
            [tidy, "-p", BUILD, "--quiet", "--extra-arg=-w", source],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    problems = set()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for source, done in zip(sources, pool.map(run, sources)):
            found = re.findall(r"^\S+: (?:error|warning): .*$", done.stdout, re.M)
            problems.update(line.replace(f"{ROOT}/", "") for line in found)
            if done.returncode != 0 and not found:
                problems.add(f"{source}: {tidy} failed: {done.stderr[-500:]}")
    if not sources:
        problems.add("clang-tidy: compile_commands.json lists no source")
    return sorted(problems)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--fast", action="store_true", help="no compiler: rules and formatting only"
    )
    parser.add_argument("--fix-format", action="store_true", help="format in place, check nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    files = all_files()
    if options.fix_format:
        check_format(files, fix=True)
        return 0

    check_rules_find_their_examples()
    steps = [
        ("project rules", lambda: check_rules(files) + check_files(files)),
        ("links", lambda: check_links(files)),
        ("formatting", lambda: check_format(files)),
    ]
    if not options.fast:
        configure()
        steps += [
            ("headers alone", lambda: check_headers(options.jobs)),
            ("names", lambda: check_names(options.jobs)),
        ]
    count = 0
    for name, step in steps:
        problems = step()
        count += len(problems)
        print(f"lint: {name}: " + (f"{len(problems)} problems" if problems else "ok"), flush=True)
        for problem in problems:
            print(f"  {problem}")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
