#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>

#include <mscclpp/device/convert.hpp>
#include <mscclpp/errors.hpp>
#include <mscclpp/ext/ep/buffer.hpp>
#include <mscclpp/format.hpp>

#include "cli_kernels.hpp"
#include "demo.hpp"
#include "device_memory.hpp"
#include "exit_code.hpp"
#include "progress.hpp"

namespace mscclpp::ep::cli {
namespace {

/// Bytes that one received row takes in the pool, its own tables included.
std::size_t receivedRowBytes(const ModelShape& shape) {
  const auto hidden = static_cast<std::size_t>(shape.hidden);
  const std::size_t row =
      shape.fp8 ? hidden + static_cast<std::size_t>(scalesPerRow(shape.hidden)) * 4 : hidden * 2;
  return row + static_cast<std::size_t>(shape.topk) * 12 + 4;
}

/// Room for the worst case: every token of every rank comes here, twice over (the received rows and
/// the experts' output), so that nothing is ever staged; and staging for one go, so that no call is
/// split into several.
BufferOptions bufferOptions(const DemoOptions& options, int rank) {
  constexpr std::size_t kPadding = 64 * 1024, kTokenPadding = 8;
  const ModelShape& shape = options.shape;
  const auto ranks = static_cast<std::size_t>(shape.ranks);
  const auto tokens = static_cast<std::size_t>(shape.tokens) + kTokenPadding;
  const std::size_t received = ranks * tokens * receivedRowBytes(shape);
  const std::size_t outputs = ranks * tokens * static_cast<std::size_t>(shape.hidden) * 2;
  BufferOptions out;
  out.platform = options.platform;
  out.deviceIndex = deviceOfRank(options.platform, rank);
  out.stagingBytes = std::max(received, outputs) + kPadding;
  out.numNvlBytes = out.stagingBytes + received + outputs + kPadding;
  out.maxExpertsPerRank = shape.expertsPerRank();
  if (shape.nodes > 1) {
    // Some rows per lane for every node; see Config::rdmaBufferSizeHint().
    constexpr std::size_t kRows = 4 * 32 * 8;
    out.numRdmaBytes = kRows * ranks * (static_cast<std::size_t>(shape.hidden) * 2 + 2048);
    out.topology.ranksPerNode = shape.ranksPerNode();
    out.topology.transport = options.transport;
  }
  return out;
}

class DemoRank {
 public:
  DemoRank(const DemoOptions& options, const RankContext& context)
      : options_(options),
        shape_(options.shape),
        context_(context),
        progress_(context.printer()),
        device_(options.platform, deviceOfRank(options.platform, context.rank), context.rank),
        model_(shape_, options.text) {}

  DemoReport run();

 private:
  void iterate(int iteration);
  Tensor uploadInput(const LayerInput& in, Tensor& scales) const;
  Tensor runExperts(const DispatchResult& received);
  void account(const LayoutResult& layout, const DispatchResult& received);
  void checkOutput(int iteration, const LayerInput& in, const Tensor& y);
  void checkRow(int iteration, int token, const ExpectedRow& expected, const std::uint16_t* row);
  void step(int iteration, const char* what) {
    progress_.step(fmt::format("iteration {} of {}: {}", iteration + 1, options_.iterations, what));
  }
  DemoReport gather();

