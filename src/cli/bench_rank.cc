#include "bench_rank.hpp"

#include <algorithm>
#include <cstdio>
#include <fstream>

#include <mscclpp/errors.hpp>
#include <mscclpp/format.hpp>

#include "bench_transport.hpp"
#include "exit_code.hpp"

namespace mscclpp::ep::cli {
namespace {

constexpr std::uint8_t kPoison = 0xA5;
constexpr std::size_t kPadding = 64 * 1024;
/// Of the rings between nodes on GPUs, if there are several: what inference engines pass.
constexpr std::size_t kRailBytes = std::size_t{1} << 30;

bool isCombine(BenchCase which) {
  return which == BenchCase::combinePool || which == BenchCase::combinePlain;
}

std::size_t roundUp(std::size_t n, std::size_t to) {
  return (n + to - 1) / to * to;
}

}  // namespace

BenchRank::BenchRank(const BenchOptions& options, const RankContext& context)
    : options_(options),
      context_(context),
      progress_(context.printer()),
      device_(options.platform, deviceOfRank(options.platform, context.rank), context.rank),
      routing_(options),
      data_(options, routing_, context.rank) {
  order_.computeStream = device_.native();
  order_.asyncFinish = true;
}

/// Room for two dispatches and one experts' output in the pool, and for a whole call in the staging
/// area: everything takes the direct path, in one go.
void BenchRank::makeBuffer() {
  const auto rows = static_cast<std::size_t>(routing_.maxRows());
  const auto hidden = static_cast<std::size_t>(options_.hidden);
  const auto topk = static_cast<std::size_t>(options_.topk);
  const std::size_t received = rows * (hidden * 2 + topk * 12 + 4) + kPadding;
  const std::size_t staged = static_cast<std::size_t>(options_.ranks) *
                             (static_cast<std::size_t>(options_.tokens) + 8) *
                             (hidden * 2 + topk * 4);
  BufferOptions options;
  options.platform = options_.platform;
  options.deviceIndex = device_.device().index();
  options.topology = options_.topology;
  options.stagingBytes = std::max(received, staged) + kPadding;
  options.numNvlBytes = options.stagingBytes + 2 * received + rows * hidden * 2 + kPadding;
  options.maxExpertsPerRank = options_.experts / options_.ranks;
  if (options_.platform == Platform::cuda) options.numRdmaBytes = kRailBytes;
  buffer_ = std::make_unique<Buffer>(context_.bootstrap, options);
  loop_.emplace(options_, context_, device_, buffer_->commStream());
}

void BenchRank::makeHandle() {
  const std::int64_t tokens = options_.tokens, topk = options_.topk;
  const std::vector<std::int64_t> idx = routing_.topkIdx(context_.rank);
  const std::vector<float> weights(idx.size(), 1.0f / static_cast<float>(topk));
  topkIdx_ = device_.upload(DType::i64, {tokens, topk}, idx.data());
  topkWeights_ = device_.upload(DType::f32, {tokens, topk}, weights.data());
  std::vector<std::int32_t> counts(static_cast<std::size_t>(options_.ranks), 0);
  for (int t = 0; t < options_.tokens; ++t) {
    for (const int r : routing_.targets(context_.rank, t)) ++counts[static_cast<std::size_t>(r)];
  }
  if (options_.plantError) counts[0] ^= 1;
  expectedCounts_ = device_.upload(DType::i32, {options_.ranks}, counts.data());
  layout_ = buffer_->getDispatchLayout({topkIdx_, options_.experts, {}, order_});
  DispatchRequest request;
  request.x = device_.make(DType::bf16, {tokens, options_.hidden});
  request.isTokenInRank = layout_.isTokenInRank;
  request.numTokensPerRank = layout_.numTokensPerRank;
  request.numTokensPerExpert = layout_.numTokensPerExpert;
  request.order = order_;
  handle_ = buffer_->dispatch(request).handle;
  loop_->comm().synchronize();
}

BenchRank::Case BenchRank::makeCase(BenchCase which) const {
  switch (which) {
    case BenchCase::dispatchBf16:
    case BenchCase::dispatchUncached:
      return makeDispatchCase(false);
    case BenchCase::dispatchFp8:
      return makeDispatchCase(true);
    case BenchCase::combinePool:
      return makeCombineCase(RowKind::poolOutput, true);
    case BenchCase::combinePlain:
      return makeCombineCase(RowKind::plainOutput, false);
    case BenchCase::layout:
      break;
  }
  return {};
}

BenchRank::Case BenchRank::makeDispatchCase(bool fp8) const {
  const std::int64_t tokens = options_.tokens, hidden = options_.hidden;
  const std::int64_t rows = routing_.rowCount(context_.rank);
  const RowKind kind = fp8 ? RowKind::fp8 : RowKind::bf16;
  const DType dtype = fp8 ? DType::e4m3 : DType::bf16;
  Case out;
  out.rowBytes = static_cast<std::size_t>(hidden) * sizeOf(dtype);
  out.x = device_.upload(dtype, {tokens, hidden}, data_.sent(kind, out.rowBytes).data());
  out.expected = device_.upload(dtype, {rows, hidden}, data_.received(kind, out.rowBytes).data());
  if (!fp8) return out;
  const int count = scalesPerRow(hidden);
  const std::size_t scaleBytes = static_cast<std::size_t>(count) * 4;
  out.scales =
      device_.upload(DType::f32, {tokens, count}, data_.sent(RowKind::scales, scaleBytes).data());
  out.expectedScales =
      device_.upload(DType::f32, {rows, count}, data_.received(RowKind::scales, scaleBytes).data());
  out.rowBytes += scaleBytes;
  return out;
}

BenchRank::Case BenchRank::makeCombineCase(RowKind kind, bool inPool) const {
  const std::vector<std::int64_t> shape{routing_.rowCount(context_.rank), options_.hidden};
  Case out;
  out.rowBytes = static_cast<std::size_t>(options_.hidden) * 2;
  out.x = inPool ? buffer_->createTensor(DType::bf16, shape, device_.native())
                 : device_.make(DType::bf16, shape);
  check(buffer_->inPool(out.x) == inPool, ErrorCode::internal,
        "the benchmark's pool is too small for {}", out.x.describe());
  device_.write(out.x, data_.output(kind).data());
  out.expected = device_.upload(DType::bf16, {options_.tokens, options_.hidden},
                                data_.combined(kind, buffer_->topology()).data());
  return out;
}

Outputs BenchRank::call(BenchCase which, const Case& data, int blocks) const {
  if (which == BenchCase::layout) return callLayout();
  if (isCombine(which)) return callCombine(data, blocks);
  return callDispatch(which != BenchCase::dispatchUncached, data, blocks);
}

Outputs BenchRank::callDispatch(bool cached, const Case& data, int blocks) const {
  DispatchRequest request;
  request.x = data.x;
  request.xScales = data.scales;
  request.config.numSms = blocks;
  request.order = order_;
  if (cached) {
    request.handle = handle_;
  } else {
    request.isTokenInRank = layout_.isTokenInRank;
    request.numTokensPerRank = layout_.numTokensPerRank;
    request.numTokensPerExpert = layout_.numTokensPerExpert;
    request.topkIdx = topkIdx_;
    request.topkWeights = topkWeights_;
  }
  DispatchResult result = buffer_->dispatch(request);
  Outputs outputs;
  outputs.done = result.event;
  outputs.checks.emplace_back(std::move(result.recvX), data.expected);
  if (data.scales) outputs.checks.emplace_back(std::move(result.recvXScales), data.expectedScales);
  return outputs;
}

Outputs BenchRank::callCombine(const Case& data, int blocks) const {
  CombineRequest request;
  request.x = data.x;
  request.handle = handle_;
  request.config.numSms = blocks;
  request.order = order_;
  CombineResult result = buffer_->combine(request);
  Outputs outputs;
  outputs.done = result.event;
  outputs.checks.emplace_back(std::move(result.x), data.expected);
  return outputs;
}

Outputs BenchRank::callLayout() const {
  LayoutResult result = buffer_->getDispatchLayout({topkIdx_, options_.experts, {}, order_});
  Outputs outputs;
  outputs.done = result.event;
  outputs.checks.emplace_back(std::move(result.numTokensPerRank), expectedCounts_);
  return outputs;
}

/// Overwrites all free memory that the next outputs can be taken from, so that rows which do not
/// arrive are seen. Ordinary memory is the allocator's choice: several pieces of the size are
/// overwritten and given back.
void BenchRank::poison(const Case& data) const {
  constexpr int kPieces = 4;
  constexpr std::int64_t kPoolUnit = 256;  // the pool deals out multiples of this
  std::vector<Tensor> pieces;
  const auto overwrite = [&](Tensor tensor) {
    device_.device().fill(tensor.data, kPoison, tensor.bytes(), device_.stream());
    pieces.push_back(std::move(tensor));
  };
  for (std::int64_t size = static_cast<std::int64_t>(buffer_->poolBytesFree());
       size >= kPoolUnit;) {
    size = size / kPoolUnit * kPoolUnit;
    Tensor piece = buffer_->createTensor(DType::u8, {size}, device_.native());
    if (buffer_->inPool(piece)) {
      overwrite(std::move(piece));
      size = std::min(size, static_cast<std::int64_t>(buffer_->poolBytesFree()));
    } else {
      size /= 2;  // free, but not in one piece
    }
  }
  for (int i = 0; i < kPieces && data.expected; ++i) {
    overwrite(device_.make(data.expected.dtype, data.expected.shape));
  }
  device_.stream().synchronize();
}

CopyRoofline& BenchRank::copyOf(std::size_t rowBytes) {
  auto& copy = copies_[rowBytes];
  if (!copy) copy = std::make_unique<CopyRoofline>(options_, context_, device_, routing_, rowBytes);
  return *copy;
}

Timing BenchRank::roofline(BenchCase which, const Case& data, int blocks) {
  const std::size_t rowBytes = roundUp(data.rowBytes, 16);
  CopyRoofline& copy = copyOf(rowBytes);
  if (!copy.possible()) return {};
  Timing& timing = copyTimes_[{rowBytes, isCombine(which), blocks}];
  if (!timing.measured) timing = copy.measure(handle_, isCombine(which), blocks, *loop_);
  return timing;
}

/// Measured once per size of rows: no blocks take part.
Timing BenchRank::transport(std::size_t rowBytes, BenchLine& line) {
  auto& known = transports_[rowBytes];
  if (!known.first.measured) {
    TransportRoofline bare(options_, context_, device_, routing_, buffer_->topology(), rowBytes);
    known = {bare.measure(), bare.bytes()};
    context_.bootstrap->barrier();  // nobody goes while others may need its help
  }
  line.networkBytes = known.second;
  return known.first;
}

BenchLine BenchRank::measure(BenchCase which, const Case& data, int blocks) {
  const auto step = [&](const char* what) {
    progress_.step(fmt::format("{}, {} blocks: {}", nameOf(which), blocks, what));
  };
  BenchLine line;
  line.which = which;
  line.blocks = blocks;
  const bool nodes = buffer_->topology().nodes() > 1;
  step(nodes ? "bare transport" : "plain copy");
  // Other nodes' memory is not mapped: no kernel could copy there.
  if (which != BenchCase::layout) {
    line.copy = nodes ? transport(data.rowBytes, line) : roofline(which, data, blocks);
  }
  step("timing");
  poison(data);
  line.call = loop_->run([&] { return call(which, data, blocks); });
  // Once more, on memory without earlier results, checked in stream order right behind the call.
  step("checking");
  poison(data);
  context_.bootstrap->barrier();
  const bool correct = loop_->correct(call(which, data, blocks));
  line.call.correct = loop_->onAllRanks(correct) && line.call.correct;
  buffer_->checkHealth();
  const auto me = static_cast<std::size_t>(context_.rank);
  double rows = 0, own = 0;
  for (int r = 0; r < options_.ranks; ++r) rows += static_cast<double>(routing_.rowCount(r));
  for (int t = 0; t < options_.tokens; ++t) {
    const std::vector<int>& to = routing_.targets(context_.rank, t);
    own += std::binary_search(to.begin(), to.end(), context_.rank) ? 1 : 0;
  }
  line.bytes = rows / options_.ranks * static_cast<double>(data.rowBytes);
  line.remote =
      1 - own / std::max(1.0, static_cast<double>(routing_.rowCount(static_cast<int>(me))));
  return line;
}

BenchReport BenchRank::run() {
  progress_.step("making the buffer");
  makeBuffer();
  makeHandle();
  BenchReport report;
  report.device = device_.device().describe();
  report.nodes = buffer_->topology().nodes();
  if (report.nodes > 1) report.transport = toString(buffer_->topology().transport().value());
  for (int r = 0; r < options_.ranks; ++r) {
    report.meanRows += static_cast<double>(routing_.rowCount(r)) / options_.ranks;
  }
  if (options_.flush) {
    // Any row size will do for the kernel that aligns the ranks.
    const CopyRoofline& copy = copyOf(static_cast<std::size_t>(options_.hidden) * 2);
    loop_->alignWith([this, &copy] { copy.align(loop_->comm().native()); });
  }
  for (const BenchCase which : options_.cases) {
    progress_.step(fmt::format("{}: making the data", nameOf(which)));
    const Case data = makeCase(which);
    for (const int blocks : options_.blocks) {
      report.lines.push_back(measure(which, data, blocks));
      if (which == BenchCase::layout) break;  // chooses its blocks itself
    }
  }
  for (const auto& [rowBytes, copy] : copies_) copy->close();
  handle_ = {};
  layout_ = {};
  buffer_->destroy();
  return report;
}

int runBenchRank(const BenchOptions& options, const RankContext& context) {
  const BenchReport report = BenchRank(options, context).run();
  if (context.printer()) {
    std::fputs(formatBench(options, report).c_str(), stdout);
    std::fflush(stdout);
    if (!options.jsonPath.empty()) {
      std::ofstream file(options.jsonPath);
      file << benchJson(options, report) << "\n";
      file.close();
      check(file.good(), ErrorCode::system, "cannot write {}", options.jsonPath);
    }
  }
  const bool wrong =
      std::any_of(report.lines.begin(), report.lines.end(),
                  [](const BenchLine& line) { return !line.call.correct || !line.copy.correct; });
  return wrong ? kCheckFailed : kSuccess;
}

}  // namespace mscclpp::ep::cli
