#include "bench_ll.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>

#include <mscclpp/errors.hpp>
#include <mscclpp/ext/ep/buffer.hpp>
#include <mscclpp/format.hpp>

#include "device_memory.hpp"
#include "exit_code.hpp"
#include "ext/ep/plan/low_latency_plan.hpp"
#include "ext/ep/reference_low_latency.hpp"
#include "progress.hpp"

namespace mscclpp::ep::cli {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kWarmup = 3;

std::size_t index(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

/// Whole numbers and weights that are powers of two: every sum is exact in bf16, in any order.
std::vector<std::uint16_t> wholeNumbers(std::uint64_t seed, int rank, int tokens, int hidden) {
  std::vector<std::uint16_t> x(index(tokens) * index(hidden));
  for (std::size_t i = 0; i < x.size(); ++i) {
    const auto value = reference::mix({seed, static_cast<std::uint64_t>(rank), i}) % 7;
    x[i] = reference::floatToBf16(static_cast<float>(value) - 3.0f);
  }
  return x;
}

LowLatencyReduce reduceOf(const LowLatencyBenchOptions& options) {
  return options.combineReduce == "source" ? LowLatencyReduce::source : LowLatencyReduce::rank;
}
/// So that the largest number of tokens fits.
std::size_t regionBytes(const LowLatencyBenchOptions& options) {
  return lowLatencySizeHint(
      *std::ranges::max_element(options.tokens), options.hidden, options.ranks, options.experts,
      {.reduce = reduceOf(options), .topk = options.topk, .spansNodes = true});
}

/// One rank's calls for one number of tokens.
class LowLatencyRank {
 public:
  LowLatencyRank(const LowLatencyBenchOptions& options, const RankContext& context,
                 const RankDevice& device, Buffer& buffer, int tokens)
      : options_(options), context_(context), device_(device), buffer_(buffer), tokens_(tokens) {
    const reference::Placement placement =
        reference::lowLatencyPlacement(options.experts, options.ranks);
    routing_ = reference::makeRouting(
        {reference::Pattern::uniform, tokens, options.topk, context.rank, options.seed}, placement);
    for (std::size_t i = 0; i < routing_.topkWeights.size(); ++i) {
      routing_.topkWeights[i] =
          0.25f * static_cast<float>(1 << (reference::mix({options.seed, i}) % 4));
    }
    x_ = wholeNumbers(options.seed, context.rank, tokens, options.hidden);
    makeTensors();
    countBytes(placement);
  }

  LowLatencyLine measure(bool fp8) {
    LowLatencyLine line = bytes_;
    line.tokens = tokens_;
    line.fp8 = fp8;
    const double selections = bytes_.combineBytes / (2.0 * options_.hidden);
    const int blocks = scalesPerRow(options_.hidden);
    const double rowBytes = fp8 ? options_.hidden + 4.0 * blocks + 16 : 2.0 * options_.hidden;
    line.dispatchBytes = selections * rowBytes;
    const int units = fp8 ? e4m3Units(options_.hidden) : bf16Units(options_.hidden);
    line.dispatchWire =
        remoteRows_ * DispatchArea::make(options_.ranks, tokens_, options_.topk, units).rowBytes;
    line.correct = onAllRanks(isCorrect());
    line.dispatch = time([&] { dispatch(fp8, false); });
    line.combine = time([&] { combine(false); });
    line.pair = time([&] {
      dispatch(fp8, false);
      combine(false);
    });
    line.halves = time([&] {
      dispatch(fp8, true);
      combine(true);
    });
    if (options_.phases) {
      line.phases = measurePhases(
          context_, device_, buffer_, options_.iterations,
          [&](const Tensor& times) { dispatch(fp8, false, times); },
          [&](const Tensor& times) { combine(false, times); });
    }
    line.correct = onAllRanks(isCorrect()) && line.correct;
    buffer_.checkHealth();
    return line;
  }

 private:
  void makeTensors() {
    const std::int64_t tokens = tokens_, topk = options_.topk, hidden = options_.hidden;
    const std::int64_t ranks = options_.ranks;
    const std::int64_t experts = (options_.experts + ranks - 1) / ranks, rows = ranks * tokens;
    const int blocks = scalesPerRow(hidden);
    input_ = device_.upload(DType::bf16, {tokens, hidden}, x_.data());
    topkIdx_ = device_.upload(DType::i64, {tokens, topk}, routing_.topkIdx.data());
    weights_ = device_.upload(DType::f32, {tokens, topk}, routing_.topkWeights.data());
    combined_ = device_.make(DType::bf16, {tokens, hidden});
    received_ = device_.make(DType::bf16, {experts, rows, hidden});
    outputs_.recvCount = device_.make(DType::i32, {experts});
    outputs_.sourceInfo = device_.make(DType::i32, {experts, rows});
    outputs_.layoutRange = device_.make(DType::i64, {experts, ranks});
    outputs_.slots = device_.make(DType::i32, {ranks, tokens, topk});
    outputs_.sourceTokens = device_.make(DType::i32, {ranks});
    outputs_.rowTable = device_.make(DType::i32, {2, ranks, tokens + 2});
    quantised_ = device_.make(DType::e4m3, {experts, rows, hidden});
    scales_ = device_.make(DType::f32, {experts, blocks, rows});
    expected_.resize(x_.size());
    for (std::int64_t t = 0; t < tokens; ++t) {
      float sum = 0;
      for (std::int64_t k = 0; k < topk; ++k) sum += routing_.topkWeights[index(t * topk + k)];
      if (options_.plantError) sum += 1;
      for (std::int64_t h = 0; h < hidden; ++h) {
        const std::size_t at = index(t * hidden + h);
        expected_[at] = reference::floatToBf16(reference::bf16ToFloat(x_[at]) * sum);
      }
    }
  }
  void countBytes(const reference::Placement& placement) {
    const reference::Layout layout = reference::layout(routing_, placement);
    for (int rank = 0; rank < options_.ranks; ++rank) {
      if (rank != context_.rank) remoteRows_ += layout.tokensPerRank[index(rank)];
    }
    double remoteSelections = 0;
    for (std::size_t e = 0; e < layout.tokensPerExpert.size(); ++e) {
      if (placement.rankOf[e] != context_.rank) remoteSelections += layout.tokensPerExpert[e];
    }
    bytes_.combineBytes = static_cast<double>(routing_.topkIdx.size()) * 2.0 * options_.hidden;
    const auto area = CombineArea::make(options_.ranks, tokens_, options_.topk,
                                        bf16Units(options_.hidden), options_.logfmt);
    const bool atSource = reduceOf(options_) == LowLatencyReduce::source;
    bytes_.combineWire =
        (atSource ? remoteSelections : remoteRows_) * static_cast<double>(area.rowBytes);
  }

  void dispatch(bool fp8, bool halves, const Tensor& times = {}) {
    LowLatencyDispatchRequest request;
    request.x = input_;
    request.topkIdx = topkIdx_;
    request.maxTokens = tokens_;
    request.experts = options_.experts;
    request.useFp8 = fp8;
    request.returnRecvHook = halves;
    request.numSms = options_.numSms;
    request.times = times;
    request.outputs = outputs_;
    request.outputs.recvX = fp8 ? quantised_ : received_;
    if (fp8) request.outputs.recvXScales = scales_;
    request.order.computeStream = device_.native();
    const LowLatencyDispatchResult result = buffer_.lowLatencyDispatch(request);
    if (halves) result.hook(device_.native());
    handle_ = result.handle;
  }
  void combine(bool halves, const Tensor& times = {}) {
    LowLatencyCombineRequest request;
    request.x = received_;
    request.topkIdx = topkIdx_;
    request.topkWeights = weights_;
    request.handle = handle_;
    request.useLogfmt = options_.logfmt;
    request.reduce = reduceOf(options_);
    request.returnRecvHook = halves;
    request.numSms = options_.numSms;
    request.times = times;
    request.out = combined_;
    request.order.computeStream = device_.native();
    const LowLatencyCombineResult result = buffer_.lowLatencyCombine(request);
    if (halves) result.hook(device_.native());
  }

  /// Every expert returns what it got.
  bool isCorrect() {
    Stream& stream = device_.stream();
    device_.device().fill(received_.data, 0xFF, received_.bytes(), stream);
    device_.device().fill(combined_.data, 0xFF, combined_.bytes(), stream);
    dispatch(false, false);
    combine(false);
    const auto combined = device_.read<std::uint16_t>(combined_);
    return options_.logfmt ? isNear(combined) : combined == expected_;
  }
  /// A value's sums have one sign: together they are off by no more than each of them may be.
  bool isNear(const std::vector<std::uint16_t>& combined) const {
    return std::ranges::equal(combined, expected_, [](std::uint16_t a, std::uint16_t b) {
      const float expected = reference::bf16ToFloat(b);
      return std::fabs(reference::bf16ToFloat(a) - expected) <= 0.02f * std::fabs(expected);
    });
  }

  bool onAllRanks(bool mine) const {
    std::vector<std::uint8_t> all(index(options_.ranks));
    all[index(context_.rank)] = mine ? 1 : 0;
    context_.bootstrap->allGather(all);
    return std::ranges::all_of(all, [](std::uint8_t good) { return good != 0; });
  }

  /// Collective.
  LowLatencyTime time(const std::function<void()>& call) {
    call();  // a handle for those that need one; everything is loaded
    device_.stream().synchronize();
    const std::vector<double> mine =
        options_.platform == Platform::cuda ? timeGraph(call) : timeLoop(call);
    std::vector<double> slowest(mine.size(), 0);
    std::vector<double> all(index(options_.ranks));
    for (std::size_t i = 0; i < mine.size(); ++i) {
      all[index(context_.rank)] = mine[i];
      context_.bootstrap->allGather(all);
      slowest[i] = *std::ranges::max_element(all);
    }
    std::ranges::sort(slowest);
    return {slowest[slowest.size() / 2], slowest.front(), slowest.back()};
  }
  std::vector<double> timeGraph(const std::function<void()>& call) {
    Stream& stream = device_.stream();
    const Graph graph = stream.capture([&] {
      for (int i = 0; i < options_.calls; ++i) call();
    });
    context_.bootstrap->barrier();
    std::vector<Event> events;
    for (int i = 0; i < kWarmup; ++i) stream.launch(graph);
    events.push_back(stream.record());
    for (int i = 0; i < options_.iterations; ++i) {
      stream.launch(graph);
      events.push_back(stream.record());
      // Threads that share a GPU share its queue of launches: one that fills it up would shut out
      // the others, for whom its kernels wait.
      if (sharesGpu()) stream.synchronize();
    }
    stream.synchronize();
    std::vector<double> times;
    for (std::size_t i = 1; i < events.size(); ++i) {
      times.push_back(events[i].elapsedMs(events[i - 1]) * 1000 / options_.calls);
    }
    return times;
  }
  bool sharesGpu() const { return options_.ranks > Device::count(options_.platform); }
  std::vector<double> timeLoop(const std::function<void()>& call) {
    std::vector<double> times;
    for (int i = 0; i < options_.iterations; ++i) {
      context_.bootstrap->barrier();
      const auto start = Clock::now();
      for (int c = 0; c < options_.calls; ++c) call();
      device_.stream().synchronize();
      times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count() /
                      options_.calls);
    }
    return times;
  }

  const LowLatencyBenchOptions& options_;
  const RankContext& context_;
  const RankDevice& device_;
  Buffer& buffer_;
  int tokens_;
  reference::Routing routing_;
  std::vector<std::uint16_t> x_, expected_;
  Tensor input_, topkIdx_, weights_, combined_, received_, quantised_, scales_;
  LowLatencyDispatchRequest::Outputs outputs_;
  LowLatencyHandle handle_;
  LowLatencyLine bytes_;
  double remoteRows_ = 0;
};

}  // namespace

