#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "device_cpu/runtime.hpp"

/// Text of failures: who waits for what, where.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {
namespace {

constexpr size_t kMaxLines = 40;

__attribute__((format(printf, 1, 2))) std::string format(const char* pattern, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

struct WaitText {
  std::string what;    // the same for all threads of one line of the table
  std::string detail;  // of the first of them
};

WaitText describePolling(const Fiber* fiber) {
  const Polling& polling = *fiber->polling;
  if (fiber->polling == &fiber->handPolling) {
    return {"polls " + describeAddress(fiber->block, polling.address) +
                " in a loop without a wait primitive",
            ""};
  }
  WaitText text;
  text.what = "waits (polls) at " + describeSite(polling.site) +
              format(" (what %u, peer %d)", polling.what, polling.peer);
  if (polling.address == nullptr) return text;
  text.detail = "for " + describeAddress(fiber->block, polling.address);
  if (polling.wordKnown) {
    text.detail += format(" to reach %u, sees %u", polling.expected, polling.seen);
  }
  return text;
}

WaitText describeBarrier(const Fiber* fiber) {
  const Block* block = fiber->block;
  const auto* barrier = static_cast<const Barrier*>(fiber->address);
  const auto id = static_cast<int>(barrier - block->barriers);
  WaitText text;
  text.what = (id == 0 ? std::string("syncBlock") : format("syncBarrier %d", id)) + " at " +
              describeSite(fiber->site);
  text.detail = format("%u of %u arrived", barrier->arrived, barrier->expected);
  if (block->live != block->threads) {
    text.detail += format(", %u threads of the block have exited", block->threads - block->live);
  }
  return text;
}

WaitText describeBlocked(const Fiber* fiber) {
  const std::string at = " at " + describeSite(fiber->site);
  switch (fiber->wait) {
    case WaitKind::barrier:
      return describeBarrier(fiber);
    case WaitKind::mbarrier:
      return {"waitParity on mbarrier " + describeAddress(fiber->block, fiber->address) + at, ""};
    case WaitKind::bulkGroup:
      return {(fiber->bulkReadOnly ? "bulkWaitRead" : "bulkWait") + at, ""};
    default:
      break;
  }
  const auto* collective = static_cast<const Collective*>(fiber->address);
  const char* name = fiber->wait == WaitKind::shuffle  ? "shuffle"
                     : fiber->wait == WaitKind::ballot ? "ballot"
                                                       : "syncWarp";
  return {name + at, format("lanes 0x%08x of 0x%08x arrived", collective->arrived,
                            collective->mask & ~fiber->warp->exited)};
}

WaitText describeWait(const Fiber* fiber) {
  if (fiber->state == ThreadState::blocked) return describeBlocked(fiber);
  if (fiber->state == ThreadState::polling) return describePolling(fiber);
  if (fiber->state == ThreadState::running) return {"failed here", ""};
  return {fiber->started ? "can run" : "not started", ""};
}

struct Line {
  std::string what;
  std::string example;
  unsigned count;
};

void addBlock(const Block* block, std::vector<Line>& lines) {
  const size_t first = lines.size();
  const std::string place = format("rank %d block %u: ", block->grid->stream->rank, block->index);
  for (unsigned i = 0; i < block->threads; ++i) {
    const Fiber* fiber = block->fibers + i;
    if (fiber->state == ThreadState::done) continue;
    const WaitText text = describeWait(fiber);
    const std::string what = place + text.what;
    size_t found = first;
    while (found < lines.size() && lines[found].what != what) ++found;
    if (found < lines.size()) {
      ++lines[found].count;
      continue;
    }
    std::string example = format(" (e.g. warp %u lane %u", i / kWarpLanes, i % kWarpLanes);
    example += (text.detail.empty() ? "" : ": " + text.detail) + ")";
    lines.push_back({what, example, 1});
  }
}

}  // namespace

std::string describeSite(const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return std::string(slash == nullptr ? site.file_name() : slash + 1) + ":" +
         std::to_string(site.line());
}

std::string describeAddress(const Block* block, const void* address) {
  const char* place = static_cast<const char*>(address);
  if (place >= block->shared && place < block->shared + block->sharedBytes) {
    return format("shared+%zu", static_cast<size_t>(place - block->shared));
  }
  return format("%p", address);
}

std::string kernelName(const Grid* grid) {
  // "... [with auto Body = name]" (GCC) or "... [Body = &name]" (Clang).
  std::string name = grid->request.name;
  const size_t start = name.find("Body = ");
  if (start == std::string::npos) return name;
  name = name.substr(start + 7);
  if (!name.empty() && name.back() == ']') name.pop_back();
  if (!name.empty() && name.front() == '&') name.erase(0, 1);
  return name;
}

std::string describeThread(const Fiber* fiber) {
  const Block* block = fiber->block;
  return format("rank %d block %u thread %u (warp %u lane %u)", block->grid->stream->rank,
                block->index, fiber->thread, fiber->thread / kWarpLanes, fiber->lane) +
         " of " + kernelName(block->grid);
}

std::string failureHeading(const PendingFailure& failure) {
  std::string text = std::string(failure.what) + ": " + describeThread(failure.fiber) + " at " +
                     describeSite(failure.site);
  if (failure.address != nullptr) {
    text += ", address " + describeAddress(failure.fiber->block, failure.address);
  }
  return text + " [seed " + std::to_string(runtime().config.seed) + "]\n";
}

std::string waitTable(const Worker* worker) {
  std::vector<const Block*> blocks;
  for (const Block* block = worker->firstRunning; block != nullptr; block = block->nextRunning) {
    blocks.insert(blocks.begin(), block);  // oldest first
  }
  std::vector<Line> lines;
  for (const Block* block : blocks) addBlock(block, lines);
  std::string text;
  for (size_t i = 0; i < lines.size(); ++i) {
    if (i == kMaxLines) {
      text += format("  ... and %zu lines more\n", lines.size() - i);
      break;
    }
    text += format("  %u threads, ", lines[i].count) + lines[i].what + lines[i].example + "\n";
  }
  return text;
}

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
