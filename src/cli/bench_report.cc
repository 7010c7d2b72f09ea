#include <cmath>
#include <optional>

#include <nlohmann/json.hpp>

#include <mscclpp/format.hpp>

#include "bench.hpp"
#include "text_table.hpp"

namespace mscclpp::ep::cli {
namespace {

/// Title and JSON name of each case.
struct CaseText {
  const char* name;
  const char* title;
};
constexpr CaseText kCaseTexts[kBenchCases] = {
    {"dispatch-bf16", "dispatch bf16, cached handle"},
    {"dispatch-fp8", "dispatch fp8 with scales, cached handle"},
    {"dispatch-uncached", "dispatch bf16 with top-k, counts and host wait included"},
    {"combine-pool", "combine bf16, rows in the pool"},
    {"combine-plain", "combine bf16, rows in an ordinary tensor"},
    {"layout", "get_dispatch_layout"},
};

const CaseText& textOf(BenchCase which) {
  return kCaseTexts[static_cast<int>(which)];
}

double gigabytesPerSecond(double bytes, double microseconds) {
  return bytes / microseconds / 1e3;
}

std::string rate(double value) {
  return fmt::format("{:.{}f}", value, value < 10 ? 2 : 1);
}

std::string microseconds(double value, bool correct = true) {
  return fmt::format("{:.1f}{}", value, correct ? "" : "!");
}

std::vector<std::string> cellsOf(const BenchLine& line) {
  const Timing& call = line.call;
  std::vector<std::string> cells{
      line.which == BenchCase::layout ? "-" : std::to_string(line.blocks),
      microseconds(call.median, call.correct), microseconds(call.least), microseconds(call.most)};
  const bool bytes = line.bytes > 0;
  cells.push_back(bytes ? rate(gigabytesPerSecond(line.bytes, call.median)) : "-");
  cells.push_back(microseconds(call.host));
  cells.push_back(microseconds(call.loop));
  if (!line.copy.measured) {
    cells.insert(cells.end(), 3, "-");
    return cells;
  }
  const double copied = line.networkBytes > 0 ? line.networkBytes : line.bytes;
  cells.push_back(microseconds(line.copy.median, line.copy.correct));
  cells.push_back(bytes ? rate(gigabytesPerSecond(copied, line.copy.median)) : "-");
  cells.push_back(fmt::format("{:.2f}", call.median / line.copy.median));
  return cells;
}

/// Three decimals: more would be noise.
double rounded(double value) {
  return std::round(value * 1e3) / 1e3;
}

nlohmann::json jsonOf(const Timing& timing) {
  return {{"median_us", rounded(timing.median)}, {"min_us", rounded(timing.least)},
          {"max_us", rounded(timing.most)},      {"host_us", rounded(timing.host)},
          {"loop_us", rounded(timing.loop)},     {"correct", timing.correct}};
}

}  // namespace

const char* nameOf(BenchCase which) {
  return textOf(which).name;
}

std::string formatBench(const BenchOptions& options, const BenchReport& report) {
  std::string out = fmt::format(
      "mscclpp-ep bench: {} ranks as {} on {} ({})\n"
      "  {} tokens per rank, hidden {}, top-{} of {} experts, uniform random routing; {:.0f} rows "
      "received per rank\n"
      "  back-to-back calls, events on the communication stream, {}; median of {} calls after {} "
      "of "
      "warm-up,\n  of the slowest rank in each call; GB/s = received bytes / time\n",
      options.ranks, options.processes ? "processes" : "threads", toString(options.platform),
      report.device, grouped(options.tokens), options.hidden, options.topk, options.experts,
      report.meanRows, options.flush ? "caches flushed before each" : "no cache flush",
      options.iterations, options.warmup);
  std::optional<BenchCase> current;
  std::optional<TextTable> table;
  const auto flush = [&] {
    if (table) out += table->text();
  };
  bool wrong = false;
  for (const BenchLine& line : report.lines) {
    wrong = wrong || !line.call.correct || !line.copy.correct;
    if (current != line.which) {
      flush();
      current = line.which;
      out += fmt::format("\n{}", textOf(line.which).title);
      if (line.bytes > 0) {
        out += fmt::format(": {} per rank and call, {:.0f} % from other ranks",
                           megabytes(line.bytes), line.remote * 100);
        if (line.networkBytes > 0) {
          out += fmt::format("; {} from rank 0 to other nodes", megabytes(line.networkBytes));
        }
      }
      out += "\n";
      const bool nodes = report.nodes > 1;
      table.emplace(
          std::vector<std::string>{"blocks", "us", "min", "max", "GB/s", "host us", "loop us",
                                   nodes ? "bare " + report.transport + " us" : "plain copy us",
                                   "GB/s", nodes ? "us / bare us" : "us / copy us"});
    }
    table->add(cellsOf(line));
  }
  flush();
  out +=
      wrong ? "\nFAILED: results marked '!' are wrong\n" : "\nOK: every timed result was checked\n";
  return out;
}

std::string benchJson(const BenchOptions& options, const BenchReport& report) {
  nlohmann::json root;
  root["version"] = MSCCLPP_EP_VERSION;
  root["platform"] = std::string(toString(options.platform));
  root["device"] = report.device;
  root["processes"] = options.processes;
  root["ranks"] = options.ranks;
  root["tokens"] = options.tokens;
  root["hidden"] = options.hidden;
  root["topk"] = options.topk;
  root["experts"] = options.experts;
  root["seed"] = options.seed;
  root["warmup"] = options.warmup;
  root["iterations"] = options.iterations;
  root["flush"] = options.flush;
  root["nodes"] = report.nodes;
  if (report.nodes > 1) root["transport"] = report.transport;
  root["mean_rows"] = report.meanRows;
  root["results"] = nlohmann::json::array();
  for (const BenchLine& line : report.lines) {
    nlohmann::json one = jsonOf(line.call);
    one["case"] = nameOf(line.which);
    one["blocks"] = line.blocks;
    one["bytes"] = line.bytes;
    one["remote_share"] = line.remote;
    if (line.bytes > 0) one["gbps"] = rounded(gigabytesPerSecond(line.bytes, line.call.median));
    if (line.copy.measured) {
      one["copy"] = jsonOf(line.copy);
      const bool nodes = line.networkBytes > 0;
      const double copied = nodes ? line.networkBytes : line.bytes;
      if (nodes) one["network_bytes"] = line.networkBytes;
      one["copy"]["gbps"] = rounded(gigabytesPerSecond(copied, line.copy.median));
      one["ratio"] = rounded(line.call.median / line.copy.median);
    }
    root["results"].push_back(std::move(one));
  }
  return root.dump(2);
}

}  // namespace mscclpp::ep::cli
