#include <algorithm>
#include <numeric>
#include <string_view>

#include <mscclpp/format.hpp>

#include "demo.hpp"
#include "text_table.hpp"

namespace mscclpp::ep::cli {
namespace {

constexpr std::size_t kTopExperts = 5;
/// Columns of the histogram; more experts than that share columns.
constexpr std::size_t kHistogramColumns = 64;

double mb(std::int64_t bytes) {
  return static_cast<double>(bytes);
}

std::string header(const DemoOptions& options, const DemoReport& report, bool processes) {
  const ModelShape& s = options.shape;
  return fmt::format(
      "mscclpp-ep demo: {} rank{}{} as {} on {} ({})\n"
      "  {} tokens per rank and iteration, hidden {}, top-{} of {} experts ({} per rank), {}, {} "
      "iteration{}\n"
      "  text: {}, {} bytes{}\n\n",
      s.ranks, s.ranks == 1 ? "" : "s",
      s.nodes > 1 ? fmt::format(" on {} nodes ({} between them)", s.nodes, report.transport) : "",
      processes ? "processes" : "threads", toString(options.platform), report.device,
      grouped(s.tokens), s.hidden, s.topk, s.experts, s.expertsPerRank(),
      s.fp8 ? "fp8 (e4m3, one scale per 128)" : "bf16", options.iterations,
      options.iterations == 1 ? "" : "s",
      options.textPath.empty() ? "built in (data/demo.txt)" : options.textPath,
      grouped(static_cast<std::int64_t>(options.text.size())),
      static_cast<std::size_t>(s.tokens) * static_cast<std::size_t>(s.ranks * options.iterations) >
              options.text.size()
          ? ", read more than once"
          : "");
}

std::string rankTable(const DemoReport& report) {
  TextTable table({"rank", "tokens sent", "rows received", "from other ranks", "expert inputs",
                   "dispatched here", "combined from here", "largest error", "of the bound"});
  RankSummary sum;
  const auto row = [&](std::string name, const RankSummary& r) {
    table.add({std::move(name), grouped(r.sent), grouped(r.received), grouped(r.remote),
               grouped(r.selections), megabytes(mb(r.dispatchBytes)), megabytes(mb(r.combineBytes)),
               fmt::format("{:.2g}", r.largestError),
               fmt::format("{:.0f} %", r.largestShare * 100)});
  };
  for (std::size_t r = 0; r < report.ranks.size(); ++r) {
    const RankSummary& one = report.ranks[r];
    row(std::to_string(r), one);
    sum.sent += one.sent;
    sum.received += one.received;
    sum.remote += one.remote;
    sum.selections += one.selections;
    sum.dispatchBytes += one.dispatchBytes;
    sum.combineBytes += one.combineBytes;
    sum.dispatchRemoteBytes += one.dispatchRemoteBytes;
    sum.combineRemoteBytes += one.combineRemoteBytes;
    sum.largestError = std::max(sum.largestError, one.largestError);
    sum.largestShare = std::max(sum.largestShare, one.largestShare);
  }
  row("all", sum);
  return table.text() + fmt::format("  between ranks: dispatch {}, combine {}\n\n",
                                    megabytes(mb(sum.dispatchRemoteBytes)),
                                    megabytes(mb(sum.combineRemoteBytes)));
}

/// Load of the experts, one character for each (or for a few neighbours), from ' ' (none) to '@'.
std::string histogram(const std::vector<std::int64_t>& load) {
  constexpr std::string_view kLevels = " .:-=+*#%@";
  const std::size_t each = (load.size() + kHistogramColumns - 1) / kHistogramColumns;
  std::vector<std::int64_t> columns;
  for (std::size_t e = 0; e < load.size(); ++e) {
    if (e % each == 0) columns.push_back(0);
    columns.back() += load[e];
  }
  const std::int64_t most =
      std::max<std::int64_t>(1, *std::max_element(columns.begin(), columns.end()));
  std::string line;
  for (const std::int64_t column : columns) {
    const std::int64_t top = static_cast<std::int64_t>(kLevels.size()) - 1;
    line += kLevels[static_cast<std::size_t>((column * top + most - 1) / most)];
  }
  return line;
}

std::string expertLoad(const DemoOptions& options, const DemoReport& report) {
  const auto& load = report.expertLoad;
  std::vector<std::size_t> order(load.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return load[a] > load[b]; });
  const std::int64_t sum = std::accumulate(load.begin(), load.end(), std::int64_t{0});
  const double mean = static_cast<double>(sum) / static_cast<double>(load.size());
  std::string top;
  for (std::size_t i = 0; i < std::min(kTopExperts, order.size()); ++i) {
    const std::size_t e = order[i];
    top +=
        fmt::format("{}{} (rank {}) {}", i == 0 ? "" : ", ", e,
                    e / static_cast<std::size_t>(options.shape.expertsPerRank()), grouped(load[e]));
  }
  return fmt::format(
      "  load per expert: mean {:.1f}, least {}, most {} ({:.1f} x the mean)\n"
      "  busiest: {}\n  expert 0 [{}] {}\n\n",
      mean, grouped(load[order.back()]), grouped(load[order.front()]),
      mean > 0 ? static_cast<double>(load[order.front()]) / mean : 0.0, top, histogram(load),
      load.size() - 1);
}

std::string phases(const DemoOptions& options, const DemoReport& report) {
  static constexpr const char* kNames[kPhases] = {"layout", "dispatch", "experts", "combine"};
  std::string line;
  for (int p = 0; p < kPhases; ++p) {
    line += fmt::format("{}{} {}", p == 0 ? "" : ", ", kNames[p], duration(report.phaseMs[p]));
  }
  return fmt::format("  time per phase (slowest rank, median of {}): {}\n\n", options.iterations,
                     line);
}

std::string failureOf(std::size_t rank, const RankSummary& r) {
  std::string text;
  if (r.inexact + r.outside > 0) {
    text += fmt::format(
        "FAILED: rank {}: {} of {} values differ from the reference, {} of them by more than "
        "rounding "
        "allows; the first: iteration {}, token {}, column {}: got {}, expected {}\n",
        rank, grouped(r.inexact), grouped(r.checked), grouped(r.outside), r.iteration + 1, r.token,
        r.column, r.got, r.expected);
  }
  if (r.badCounts > 0) {
    text += fmt::format(
        "FAILED: rank {}: an expert received another number of rows than was sent to it, {} "
        "times\n",
        rank, r.badCounts);
  }
  return text;
}

}  // namespace

std::string formatReport(const DemoOptions& options, const DemoReport& report, bool processes) {
  std::string out = header(options, report, processes) + rankTable(report) +
                    expertLoad(options, report) + phases(options, report);
  std::string failures;
  std::int64_t checked = 0;
  double largest = 0, share = 0;
  bool inPool = true;
  for (std::size_t r = 0; r < report.ranks.size(); ++r) {
    failures += failureOf(r, report.ranks[r]);
    checked += report.ranks[r].checked;
    largest = std::max(largest, report.ranks[r].largestError);
    share = std::max(share, report.ranks[r].largestShare);
    inPool = inPool && report.ranks[r].inPool;
  }
  if (!inPool) out += "  note: the pool was full; some experts' outputs were staged\n";
  if (!failures.empty()) return out + failures;
  return out +
         fmt::format(
             "OK: {} values equal the single-process reference bit for bit; largest error against "
             "plain fp32 {:.2g}, {:.0f} % of what {} roundings to bf16 may cause\n",
             grouped(checked), largest, share * 100, options.shape.nodes > 1 ? "three" : "two");
}

}  // namespace mscclpp::ep::cli
