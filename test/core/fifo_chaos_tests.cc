// The FIFO between kernels and a host thread that takes, by itself. What a push and a pop promise
// about memory is checked with ordinary words on both sides: under ThreadSanitizer every order that
// is missing is a report.
#include <sched.h>

#include <array>
#include <atomic>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include <mscclpp/device/cpu/runtime.hpp>
#include <mscclpp/device/launch.hpp>
#include <mscclpp/fifo.hpp>
#include <mscclpp/fifo_device.hpp>

#include "device/seeds.hpp"

namespace mscclpp::test {
namespace {

constexpr unsigned kThreads = 64;
constexpr unsigned kPushes = 4;  ///< of a thread, in each of its turns

struct PushArgs {
  FifoHandle fifo;
  WaitControl control;
  uint64_t start;        ///< position of the first push
  uint64_t* sent;        ///< by message: what its thread wrote before it pushed
  const uint64_t* left;  ///< by push: the taker wrote its number before it gave the slot back
  uint32_t* errors;
  uint32_t turns;  ///< even ones: all threads push; odd ones: thread 0 claims the FIFO
};

constexpr uint64_t secretOf(uint64_t message) {
  return message * 0x9E3779B97F4A7C15U + 1;
}

/// Pushes one message; the slot that it gets must have been left behind, with all that was done
/// about the trigger before.
void pushMessage(FifoDevice& fifo, const PushArgs& args, uint64_t message) {
  args.sent[message] = secretOf(message);
  const Trigger trigger = Trigger::encode({.kind = TriggerKind::put, .remoteOffset = message});
  const uint64_t position = fifo.push(args.control, trigger, TriggerOrder::release, 0);
  const uint64_t number = position - args.start, depth = args.fifo.depth;
  const bool good = position != FifoDevice::kNowhere &&
                    (number < depth || args.left[number - depth] == number - depth + 1);
  if (!good) device::fetchAddRelaxed(args.errors, 1u);
}

void pushKernel(const PushArgs& args) {
  FifoDevice fifo(args.fifo);
  const unsigned thread = device::blockIndex() * kThreads + device::threadIndex();
  const uint64_t perTurn = uint64_t{device::gridSize()} * kThreads * kPushes;
  for (uint32_t turn = 0; turn < args.turns; ++turn) {
    uint64_t message = turn * perTurn + thread * kPushes;
    if (turn % 2 == 0) {
      for (unsigned i = 0; i < kPushes; ++i) pushMessage(fifo, args, message++);
    } else if (thread == 0) {
      fifo.claim();
      for (uint64_t i = 0; i < perTurn; ++i) pushMessage(fifo, args, message++);
      fifo.release();
    }
    device::syncBlock();
  }
}

/// Takes triggers until the pushers are done and nothing is left.
class Taker {
 public:
  Taker(Fifo& fifo, uint64_t start, std::vector<uint64_t>& sent, std::vector<uint64_t>& left)
      : fifo_(fifo), start_(start), sent_(sent), left_(left), thread_([this] { run(); }) {}
  ~Taker() { finish(); }
  Taker(const Taker&) = delete;
  Taker& operator=(const Taker&) = delete;

  void finish() {
    done_.store(true, std::memory_order_relaxed);
    if (thread_.joinable()) thread_.join();
  }
  uint64_t taken() const { return taken_; }
  uint64_t wrong() const { return wrong_; }

 private:
  void run() {
    TriggerFields fields;
    for (;;) {
      const bool last = done_.load(std::memory_order_relaxed);
      while (fifo_.peek(fields)) {
        take(fields);
        if (taken_ % 3 == 0) fifo_.publish();
      }
      fifo_.publish();
      if (last) return;
      sched_yield();
    }
  }
  void take(const TriggerFields& fields) {
    const uint64_t message = fields.remoteOffset, number = fifo_.position() - start_;
    if (message >= sent_.size() || number >= left_.size() || sent_[message] != secretOf(message)) {
      ++wrong_;
    } else {
      sent_[message] = 0;  // each comes once
      left_[number] = number + 1;
    }
    fifo_.pop();
    ++taken_;
  }

  Fifo& fifo_;
  uint64_t start_;
  std::vector<uint64_t>& sent_;
  std::vector<uint64_t>& left_;
  uint64_t taken_ = 0, wrong_ = 0;
  std::atomic<bool> done_ = false;
  std::thread thread_;
};

struct Case {
  unsigned blocks;
  uint32_t turns;
};

void pushAndTake(uint64_t seed, const Case& shape) {
  constexpr uint64_t kLimitNs = 20'000'000'000;
  constexpr std::array kDepths = {2, 8, 64};
  const int depth = kDepths[seed % 3];
  const uint64_t start = seed % 2 == 0 ? 0 : (uint64_t{1} << 32) - static_cast<uint64_t>(depth);
  const auto device = Device::open(Platform::cpu);
  Fifo fifo(device, depth, start);
  const size_t messages = size_t{shape.blocks} * kThreads * kPushes * shape.turns;
  std::vector<uint64_t> sent(messages), left(messages);
  FailureRecord record{};
  uint32_t errors = 0;
  Taker taker(fifo, start, sent, left);
  {
    // In order for seed 0. The taker is outside the run time.
    device::RuntimeConfig config = device::RuntimeConfig::testing(seed, seed != 0);
    config.closed = false;
    if (seed % 2 == 1) config.preemptPercent = 40;
    device::Manual manual(config);
    device::Stream* const stream = device::createStream();
    device::launch<&pushKernel, kThreads>({.blocks = shape.blocks, .threads = kThreads}, stream,
                                          PushArgs{.fifo = fifo.deviceHandle(),
                                                   .control = {&record, kLimitNs, 0},
                                                   .start = start,
                                                   .sent = sent.data(),
                                                   .left = left.data(),
                                                   .errors = &errors,
                                                   .turns = shape.turns});
    EXPECT_TRUE(manual.runAll()) << manual.lastFailure();
    device::destroyStream(stream);
  }
  taker.finish();
  EXPECT_EQ(errors, 0u);
  EXPECT_EQ(taker.wrong(), 0u);
  EXPECT_EQ(taker.taken(), messages);
}

void underSchedules(const Case& shape) {
  const uint64_t only = seedAlone();
  for (uint64_t seed = only; seed <= (only != 0 ? only : seedCount(8)); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    pushAndTake(seed, shape);
    if (testing::Test::HasFailure()) return;
  }
}

TEST(FifoChaos, ManyPushersAndOneTaker) {
  underSchedules({.blocks = 3, .turns = 1});
}

TEST(FifoChaos, AClaimIsHandedOn) {
  underSchedules({.blocks = 1, .turns = 4});
}

}  // namespace
}  // namespace mscclpp::test