  const DemoOptions& options_;
  const ModelShape& shape_;
  const RankContext& context_;
  Progress progress_;
  RankDevice device_;
  DemoModel model_;
  std::unique_ptr<Buffer> buffer_;
  Tensor expertTable_;
  RankSummary summary_;
  std::vector<std::int64_t> expertLoad_;
  std::vector<std::vector<double>> phaseMs_;  ///< [iterations][kPhases]
};

DemoReport DemoRank::run() {
  progress_.step("making the buffer");
  buffer_ = std::make_unique<Buffer>(context_.bootstrap, bufferOptions(options_, context_.rank));
  expertLoad_.assign(static_cast<std::size_t>(shape_.experts), 0);
  const int mine = shape_.expertsPerRank(), first = context_.rank * mine;
  constexpr int kFloats = sizeof(ExpertParameters) / sizeof(float);
  expertTable_ = device_.upload(DType::f32, {mine, kFloats},
                                model_.experts().data() + static_cast<std::size_t>(first));
  for (int i = 0; i < options_.iterations; ++i) iterate(i);
  DemoReport report = gather();
  expertTable_ = {};
  buffer_->destroy();
  return report;
}

Tensor DemoRank::uploadInput(const LayerInput& in, Tensor& scales) const {
  if (!shape_.fp8) return device_.upload(DType::bf16, {shape_.tokens, shape_.hidden}, in.x.data());
  scales =
      device_.upload(DType::f32, {shape_.tokens, scalesPerRow(shape_.hidden)}, in.scales.data());
  return device_.upload(DType::e4m3, {shape_.tokens, shape_.hidden}, in.x8.data());
}

void DemoRank::iterate(int iteration) {
  step(iteration, "embedding and routing the text");
  const LayerInput in = model_.input(iteration, context_.rank);
  DispatchRequest dispatch;
  dispatch.x = uploadInput(in, dispatch.xScales);
  dispatch.topkIdx = device_.upload(DType::i64, {shape_.tokens, shape_.topk}, in.topkIdx.data());
  dispatch.topkWeights =
      device_.upload(DType::f32, {shape_.tokens, shape_.topk}, in.topkWeights.data());
  dispatch.config.numSms = options_.sms;
  dispatch.order.computeStream = device_.native();
  context_.bootstrap->barrier();  // phases are timed from a common start

  Stream& stream = device_.stream();
  std::vector<Event> marks;
  const auto mark = [&] { marks.push_back(stream.record()); };
  step(iteration, "layout");
  mark();
  const LayoutResult layout =
      buffer_->getDispatchLayout({dispatch.topkIdx, shape_.experts, {}, dispatch.order});
  mark();
  step(iteration, "dispatch");
  dispatch.isTokenInRank = layout.isTokenInRank;
  dispatch.numTokensPerRank = layout.numTokensPerRank;
  dispatch.numTokensPerExpert = layout.numTokensPerExpert;
  DispatchResult received = buffer_->dispatch(dispatch);
  mark();
  step(iteration, "experts");
  CombineRequest combine;
  combine.x = runExperts(received);
  mark();
  step(iteration, "combine");
  combine.handle = received.handle;
  combine.config = dispatch.config;
  combine.order = dispatch.order;
  const CombineResult result = buffer_->combine(combine);
  mark();
  stream.synchronize();
  buffer_->checkHealth();
  phaseMs_.emplace_back();
  for (int p = 0; p < kPhases; ++p) {
    const auto i = static_cast<std::size_t>(p);
    phaseMs_.back().push_back(marks[i + 1].elapsedMs(marks[i]));
  }
  step(iteration, "checking");
  account(layout, received);
  checkOutput(iteration, in, result.x);
}

Tensor DemoRank::runExperts(const DispatchResult& received) {
  const std::int64_t rows = received.recvX.shape[0];
  // From the pool: combine then reads the rows where they are.
  Tensor y = buffer_->createTensor(DType::bf16, {rows, shape_.hidden}, device_.native());
  summary_.inPool = summary_.inPool && buffer_->inPool(y);
  ExpertsArgs args;
  args.x = received.recvX.as<const char>();
  args.scales = received.recvXScales.as<const float>();
  args.scaleCount = scalesPerRow(shape_.hidden);
  args.topkIdx = received.recvTopkIdx.as<const std::int64_t>();
  args.topkWeights = received.recvTopkWeights.as<const float>();
  args.experts = expertTable_.as<const ExpertParameters>();
  args.y = y.as<std::uint16_t>();
  args.rows = rows;
  args.hidden = shape_.hidden;
  args.topk = shape_.topk;
  if (context_.rank == options_.plantErrorRank) args.plantedRow = rows / 2;
  kernelsOf(options_.platform).experts(args, device_.native());
  return y;
}

/// Adds up what moved, and compares what this rank's experts received with what all ranks sent.
void DemoRank::account(const LayoutResult& layout, const DispatchResult& received) {
  const auto experts = static_cast<std::size_t>(shape_.experts);
  std::vector<std::int32_t> sent(experts * static_cast<std::size_t>(shape_.ranks));
  const auto mine = device_.read<std::int32_t>(layout.numTokensPerExpert);
  std::copy(mine.begin(), mine.end(),
            sent.begin() + static_cast<std::ptrdiff_t>(experts) * context_.rank);
  context_.bootstrap->allGather(sent.data(), experts * sizeof(std::int32_t));
  const int perRank = shape_.expertsPerRank(), first = perRank * context_.rank;
  for (std::size_t e = 0; e < experts; ++e) {
    std::int64_t total = 0;
    for (std::size_t r = 0; r < static_cast<std::size_t>(shape_.ranks); ++r) {
      total += sent[r * experts + e];
    }
    expertLoad_[e] += total;
    const int local = static_cast<int>(e) - first;
    if (local < 0 || local >= perRank) continue;
    summary_.selections += total;
    if (received.numRecvTokensPerExpert[static_cast<std::size_t>(local)] != total) {
      ++summary_.badCounts;
    }
  }
  const auto offsets = device_.read<std::int32_t>(received.handle.rankOffsets());
  const auto me = static_cast<std::size_t>(context_.rank);
  const std::int64_t rows = received.handle.numRecvTokens();
  const std::int64_t remote = rows - (offsets[me + 1] - offsets[me]);
  const auto rowBytes = static_cast<std::int64_t>(receivedRowBytes(shape_));
  summary_.sent += shape_.tokens;
  summary_.received += rows;
  summary_.remote += remote;
  summary_.dispatchBytes += rows * rowBytes;
  summary_.dispatchRemoteBytes += remote * rowBytes;
  summary_.combineBytes += rows * shape_.hidden * 2;
  summary_.combineRemoteBytes += remote * shape_.hidden * 2;
}

void DemoRank::checkOutput(int iteration, const LayerInput& in, const Tensor& y) {
  const auto out = device_.read<std::uint16_t>(y);
  check(out.size() == in.x.size(), ErrorCode::internal, "combine returned {} for {} tokens",
        y.describe(), shape_.tokens);
  ExpectedRow expected;
  for (int t = 0; t < shape_.tokens; ++t) {
    model_.expect(in, t, expected);
    checkRow(iteration, t, expected, &out[static_cast<std::size_t>(t) * expected.exact.size()]);
  }
}

void DemoRank::checkRow(int iteration, int token, const ExpectedRow& expected,
                        const std::uint16_t* row) {
  for (std::size_t c = 0; c < expected.exact.size(); ++c) {
    const float got = device::bf16ToFloat(row[c]);
    const double error = std::abs(static_cast<double>(got) - expected.plain[c]);
    const bool exact = row[c] == expected.exact[c];
    const bool outside = !(error <= expected.bound[c]);  // also when it is not a number
    if ((!exact || outside) && !summary_.failed()) {
      summary_.iteration = iteration;
      summary_.token = token;
      summary_.column = static_cast<std::int32_t>(c);
      summary_.got = got;
      summary_.expected = device::bf16ToFloat(expected.exact[c]);
    }
    summary_.checked += 1;
    summary_.inexact += exact ? 0 : 1;
    summary_.outside += outside ? 1 : 0;
    summary_.largestError = std::max(summary_.largestError, error);
    summary_.largestShare = std::max(summary_.largestShare, error / expected.bound[c]);
  }
}

double medianOf(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0.0 : values[(values.size() - 1) / 2];
}

DemoReport DemoRank::gather() {
  DemoReport report;
  const auto me = static_cast<std::size_t>(context_.rank);
  report.ranks.resize(static_cast<std::size_t>(context_.ranks));
  report.ranks[me] = summary_;
  context_.bootstrap->allGather(report.ranks);
  report.expertLoad = expertLoad_;
  report.device = device_.device().describe();
  const auto transport = buffer_->topology().transport();
  if (transport) report.transport = toString(*transport);
  for (std::size_t p = 0; p < kPhases; ++p) {
    std::vector<double> slowest;
    for (const auto& iteration : phaseMs_) {
      std::vector<double> all(report.ranks.size());
      all[me] = iteration[p];
      context_.bootstrap->allGather(all);
      slowest.push_back(*std::max_element(all.begin(), all.end()));
    }
    report.phaseMs[p] = medianOf(std::move(slowest));
  }
  return report;
}

}  // namespace

int runDemoRank(const DemoOptions& options, const RankContext& context, bool processes) {
  const DemoReport report = DemoRank(options, context).run();
  if (context.printer()) {
    std::fputs(formatReport(options, report, processes).c_str(), stdout);
    std::fflush(stdout);
  }
  const bool failed = std::any_of(report.ranks.begin(), report.ranks.end(),
                                  [](const RankSummary& rank) { return rank.failed(); });
  return failed ? kCheckFailed : kSuccess;
}

}  // namespace mscclpp::ep::cli
