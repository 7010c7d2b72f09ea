#include <mscclpp/format.hpp>

#include "call_shape.hpp"
#include "group.hpp"

namespace mscclpp::ep {
namespace {

struct WaitText {
  WaitWhat what;
  const char* phase;      ///< where this rank was
  const char* waitedFor;  ///< what the peer had not done
};
constexpr WaitText kWaitTexts[] = {
    {WaitWhat::counts, "dispatch (notify)", "send its token counts"},
    {WaitWhat::dispatchEntry, "dispatch (entry)", "start its dispatch"},
    {WaitWhat::dispatchDone, "dispatch (end)", "finish sending"},
    {WaitWhat::combineEntry, "combine (entry)", "start its combine"},
    {WaitWhat::combineChunk, "combine (staged rows)", "stage a chunk of rows"},
    {WaitWhat::combineDone, "combine (end)", "finish reading"},
    {WaitWhat::lowLatencyRoom, "a low-latency call (start)", "receive what was sent two calls ago"},
    {WaitWhat::lowLatencyIds, "low_latency_dispatch (ids)", "enter the call"},
    {WaitWhat::lowLatencyRow, "low_latency_dispatch (rows)", "send a row"},
    {WaitWhat::lowLatencyWeights, "low_latency_combine (weights)", "send its weights"},
    {WaitWhat::lowLatencyPartial, "low_latency_combine (rows)", "send a sum of its experts"},
    {WaitWhat::lowLatencyEntry, "low_latency_combine (entry)", "enter the call"},
    {WaitWhat::lowLatencyOutput, "low_latency_combine (rows)", "send a row of its experts"},
};
/// Waits for counters that proxies add to.
constexpr WaitText kRailTexts[] = {
    {WaitWhat::railCounts, "dispatch (notify, between nodes)", "send its token counts"},
    {WaitWhat::railWindows, "dispatch (entry, between nodes)", "say where its node takes rows"},
    {WaitWhat::railRoom, "dispatch (sending between nodes)", "forward what was sent to its node"},
    {WaitWhat::railRows, "dispatch (forwarding)", "send its tokens"},
    {WaitWhat::railSums, "combine (between nodes)", "send its node's sums"},
    {WaitWhat::railSumRoom, "combine (sending sums)", "take the sums that were sent to it"},
};

/// A wait for a message between nodes, which carries no epoch.
std::string describeMessageWait(const FailureRecord& record, const WaitText& text) {
  return fmt::format(
      "EP timeout after {:.1f} s: rank {} in {} waited for rank {} of another node to {}; block "
      "{}, thread {}. Is rank {} alive, does it make the same calls in the same order, and do its "
      "proxy and the network get through? The limit is timeout_seconds or MSCCLPP_EP_TIMEOUT",
      static_cast<double>(record.waitedNs) * 1e-9, record.rank, text.phase, record.peer,
      text.waitedFor, record.block, record.thread, record.peer);
}

/// What the first word of a combine's hello says.
const char* combineName(std::uint64_t hello) {
  if (hello == kReducedAtSource) return "combine_reduce = \"source\"";
  return hello == kReducedAsLogfmt ? "use_logfmt = True" : "combine_reduce = \"rank\"";
}

std::string describeWait(const FailureRecord& record, const WaitText& text) {
  const auto behind =
      static_cast<std::uint32_t>(record.expected) - static_cast<std::uint32_t>(record.seen);
  // Entry flags come first in every call: a peer that is behind there has not entered the call. The
  // other flags follow an entry that was seen, so that peer is there and stuck, or died inside.
  const bool entry = text.what == WaitWhat::counts || text.what == WaitWhat::dispatchEntry ||
                     text.what == WaitWhat::combineEntry || text.what == WaitWhat::lowLatencyIds ||
                     text.what == WaitWhat::lowLatencyWeights ||
                     text.what == WaitWhat::lowLatencyEntry;
  return fmt::format(
      "EP timeout after {:.1f} s: rank {} in {} waited for rank {} to {}: epoch {} expected, {} "
      "seen "
      "({}); block {}, thread {}. Is rank {} alive, and does it make the same calls in the same "
      "order? "
      "The limit is timeout_seconds or MSCCLPP_EP_TIMEOUT",
      static_cast<double>(record.waitedNs) * 1e-9, record.rank, text.phase, record.peer,
      text.waitedFor, static_cast<std::uint32_t>(record.expected),
      static_cast<std::uint32_t>(record.seen),
      entry ? fmt::format("it has not entered this call and is {} kernels behind", behind)
            : std::string("it entered this call and did not finish"),
      record.block, record.thread, record.peer);
}

}  // namespace

std::string describeFailure(const FailureRecord& record) {
  const auto what = static_cast<WaitWhat>(record.what);
  for (const WaitText& text : kWaitTexts) {
    if (text.what != what) continue;
    const bool hasEpoch = record.expected != 0 || record.seen != 0;
    return hasEpoch ? describeWait(record, text) : describeMessageWait(record, text);
  }
  for (const WaitText& text : kRailTexts) {
    if (text.what == what) return describeMessageWait(record, text);
  }
  if (record.what == kWaitFifoRoom || record.what == kWaitFlush) {
    return fmt::format(
        "EP timeout after {:.1f} s: rank {} waited for its own proxy to {} for rank {}: the "
        "network "
        "to it is stuck, or the proxy thread gets no processor. The limit is timeout_seconds or "
        "MSCCLPP_EP_TIMEOUT",
        static_cast<double>(record.waitedNs) * 1e-9, record.rank,
        record.what == kWaitFlush ? "complete what it was given" : "take a request", record.peer);
  }
  switch (what) {
    case WaitWhat::shapeMismatch:
      return fmt::format(
          "rank {} called {}, but rank {} called {}: all ranks must make equal calls", record.rank,
          CallShape::describe(record.expected), record.peer, CallShape::describe(record.seen));
    case WaitWhat::railProtocol:
      return fmt::format(
          "rank {} got a row of call {} from rank {} of another node in call {}: all ranks must "
          "make the same calls in the same order",
          record.rank, static_cast<std::uint32_t>(record.seen), record.peer,
          static_cast<std::uint32_t>(record.expected));
    case WaitWhat::lowLatencyShape:
      return fmt::format(
          "rank {} called low_latency_dispatch with other arguments than rank {}: hidden, "
          "num_max_dispatch_tokens_per_rank, num_experts, top-k, use_fp8, round_scale and "
          "use_ue8m0 "
          "must be equal on all ranks",
          record.peer, record.rank);
    case WaitWhat::lowLatencyReduce:
      return fmt::format(
          "rank {} called low_latency_combine with {}, rank {} with {}: combine_reduce and "
          "use_logfmt must be equal on all ranks",
          record.peer, combineName(record.seen), record.rank, combineName(record.expected));
    case WaitWhat::lowLatencyRepeats:
      return fmt::format(
          "rank {} has {} selections on rank {}, of another node, where {} fit: with "
          "combine_reduce = \"source\" between nodes the experts in a row of topk_idx must differ",
          record.peer, record.seen, record.rank, record.expected);
    case WaitWhat::lowLatencyExpertRows:
      return fmt::format(
          "expert {} of rank {} is sent {} rows, where {} fit (ranks x "
          "num_max_dispatch_tokens_per_rank): the experts in a row of topk_idx must differ",
          record.peer, record.rank, record.seen, record.expected);
    case WaitWhat::overflow:
      return fmt::format(
          "rank {} would receive {} rows, more than num_worst_tokens = {}: raise num_worst_tokens "
          "on "
          "all ranks",
          record.rank, record.seen, record.expected);
    case WaitWhat::invalidExpert:
      return fmt::format("rank {} passed expert id {} in topk_idx: allowed are 0 .. {} and -1",
                         record.peer, static_cast<std::int64_t>(record.seen),
                         static_cast<std::int64_t>(record.expected) - 1);
    default:
      return fmt::format(
          "internal error: a pipeline of rank {} stood still for {:.1f} s (block {}, thread {})",
          record.rank, static_cast<double>(record.waitedNs) * 1e-9, record.block, record.thread);
  }
}

}  // namespace mscclpp::ep