int runLowLatencyBench(const LowLatencyBenchOptions& options, const RankContext& context) {
  Progress progress(context.printer());
  const RankDevice device(options.platform, deviceOfRank(options.platform, context.rank),
                          context.rank);
  BufferOptions bufferOptions;
  bufferOptions.platform = options.platform;
  bufferOptions.deviceIndex = device.device().index();
  bufferOptions.lowLatencyMode = true;
  bufferOptions.numRdmaBytes = regionBytes(options);
  bufferOptions.topology = options.topology;
  Buffer buffer(context.bootstrap, bufferOptions);
  const Topology& topology = buffer.topology();
  const LowLatencyPlace place{
      device.device().describe(), topology.nodes(),
      std::string(topology.transport() ? toString(*topology.transport()) : "")};
  std::vector<LowLatencyLine> lines;
  for (const int tokens : options.tokens) {
    LowLatencyRank rank(options, context, device, buffer, tokens);
    for (const bool fp8 : {true, false}) {
      progress.step(fmt::format("{} tokens, {}", tokens, fp8 ? "FP8" : "BF16"));
      lines.push_back(rank.measure(fp8));
    }
    device.stream().synchronize();
  }
  buffer.destroy();
  if (context.printer()) {
    std::fputs(formatLowLatency(options, lines, place).c_str(), stdout);
    std::fflush(stdout);
    if (!options.jsonPath.empty()) {
      std::ofstream file(options.jsonPath);
      file << lowLatencyJson(options, lines, place) << "\n";
      file.close();
      check(file.good(), ErrorCode::system, "cannot write {}", options.jsonPath);
    }
  }
  return std::ranges::all_of(lines, [](const LowLatencyLine& line) { return line.correct; })
             ? kSuccess
             : kCheckFailed;
}

}  // namespace mscclpp::ep::cli
