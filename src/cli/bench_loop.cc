#include "bench_loop.hpp"

#include <algorithm>
#include <chrono>

#include "cli_kernels.hpp"

namespace mscclpp::ep::cli {
namespace {

using Clock = std::chrono::steady_clock;

/// Several times the second-level cache of any GPU.
constexpr std::int64_t kFlushBytes = std::int64_t{256} << 20;

double microseconds(Clock::duration time) {
  return std::chrono::duration<double, std::micro>(time).count();
}

double medianOf(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[(values.size() - 1) / 2];
}

}  // namespace

TimedLoop::TimedLoop(const BenchOptions& options, const RankContext& context,
                     const RankDevice& device, void* comm)
    : options_(options),
      context_(context),
      device_(device),
      comm_(device.device().borrowStream(comm)),
      wrong_(device.make(DType::i64, {1})) {
  if (options.flush) scratch_ = device.make(DType::u8, {kFlushBytes});
  device.stream().synchronize();
}

void TimedLoop::flush() {
  device_.device().fill(scratch_.data, 0, scratch_.bytes(), comm_);
  align_();
}

Timing TimedLoop::run(const std::function<Outputs()>& call) {
  std::vector<std::pair<Event, Event>> marks;
  std::vector<double> host;
  Outputs outputs;
  context_.bootstrap->barrier();
  Clock::time_point begin;
  for (int i = 0; i < options_.warmup + options_.iterations; ++i) {
    if (i == options_.warmup) begin = Clock::now();
    if (options_.flush) flush();
    const auto before = Clock::now();
    outputs = {};
    const auto released = Clock::now();
    Event start = comm_.record();
    const auto called = Clock::now();
    outputs = call();
    const auto after = Clock::now();
    if (i < options_.warmup) continue;
    host.push_back(microseconds(after - called + (released - before)));
    marks.emplace_back(std::move(start), outputs.done);
  }
  comm_.synchronize();
  const double loop = microseconds(Clock::now() - begin) / options_.iterations;
  std::vector<double> device;
  for (const auto& [start, end] : marks) device.push_back(end.elapsedMs(start) * 1e3);
  Timing timing = gather(device, std::move(host), loop);
  timing.correct = onAllRanks(correct(outputs));
  return timing;
}

std::vector<double> TimedLoop::slowest(const std::vector<double>& mine) const {
  const auto ranks = static_cast<std::size_t>(context_.ranks), n = mine.size();
  std::vector<double> all(ranks * n);
  std::copy(mine.begin(), mine.end(), all.begin() + static_cast<std::ptrdiff_t>(n) * context_.rank);
  context_.bootstrap->allGather(all.data(), n * sizeof(double));
  std::vector<double> out(mine);
  for (std::size_t i = 0; i < all.size(); ++i) out[i % n] = std::max(out[i % n], all[i]);
  return out;
}

Timing TimedLoop::gather(const std::vector<double>& device, std::vector<double> host,
                         double loop) const {
  const std::vector<double> calls = slowest(device);
  Timing timing;
  timing.measured = true;
  timing.median = medianOf(calls);
  timing.least = *std::min_element(calls.begin(), calls.end());
  timing.most = *std::max_element(calls.begin(), calls.end());
  timing.host = slowest({medianOf(std::move(host))})[0];
  timing.loop = slowest({loop})[0];
  return timing;
}

bool TimedLoop::correct(const Outputs& outputs) {
  Device& device = device_.device();
  device.fill(wrong_.data, 0, wrong_.bytes(), comm_);
  bool sameShapes = true;
  for (const auto& [actual, expected] : outputs.checks) {
    sameShapes = sameShapes && actual.bytes() == expected.bytes();
    CompareArgs args;
    args.actual = actual.as<const char>();
    args.expected = expected.as<const char>();
    args.bytes = std::min(actual.bytes(), expected.bytes());
    args.wrong = wrong_.as<std::uint64_t>();
    kernelsOf(device.platform()).compare(args, comm_.native());
  }
  comm_.synchronize();
  return sameShapes && device_.read<std::uint64_t>(wrong_)[0] == 0;
}

bool TimedLoop::onAllRanks(bool mine) const {
  return slowest({mine ? 0.0 : 1.0})[0] == 0.0;
}

}  // namespace mscclpp::ep::cli
