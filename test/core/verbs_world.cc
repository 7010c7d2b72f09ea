#include "core/verbs_world.hpp"

#include <cstdlib>
#include <cstring>
#include <span>
#include <sstream>
#include <thread>

#include <mscclpp/errors.hpp>

#include "core/ranks.hpp"

namespace mscclpp::test {

namespace {

using transport::verbs::Tuning;
using transport::verbs::VerbsEndpoint;

std::string variable(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::string toHex(const std::vector<std::byte>& bytes) {
  std::string text;
  for (const std::byte byte : bytes) text += fmt::format("{:02x}", static_cast<unsigned>(byte));
  return text;
}

std::vector<std::byte> fromHex(const std::string& text) {
  std::vector<std::byte> bytes;
  for (size_t i = 0; i + 1 < text.size(); i += 2) {
    bytes.push_back(static_cast<std::byte>(std::stoi(text.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

}  // namespace

std::string verbsDevice(int rank) {
  std::istringstream names(variable("MSCCLPP_TEST_VERBS_DEVICES"));
  std::string name;
  for (int i = 0; i <= rank; ++i) std::getline(names, name, ',');
  return name;
}

std::string verbsLink() {
  return variable("MSCCLPP_TEST_VERBS_LINK");
}

bool verbsRequired() {
  return !variable("MSCCLPP_TEST_REQUIRE_VERBS").empty();
}

std::string whyNoVerbs() {
  try {
    Endpoint::create(Transport::verbs, Device::open(Platform::cpu), {.interface = verbsDevice(0)});
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

void VerbsTest::SetUp() {
  static const std::string reason = whyNoVerbs();
  if (reason.empty()) return;
  if (verbsRequired()) FAIL() << "MSCCLPP_TEST_REQUIRE_VERBS is set, but: " << reason;
  GTEST_SKIP() << reason;
}

VerbsSide::VerbsSide(int rank, size_t bytes, EndpointOptions options, const Tuning& tuning) {
  const auto cpu = Device::open(Platform::cpu);
  options.rank = rank;
  if (options.interface.empty()) options.interface = verbsDevice(rank);
  endpoint = std::make_shared<VerbsEndpoint>(cpu, options, tuning);
  memory = endpoint->registerMemory(RegisteredMemory(cpu, cpu->allocateExportable(bytes), bytes));
  connection = endpoint->open(1 - rank);
}

void VerbsSide::write(size_t from, size_t to, size_t bytes) const {
  connection->write({.local = memory.get(),
                     .remote = remote.get(),
                     .localOffset = from,
                     .remoteOffset = to,
                     .bytes = bytes});
}

void VerbsSide::add(size_t offset, int64_t value) const {
  connection->atomicAdd({.remote = remote.get(), .offset = offset, .value = value});
}

std::string VerbsSide::hello() const {
  return toHex(connection->address()) + " " + toHex(memory->describe());
}

void VerbsSide::meet(const std::string& hello) {
  const size_t space = hello.find(' ');
  check(space != std::string::npos, ErrorCode::peerFailure, "no hello: '{}'", hello);
  connection->connect(fromHex(hello.substr(0, space)));
  remote = connection->importMemory(fromHex(hello.substr(space + 1)));
}

VerbsWorld::VerbsWorld(size_t bytes, const EndpointOptions& options, const Tuning& tuning)
    : sides{VerbsSide(0, bytes, options, tuning), VerbsSide(1, bytes, options, tuning)} {
  sides[0].meet(sides[1].hello());
  sides[1].meet(sides[0].hello());
}

bool VerbsWorld::run(const std::function<bool()>& done) {
  return repeat(
      [&] {
        for (const VerbsSide& side : sides) side.connection->progress();
      },
      done);
}

void VerbsWorld::drain() {
  for (const VerbsSide& side : sides) side.connection->submit();
  const bool drained = run([&] {
    bool all = true;
    for (const VerbsSide& side : sides) {
      all = all && (side.connection->failed() ||
                    side.connection->completed() == side.connection->posted());
    }
    return all;
  });
  EXPECT_TRUE(drained) << "operations are missing";
  for (const VerbsSide& side : sides) EXPECT_EQ(side.connection->failure(), "");
}

bool repeat(const std::function<void()>& action, const std::function<bool()>& done,
            std::chrono::nanoseconds limit) {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (!done()) {
    if (std::chrono::steady_clock::now() > end) return false;
    action();
  }
  return true;
}

namespace {

constexpr size_t kSlots = 8;
constexpr size_t kSlotBytes = size_t{32} << 10;
constexpr size_t kCounter = kSlots * kSlotBytes;  // then the reader's own, for the writer
constexpr size_t kSizes[] = {8, 72, 4096, 20'000, kSlotBytes};

size_t bytesOf(int64_t round) {
  return kSizes[static_cast<size_t>(round) % std::size(kSizes)] / 8 * 8;
}

std::span<int64_t> slotOf(const VerbsSide& side, int64_t round) {
  const size_t slot = static_cast<size_t>(round) % kSlots;
  return {side.counter(slot * kSlotBytes), bytesOf(round) / 8};
}

/// Returns the rounds whose data was not all there.
int readRounds(VerbsWorld& world, int rounds) {
  int wrong = 0;
  int64_t seen = 0;
  const bool all = repeat(
      [&] {
        const int64_t now = world[1].load(kCounter);
        for (; seen < now; ++seen) {
          // From the end on: the last bytes are the last to arrive.
          const auto words = slotOf(world[1], seen);
          bool whole = true;
          for (size_t i = words.size(); i-- > 0;) whole = whole && words[i] == seen + 1;
          wrong += whole ? 0 : 1;
        }
        __atomic_store_n(world[1].counter(kCounter + 8), seen, __ATOMIC_RELEASE);
        world[1].connection->progress();
      },
      [&] { return seen >= rounds || world[1].connection->failed(); }, std::chrono::minutes(2));
  EXPECT_TRUE(all) << "only " << seen << " of " << rounds << " rounds came";
  EXPECT_EQ(world[1].connection->failure(), "");
  return wrong;
}

}  // namespace

void checkDataBeforeCounter(VerbsWorld& world, int rounds) {
  ASSERT_GE(world[0].memory->size(), kCounter + 16);
  int wrong = 0;
  std::thread reader([&] { wrong = readRounds(world, rounds); });
  Connection& connection = *world[0].connection;
  for (int64_t round = 0; round < rounds && !connection.failed(); ++round) {
    // The slot is free when the reader has seen its last data and the NIC has sent them.
    const auto slotIsFree = [&] {
      return world[1].load(kCounter + 8) + static_cast<int64_t>(kSlots) > round &&
             connection.completed() + 2 * (kSlots - 1) >= connection.posted() &&
             connection.canPost();
    };
    if (!repeat([&] { connection.progress(); },
                [&] { return slotIsFree() || connection.failed(); })) {
      ADD_FAILURE() << "round " << round << " does not start";
      break;
    }
    for (int64_t& word : slotOf(world[0], round)) word = round + 1;
    const size_t offset = static_cast<size_t>(round) % kSlots * kSlotBytes;
    world[0].write(offset, offset, bytesOf(round));
    repeat([&] { connection.progress(); },
           [&] { return connection.canPost() || connection.failed(); });
    world[0].add(kCounter, 1);
    connection.submit();
  }
  repeat([&] { connection.progress(); },
         [&] { return connection.completed() == connection.posted() || connection.failed(); });
  reader.join();
  EXPECT_EQ(connection.failure(), "");
  EXPECT_EQ(wrong, 0) << "counters were seen before their data";
}

}  // namespace mscclpp::test
