#include <mscclpp/format.hpp>

#include "bench_ll.hpp"
#include "text_table.hpp"

namespace mscclpp::ep::cli {
namespace {

std::string timeText(const LowLatencyTime& time) {
  return fmt::format("{:.1f} ({:.1f}-{:.1f})", time.median, time.least, time.most);
}
double rate(double bytes, const LowLatencyTime& time) {
  return time.median > 0 ? bytes / time.median * 1e-3 : 0;  // GB/s
}
std::string timeJson(const char* name, const LowLatencyTime& time) {
  return fmt::format(R"("{}": {{"median_us": {:.3f}, "least_us": {:.3f}, "most_us": {:.3f}}})",
                     name, time.median, time.least, time.most);
}

std::string phasesJson(const std::vector<LowLatencyPhase>& phases) {
  std::string text;
  for (const LowLatencyPhase& p : phases) {
    text += fmt::format(
        R"({}{{"call": "{}", "message": "{}", "kernel_us": {:.3f}, "fifo_us": {:.3f}, )"
        R"("proxy_us": {:.3f}, "wire_us": {:.3f}, "rest_us": {:.3f}}})",
        text.empty() ? "" : ", ", p.call, p.message, p.kernel, p.fifo, p.proxy, p.wire, p.rest);
  }
  return text;
}

}  // namespace

std::string formatLowLatency(const LowLatencyBenchOptions& options,
                             const std::vector<LowLatencyLine>& lines,
                             const LowLatencyPlace& place) {
  std::string text = fmt::format(
      "low latency: {} ranks as {}{}, hidden {}, top-{} of {} experts, {} back, combine_reduce {}, "
      "{}\n"
      "us per call: median (least-most) of {} timings of {} calls{}, slowest rank; GB/s as deep_ep "
      "counts them (a row per selection); wire: MB that a rank sends to others\n",
      options.ranks, options.processes ? "processes" : "threads",
      place.nodes > 1 ? fmt::format(" on {} nodes ({} between them)", place.nodes, place.transport)
                      : "",
      options.hidden, options.topk, options.experts, options.logfmt ? "LogFMT" : "BF16",
      options.combineReduce, place.device, options.iterations, options.calls,
      options.platform == Platform::cuda ? " in a graph" : "");
  TextTable table({"tokens", "format", "dispatch us", "GB/s", "combine us", "GB/s", "pair us",
                   "pair in halves us", "wire out MB", "wire back MB", "check"},
                  2);
  for (const LowLatencyLine& line : lines) {
    table.add({std::to_string(line.tokens), line.fp8 ? "FP8" : "BF16", timeText(line.dispatch),
               fmt::format("{:.0f}", rate(line.dispatchBytes, line.dispatch)),
               timeText(line.combine), fmt::format("{:.0f}", rate(line.combineBytes, line.combine)),
               timeText(line.pair), timeText(line.halves),
               fmt::format("{:.2f}", line.dispatchWire * 1e-6),
               fmt::format("{:.2f}", line.combineWire * 1e-6), line.correct ? "OK" : "WRONG"});
  }
  text += table.text();
  for (const LowLatencyLine& line : lines) {
    if (line.phases.empty()) continue;
    text += fmt::format(
        "\nwhere the time goes, {} tokens, {}: medians of {} eager calls; of each message its "
        "slowest "
        "sender\n{}",
        line.tokens, line.fp8 ? "FP8" : "BF16", options.iterations, formatPhases(line.phases));
  }
  return text;
}

std::string lowLatencyJson(const LowLatencyBenchOptions& options,
                           const std::vector<LowLatencyLine>& lines, const LowLatencyPlace& place) {
  std::string text = fmt::format(
      R"({{"device": "{}", "nodes": {}, "transport": "{}", "ranks": {}, "hidden": {}, "topk": {}, "experts": {}, "combine_reduce": "{}", "calls": {}, )"
      R"("iterations": {}, "num_sms": {}, "logfmt": {}, "lines": [)",
      place.device, place.nodes, place.transport, options.ranks, options.hidden, options.topk,
      options.experts, options.combineReduce, options.calls, options.iterations, options.numSms,
      options.logfmt);
  for (std::size_t i = 0; i < lines.size(); ++i) {
    const LowLatencyLine& line = lines[i];
    text += fmt::format(
        R"({}{{"tokens": {}, "format": "{}", {}, {}, {}, {}, "dispatch_bytes": {:.0f}, )"
        R"("combine_bytes": {:.0f}, "dispatch_wire_bytes": {:.0f}, "combine_wire_bytes": {:.0f}, )"
        R"("phases": [{}], "correct": {}}})",
        i == 0 ? "" : ", ", line.tokens, line.fp8 ? "fp8" : "bf16",
        timeJson("dispatch", line.dispatch), timeJson("combine", line.combine),
        timeJson("pair", line.pair), timeJson("halves", line.halves), line.dispatchBytes,
        line.combineBytes, line.dispatchWire, line.combineWire, phasesJson(line.phases),
        line.correct ? "true" : "false");
  }
  return text + "]}";
}

}  // namespace mscclpp::ep::cli
