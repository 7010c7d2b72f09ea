#include "bench_ll_phases.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <limits>
#include <thread>

#include <mscclpp/errors.hpp>
#include <mscclpp/format.hpp>
#include <mscclpp/port_channel.hpp>

#include "cli_kernels.hpp"
#include "ext/ep/kernels/low_latency_api.cuh"
#include "text_table.hpp"

namespace mscclpp::ep::cli {
namespace {

constexpr int kClockRounds = 200;
constexpr std::chrono::seconds kLimit{20};
constexpr const char* kMessages[kPortMessages] = {"ids and rows", "weights", "sums"};

std::size_t index(std::int64_t i) {
  return static_cast<std::size_t>(i);
}
std::int64_t steadyNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

/// The device's clock minus the steady clock: the kernel's answer lies between two looks of the
/// host, and the closest two count.
std::int64_t clockOffset(const RankDevice& device) {
  const auto opened = Device::open(device.device().platform(), device.device().index());
  const RegisteredMemory memory = allocateHostMemory(opened, sizeof(ClockWords));
  auto* const words = reinterpret_cast<ClockWords*>(memory.data());
  kernelsOf(opened->platform())
      .clock({.words = words, .rounds = kClockRounds, .limitNs = std::uint64_t{20'000'000'000}},
             device.native());
  std::int64_t closest = std::numeric_limits<std::int64_t>::max(), offset = 0;
  for (std::uint64_t round = 1; round <= kClockRounds; ++round) {
    const std::int64_t asked = steadyNs();
    __atomic_store_n(&words->asked, round, __ATOMIC_RELEASE);
    while (__atomic_load_n(&words->answered, __ATOMIC_ACQUIRE) != round) {
      check(steadyNs() - asked < std::chrono::nanoseconds(kLimit).count(), ErrorCode::timeout,
            "bench-ll: the device's clock did not answer round {} in {} s", round, kLimit.count());
      std::this_thread::yield();
    }
    const std::int64_t answered = steadyNs();
    if (answered - asked >= closest) continue;
    closest = answered - asked;
    offset = static_cast<std::int64_t>(words->now) - (asked + closest / 2);
  }
  device.stream().synchronize();
  return offset;
}

/// A call's signals to the ranks of other nodes, each of which gets so many. They have been pushed
/// when the call's kernel is done, but a proxy may still have its hands on them.
std::vector<SignalTime> takeSignals(const RankContext& context, Buffer& buffer, int messages) {
  const Topology& topology = buffer.topology();
  const auto own = topology.members(topology.nodeOf(context.rank)).size();
  const std::size_t wanted = index(messages) * (index(context.ranks) - own);
  const std::int64_t start = steadyNs();
  std::vector<SignalTime> signals;
  while (signals.size() < wanted) {
    const std::vector<SignalTime> some = buffer.takeProxySignals();
    signals.insert(signals.end(), some.begin(), some.end());
    check(steadyNs() - start < std::chrono::nanoseconds(kLimit).count(), ErrorCode::timeout,
          "bench-ll: the proxies noted {} of {} signals in {} s", signals.size(), wanted,
          kLimit.count());
    std::this_thread::yield();
  }
  return signals;
}

/// What every rank knows of one call, on the steady clock; 0: there is none.
class Moments {
 public:
  Moments(const RankContext& context, const Topology& topology)
      : ranks_(context.ranks), topology_(topology), all_(index(ranks_) * width()) {}

  /// Collective. `signals`: what the own proxies have noted of the call, whose messages are given.
  void exchange(const RankContext& context, const std::vector<std::int64_t>& times,
                const std::vector<SignalTime>& signals, int firstMessage) {
    std::ranges::fill(all_, 0);
    std::int64_t* const mine = &all_[index(context.rank) * width()];
    std::ranges::copy(times, mine);
    std::vector<int> next(index(ranks_), firstMessage);
    for (const SignalTime& signal : signals) {
      const int message = next[index(signal.peer)]++;
      check(message < kPortMessages, ErrorCode::internal, "bench-ll: {} signals to rank {}",
            message + 1, signal.peer);
      std::int64_t* const to = mine + kTimes + 2 * (message * ranks_ + signal.peer);
      to[0] = static_cast<std::int64_t>(signal.seenNs);
      to[1] = static_cast<std::int64_t>(signal.submittedNs);
    }
    context.bootstrap->allGather(all_.data(), width() * sizeof(std::int64_t));
  }

  std::int64_t entered(int rank) const { return at(rank, 0); }
  std::int64_t written(int rank, int message) const { return at(rank, 1 + message); }
  std::int64_t arrived(int rank, int message) const {
    return at(rank, 1 + kPortMessages + message);
  }
  std::int64_t left(int rank) const { return at(rank, 1 + 2 * kPortMessages); }
  std::int64_t seen(int from, int to, int message) const {
    return at(from, kTimes + 2 * (message * ranks_ + to));
  }
  std::int64_t submitted(int from, int to, int message) const {
    return at(from, kTimes + 2 * (message * ranks_ + to) + 1);
  }
  /// Whose message left last.
  int slowestTo(int receiver, int message) const {
    int slowest = -1;
    for (int from = 0; from < ranks_; ++from) {
      if (from == receiver || topology_.nodeOf(from) == topology_.nodeOf(receiver)) continue;
      if (slowest < 0 ||
          submitted(from, receiver, message) > submitted(slowest, receiver, message)) {
        slowest = from;
      }
    }
    return slowest;
  }

 private:
  static constexpr int kTimes = sizeof(LowLatencyTimes) / sizeof(std::int64_t);
  std::size_t width() const { return index(kTimes + 2 * kPortMessages * ranks_); }
  std::int64_t at(int rank, int i) const { return all_[index(rank) * width() + index(i)]; }

  int ranks_;
  const Topology& topology_;
  std::vector<std::int64_t> all_;
};

/// All samples of one message.
class PhaseSamples {
 public:
  void add(const Moments& m, int message, bool isFirst, bool isLast, int receiver) {
    const int from = m.slowestTo(receiver, message);
    // Reduced at the source, a combine waits for no weights.
    if (from < 0 || m.arrived(receiver, message) == 0) return;
    const bool follows = !isFirst && m.arrived(from, message - 1) != 0;
    const std::int64_t start = follows ? m.arrived(from, message - 1) : m.entered(from);
    const std::int64_t marks[] = {start,
                                  m.written(from, message),
                                  m.seen(from, receiver, message),
                                  m.submitted(from, receiver, message),
                                  m.arrived(receiver, message),
                                  isLast ? m.left(receiver) : m.arrived(receiver, message)};
    for (std::size_t i = 0; i < samples_.size(); ++i) {
      samples_[i].push_back(static_cast<double>(marks[i + 1] - marks[i]) * 1e-3);
    }
  }
  LowLatencyPhase phase(const char* call, const char* message) {
    for (std::vector<double>& one : samples_) std::ranges::sort(one);
    const auto median = [&](std::size_t i) { return samples_[i][samples_[i].size() / 2]; };
    return {call, message, median(0), median(1), median(2), median(3), median(4)};
  }
  bool empty() const { return samples_[0].empty(); }

 private:
  std::array<std::vector<double>, 5> samples_;
};

}  // namespace

std::vector<LowLatencyPhase> measurePhases(const RankContext& context, const RankDevice& device,
                                           Buffer& buffer, int rounds, const TimedCall& dispatch,
                                           const TimedCall& combine) {
  constexpr int kMoments = sizeof(LowLatencyTimes) / sizeof(std::int64_t);
  const std::int64_t offset = clockOffset(device);
  const Tensor times = device.make(DType::i64, {kMoments});
  Moments moments(context, buffer.topology());
  std::array<PhaseSamples, kPortMessages> samples;
  buffer.noteProxySignals(true);
  const auto measure = [&](const TimedCall& call, int first, int last) {
    device.device().fill(times.data, 0, times.bytes(), device.stream());
    device.stream().synchronize();
    context.bootstrap->barrier();
    call(times);
    std::vector<std::int64_t> mine = device.read<std::int64_t>(times);
    for (std::int64_t& one : mine) one = one == 0 ? 0 : one - offset;
    moments.exchange(context, mine, takeSignals(context, buffer, last - first + 1), first);
    for (int message = first; message <= last; ++message) {
      for (int r = 0; r < context.ranks; ++r) {
        samples[index(message)].add(moments, message, message == first, message == last, r);
      }
    }
  };
  for (int i = 0; i < rounds; ++i) {
    measure(dispatch, 0, 0);
    measure(combine, 1, 2);
  }
  buffer.noteProxySignals(false);
  std::vector<LowLatencyPhase> phases;
  for (int message = 0; message < kPortMessages; ++message) {
    if (samples[index(message)].empty()) continue;
    const bool rows = message == 2 && samples[1].empty();  // each selection's, not sums
    phases.push_back(samples[index(message)].phase(message == 0 ? "dispatch" : "combine",
                                                   rows ? "rows" : kMessages[message]));
  }
  return phases;
}

std::string formatPhases(const std::vector<LowLatencyPhase>& phases) {
  if (phases.empty()) return {};
  TextTable table(
      {"call", "message", "kernel us", "FIFO us", "proxy us", "wire us", "kernel us", "sum us"}, 2);
  for (const LowLatencyPhase& p : phases) {
    std::vector<std::string> cells = {p.call, p.message};
    for (const double us : {p.kernel, p.fifo, p.proxy, p.wire, p.rest, p.total()}) {
      cells.push_back(fmt::format("{:.1f}", us));
    }
    table.add(cells);
  }
  return table.text();
}

}  // namespace mscclpp::ep::cli
