#!/usr/bin/env python3
"""Runs test stages one after the other and closes with a table and 'N passed, N failed'.

    tools/run_tests.py                      the stages that gate a change (see DEFAULT)
    tools/run_tests.py cpu asan             these stages
    tools/run_tests.py cpu --filter 'Wait'  the ctest entries whose name matches

Every stage runs, also after one failed, unless --stop. Output goes to the terminal and to
build/log/<stage>.log. Exit code 0 only if every stage passed. Standard library only.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as xml

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "log"
CUDA_CHECK_ARCHS = ("80", "90a", "100a")


@dataclasses.dataclass
class Result:
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    note: str = ""


class StageFailed(Exception):
    """A step of a stage failed before it could count tests."""


class Stage:
    def __init__(self, name, options):
        self.name = name
        self.options = options
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log_path = LOGS / f"{name}.log"
        self.log = open(self.log_path, "w", encoding="utf-8")

    def run(self, command, env=None, check=True):
        """Runs a command with its output on the terminal and in the log; returns the exit code."""
        command = [str(word) for word in command]
        line = "+ " + " ".join(command)
        print(line, flush=True)
        self.log.write(line + "\n")
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            self.log.write(line)
        code = process.wait()
        self.log.flush()
        if check and code != 0:
            raise StageFailed(f"exit code {code} of: {' '.join(command[:4])} ...")
        return code

    def build(self, preset, *, folder=None, settings=(), targets=()):
        folder = folder or f"build/{preset}"
        self.run(["cmake", "--preset", preset, "-B", folder, "-DMSCCLPP_BUILD_TESTS=ON", *settings])
        command = ["cmake", "--build", folder, "-j", self.options.jobs]
        if targets:
            command += ["--target", *targets]
        self.run(command)
        return folder

    def ctest(self, folder, *, labels=None, without="gpu|vm", env=None, options=()):
        report = ROOT / folder / f"report-{self.name}.xml"
        report.unlink(missing_ok=True)
        command = ["ctest", "--test-dir", folder, "-j", self.options.jobs, "--output-on-failure"]
        command += ["--no-tests=error", "--output-junit", report, *options]
        for option, value in (("-L", labels), ("-LE", without), ("-R", self.options.filter)):
            if value:
                command += [option, value]
        code = self.run(command, env=env, check=False)
        return self.count(report, code, may_skip=labels == "vm")

    def count(self, report, code, may_skip=False):
        """Reads a JUnit report. A missing or empty one is a failure, whatever the exit code."""
        if not report.exists():
            raise StageFailed(f"exit code {code}, and no report was written")
        root = xml.parse(report).getroot()
        suites = [root] if root.tag == "testsuite" else root.findall("testsuite")
        total, result = 0, Result()
        for suite in suites:
            total += int(suite.get("tests", 0))
            result.failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            result.skipped += int(suite.get("skipped", 0)) + int(suite.get("disabled", 0))
        result.passed = total - result.failed - result.skipped
        if total == 0 or (result.skipped == total and not may_skip):
            raise StageFailed("no test was run")
        if code != 0 and result.failed == 0:
            raise StageFailed(f"exit code {code}, although the report counts no failure")
        return result


def stage_lint(stage):
    stage.run(["make", "--no-print-directory", "lint-only"])
    return Result(passed=1)


def stage_cpu(stage):
    folder = stage.build("cpu-release")
    return stage.ctest(folder)


def stage_asan(stage):
    folder = stage.build("cpu-asan")
    return stage.ctest(folder, without="gpu|slow")


def stage_tsan(stage):
    folder = stage.build("cpu-tsan")
    return stage.ctest(folder, without="gpu|vm|slow")


def stage_chaos(stage):
    folder = stage.build("cpu-release")
    env = {"MSCCLPP_TEST_SEEDS": str(stage.options.seeds)}
    result = stage.ctest(folder, labels="chaos", env=env)
    result.note = f"{stage.options.seeds} seeds each"
    return result


def stage_rxe(stage):
    folder = stage.build("cpu-release", targets=["mscclpp_vm_tests"])
    result = stage.ctest(folder, labels="vm", without=None, options=["--verbose"])
    stage.log.flush()
    text = stage.log_path.read_text(encoding="utf-8")
    tests = sum(int(n) for n in re.findall(r"\[  PASSED  \] (\d+) test", text))
    reasons = re.findall(r"cannot run here: (.*)", text)
    result.note = reasons[0] if reasons else f"{tests} tests in the virtual machine"
    return result


def stage_python(stage):
    stage.run(["tools/setup.sh", "venv"])
    python = ROOT / ".venv" / "bin" / "python"
    cuda = "AUTO" if has_gpu() else "OFF"
    stage.run(
        [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
        + ["--no-build-isolation", "--force-reinstall", "-v" if stage.options.verbose else "-q"]
        + ["--config-settings=build-dir=build/python"]
        + [f"--config-settings=cmake.define.MSCCLPP_USE_CUDA={cuda}", "."]
    )
    report = ROOT / "build" / "report-python.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "test/python", "-ra", f"--junitxml={report}"]
    if stage.options.filter:
        command += ["-k", stage.options.filter]
    return stage.count(report, stage.run(command, check=False))


def stage_cuda(stage):
    nvcc = find_nvcc()
    if nvcc is None:
        return Result(skipped=1, note="not compiled: no nvcc")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    archs = [a for a in CUDA_CHECK_ARCHS if f"compute_{a.rstrip('a')}" in known.stdout.split()]
    settings = [f"-DMSCCLPP_CUDA_ARCHS={';'.join(archs)}"]
    if not has_gpu():
        settings.append("-DCMAKE_BUILD_TYPE=Debug")  # the host's half is not run: compile it faster
    # All that nvcc compiles; the CPU tests are other stages' business.
    targets = ("mscclpp-ep", "mscclpp_gpu_tests")
    folder = stage.build("cuda-release", folder="build/cuda-check", settings=settings, targets=targets)
    note = f"compiled for {' '.join(archs)}"
    if not has_gpu():
        return Result(passed=1, note=note + ", not run: no GPU")
    result = stage.ctest(folder, labels="gpu", without=None)
    result.note = note
    return result


def stage_rules(stage):
    stage.run([sys.executable, "tools/lint.py", "--fast"])
    return Result(passed=1)


# What `make test` and CI run.
DEFAULT = ("lint", "cpu", "chaos", "asan", "tsan", "rxe", "python", "cuda")

STAGES = {
    "rules": stage_rules,
    "lint": stage_lint,
    "cpu": stage_cpu,
    "chaos": stage_chaos,
    "rxe": stage_rxe,
    "asan": stage_asan,
    "tsan": stage_tsan,
    "python": stage_python,
    "cuda": stage_cuda,
}


def has_gpu():
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU 0" in listed.stdout


def find_nvcc():
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (pathlib.Path(home) / "bin" / "nvcc").exists():
            return str(pathlib.Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def run_stage(name, options):
    print(f"\n==== {name} " + "=" * (90 - len(name)), flush=True)
    stage = Stage(name, options)
    start = time.monotonic()
    try:
        result = STAGES[name](stage)
    except StageFailed as error:
        result = Result(failed=1, note=str(error))
    if result.failed:
        result.note = (
            result.note + "; " if result.note else ""
        ) + f"see {relative(stage.log_path)}"
    return result, time.monotonic() - start


def relative(path):
    return path.relative_to(ROOT)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"some of: {' '.join(STAGES)}")
    parser.add_argument("--filter", help="run only the tests whose name matches this")
    parser.add_argument("--seeds", type=int, default=200, help="seeds of the stage chaos")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--stop", action="store_true", help="stop after the first failed stage")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    for name in options.stages:
        if name not in STAGES:
            parser.error(f"unknown stage '{name}': use some of {' '.join(STAGES)}")
    if options.seeds < 1:
        parser.error(f"--seeds is {options.seeds}: use 1 or more")

    rows, total = [], Result()
    for name in options.stages or DEFAULT:
        result, seconds = run_stage(name, options)
        rows.append((name, result, seconds))
        total.passed += result.passed
        total.failed += result.failed
        total.skipped += result.skipped
        if result.failed and options.stop:
            break

    print(f"\n{'stage':<8}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}  note")
    for name, result, seconds in rows:
        counts = f"{result.passed:>8}{result.failed:>8}{result.skipped:>9}{seconds:>9.0f}"
        print(f"{name:<8}{counts}  {result.note}")
    skipped = f", {total.skipped} skipped" if total.skipped else ""
    print(f"{total.passed} passed, {total.failed} failed{skipped}", flush=True)
    return 0 if total.failed == 0 and total.passed > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
