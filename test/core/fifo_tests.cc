// Triggers and the host's side of the FIFO.
#include <gtest/gtest.h>

#include <mscclpp/errors.hpp>
#include <mscclpp/fifo.hpp>

#include "core/ranks.hpp"

namespace mscclpp {
namespace {

using test::expectError;

void expectSame(const TriggerFields& sent) {
  const Trigger trigger = Trigger::encode(sent);
  EXPECT_EQ(trigger.first & Trigger::kLapBit, 0u);
  EXPECT_EQ(trigger.second & Trigger::kLapBit, 0u);
  for (const uint64_t lap : {uint64_t{0}, Trigger::kLapBit}) {
    const TriggerFields got = Trigger{trigger.first | lap, trigger.second | lap}.decode();
    EXPECT_EQ(got.kind, sent.kind);
    EXPECT_EQ(got.channel, sent.channel);
    EXPECT_EQ(got.remoteOffset, sent.remoteOffset);
    EXPECT_EQ(got.localOffset, sent.localOffset);
    EXPECT_EQ(got.bytes, sent.bytes);
    EXPECT_EQ(got.value, sent.value);
  }
}

TEST(Trigger, CarriesTheLimitsOfEveryField) {
  for (const uint32_t channel : {uint32_t{0}, uint32_t{1}, uint32_t{Trigger::kMaxChannels - 1}}) {
    for (const uint64_t offset : {uint64_t{0}, uint64_t{5} << 32, Trigger::kMaxMemory - 1}) {
      for (const uint64_t bytes : {uint64_t{0}, uint64_t{511}, uint64_t{512}, Trigger::kMaxBytes}) {
        for (const TriggerKind kind : {TriggerKind::put, TriggerKind::putWithSignal}) {
          expectSame({.kind = kind,
                      .channel = channel,
                      .remoteOffset = offset,
                      .localOffset = Trigger::kMaxMemory - 1 - offset,
                      .bytes = bytes});
        }
      }
      for (const int64_t value : {int64_t{0}, int64_t{-1}, INT64_MIN, INT64_MAX, int64_t{-77}}) {
        expectSame({.kind = TriggerKind::atomicAdd,
                    .channel = channel,
                    .remoteOffset = offset,
                    .value = value});
      }
      expectSame({.kind = TriggerKind::flush, .channel = channel});
      expectSame({.kind = TriggerKind::signal, .channel = channel});
    }
  }
}

/// What a kernel's store does, word by word.
void storeWord(const Fifo& fifo, uint64_t position, int word, const Trigger& trigger) {
  const FifoHandle handle = fifo.deviceHandle();
  const uint64_t value = word == 0 ? trigger.first : trigger.second;
  handle.ring[2 * (position % handle.depth) + static_cast<uint64_t>(word)] =
      value | lapBit(position, handle.depth);
}

class FifoStart : public testing::TestWithParam<uint64_t> {};

TEST_P(FifoStart, ATriggerIsThereOnceBothWordsAreInEveryLap) {
  const auto device = Device::open(Platform::cpu);
  Fifo fifo(device, 4, GetParam());
  EXPECT_EQ(*fifo.deviceHandle().head, GetParam());
  EXPECT_EQ(*fifo.deviceHandle().tail, GetParam());
  TriggerFields fields;
  for (uint64_t i = 0; i < 19; ++i) {
    const uint64_t position = GetParam() + i;
    EXPECT_EQ(fifo.position(), position);
    ASSERT_FALSE(fifo.peek(fields)) << "at position " << position;
    // A trigger of zeros is one too.
    const Trigger trigger =
        i % 5 == 0 ? Trigger{0, 0}
                   : Trigger::encode(
                         {.kind = TriggerKind::put, .channel = 7, .remoteOffset = i, .bytes = 3});
    storeWord(fifo, position, static_cast<int>(i % 2), trigger);
    ASSERT_FALSE(fifo.peek(fields)) << "half a trigger at position " << position;
    storeWord(fifo, position, static_cast<int>(1 - i % 2), trigger);
    ASSERT_TRUE(fifo.peek(fields));
    EXPECT_EQ(fields.remoteOffset, i % 5 == 0 ? 0 : i);
    fifo.pop();
    EXPECT_EQ(*fifo.deviceHandle().tail, position) << "published too early";
    fifo.publish();
    EXPECT_EQ(*fifo.deviceHandle().tail, position + 1);
  }
}

INSTANTIATE_TEST_SUITE_P(Positions, FifoStart,
                         testing::Values(0, 4, (uint64_t{1} << 31) - 8, (uint64_t{1} << 32) - 8,
                                         (uint64_t{1} << 32) - 4));

TEST(Fifo, BadDepthsAndStartsAreRefused) {
  const auto device = Device::open(Platform::cpu);
  expectError(ErrorCode::invalidArgument, {"depth 3", "power of two"}, [&] { Fifo(device, 3); });
  expectError(ErrorCode::invalidArgument, {"depth 1"}, [&] { Fifo(device, 1); });
  expectError(ErrorCode::invalidArgument, {"startPosition 2", "depth 4"},
              [&] { Fifo(device, 4, 2); });
  expectError(ErrorCode::invalidArgument, {"null"}, [&] { Fifo(nullptr); });
}

}  // namespace
}  // namespace mscclpp
