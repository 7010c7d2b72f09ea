"""The mutants: every synchronisation in the kernels, left out or weakened. tools/mutation.py runs them."""

import collections
import dataclasses
import re

import lint

ROOT = lint.ROOT
SOURCES = re.compile(
    r"^src/ext/ep/kernels/.*\.(cuh|cu)$|^include/mscclpp/[a-z_]+_device\.hpp$"
    r"|^include/mscclpp/device/cpu/line\.hpp$"
    r"|^src/core/proxy/(fifo|proxy_thread)\.cc$|^src/core/transport/shm/"
)
SWITCH = "include/mscclpp/mutation_switch.hpp"

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
# Not fenceMbarrierInit() and fenceProxyAsyncGlobal(): they are empty on the CPU platform.
DROPPED = {
    "syncBlock": None,
    "syncWarp": None,
    "syncBarrier": None,
    "arriveBarrier": None,
    "fenceProxyAsyncShared": None,
    "bulkWait": None,
    "bulkWaitRead": None,
    "arrive": None,
    "waitParity": None,
    "waitReached": "true",
    "waitUntil": "true",
    "storeRelease": None,
    "storeLocalRelease": None,
    "pushLine": None,
    "pullLine": "true",
    "awaitTail": "true",
    "awaitRoom": "true",
    "awaitIdLines": "true",
}
WEAKENED = {
    "storeRelease": "storeRelaxed",
    "storeLocalRelease": "storeRelaxed",
    "storeReleasePair": "storeRelaxedPair",
    "loadAcquire": "loadRelaxed",
    "loadLocalAcquire": "loadRelaxed",
    "loadPermission": "loadRelaxed",
    "fetchAddAcqRel": "fetchAddRelaxed",
    "fetchAddLocalAcqRel": "fetchAddLocalRelaxed",
}
# Of the host's side: their memory order becomes relaxed.
HOST_ATOMICS = ("__atomic_load_n", "__atomic_store_n", "__atomic_fetch_add")
STRONG_ORDER = re.compile(r"__ATOMIC_(ACQUIRE|RELEASE|ACQ_REL)")
# (call, argument, what, new argument)
CHANGED = (
    ("waitParity", 2, "other parity", "({}) ^ 1u"),
    ("waitReached", 2, "epoch before", "({}) - 1u"),
    ("pullLine", 3, "two epochs before", "({}) - 2u"),
    ("pushLine", 2, "two epochs before", "({}) - 2u"),
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
    (r"\bturn\.epoch - 2(?=\))", "room of two epochs before", "turn.epoch - 4"),
    (r"\bturn\.finished\b", "room told two epochs early", "turn.finished + 2u"),
    (r"kEpochStep - g\.share \* \(gridSize\(\) - 1\)", "block 0 gives no more than its share",
     "g.share"),
    (r"\(before \+ share\) % kEpochStep == 0", "first instead of last block",
     "before % kEpochStep == 0"),
    (r"\bqueue\.fifo\.publish\(\)(?=;)", "tail not published", ""),
    (r"\bconnection\.submit\(\)(?=;)", "gathered operations stay", ""),
    (r"!connection\.canPost\(\)", "full connection posted to", "false"),
    (r"\bserved\.flushes\.front\(\)\.ticket <= connection\.completed\(\)",
     "flush before completion", "true"),
    (r"\bqueue\.fifo\.position\(\) \+ 1", "flush of the trigger before", "queue.fifo.position()"),
)
CALLS = "|".join(
    sorted(
        {*DROPPED, *WEAKENED, *HOST_ATOMICS, *(c[0] for c in CHANGED)}
        | {"fetchAddRelaxed", "fetchAddLocalRelaxed"}
    )
)


def blank_comments(text):
    keep_lines = lambda m: re.sub(r"[^\n]", " ", m[0])
    return re.sub(r"//[^\n]*|/\*.*?\*/", keep_lines, text, flags=re.S)


def mutants_of(path):
    source = (ROOT / path).read_text()
    code = blank_comments(source)
    for call in re.finditer(rf"(?<![\w.>])((?:device::|detail::)?)\b({CALLS})\b(<[^<>;()]*>)?\(", code):
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
    if name in HOST_ATOMICS and STRONG_ORDER.search(source[call.start() : end]):
        weak = STRONG_ORDER.sub("__ATOMIC_RELAXED", source[call.start() : end])
        yield mutant(f"{name} relaxed", weak)
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


def all_mutants():
    found = []
    for path in lint.all_files():
        if SOURCES.search(str(path)):
            found += sorted(mutants_of(path), key=lambda m: (m.begin, m.end, m.what))
    seen = collections.Counter()
    for number, mutant in enumerate(found, 1):
        mutant.number = number
        seen[mutant.key()] += 1
        if seen[mutant.key()] > 1:  # a reason for one of them says nothing of the others
            mutant.shown += f" #{seen[mutant.key()]}"
    return found
