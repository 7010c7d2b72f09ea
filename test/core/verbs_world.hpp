// Two ranks over the transport verbs, both driven by the test.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include <gtest/gtest.h>

#include <mscclpp/connection.hpp>

#include "core/transport/verbs/verbs_endpoint.hpp"

namespace mscclpp::test {

/// The device that rank `rank` uses: from MSCCLPP_TEST_VERBS_DEVICES ("rxe0,rxe1"), else "" (any).
std::string verbsDevice(int rank);
/// A link that tests may cut and make lossy (MSCCLPP_TEST_VERBS_LINK); "" where there is none.
std::string verbsLink();
/// Inside the virtual machine nothing may be skipped.
bool verbsRequired();
/// Why there is no endpoint to be had; "" when there is.
std::string whyNoVerbs();

/// Skips tests where there is no RDMA device; fails them instead inside the virtual machine.
class VerbsTest : public testing::Test {
 protected:
  void SetUp() override;
};

/// One rank's half.
struct VerbsSide {
  std::shared_ptr<transport::verbs::VerbsEndpoint> endpoint;
  std::shared_ptr<Connection> connection;
  std::shared_ptr<LocalMemory> memory;
  std::shared_ptr<RemoteMemory> remote;  ///< the peer's memory

  VerbsSide(int rank, size_t bytes, EndpointOptions options = {},
            const transport::verbs::Tuning& tuning = {});
  char* data() const { return memory->memory().data(); }
  int64_t* counter(size_t offset) const { return reinterpret_cast<int64_t*>(data() + offset); }
  int64_t load(size_t offset) const { return __atomic_load_n(counter(offset), __ATOMIC_ACQUIRE); }
  void write(size_t from, size_t to, size_t bytes) const;
  void add(size_t offset, int64_t value) const;
  /// Address and memory of this side as one line of text, and the peer's.
  std::string hello() const;
  void meet(const std::string& hello);
};

struct VerbsWorld {
  std::array<VerbsSide, 2> sides;

  explicit VerbsWorld(size_t bytes, const EndpointOptions& options = {},
                      const transport::verbs::Tuning& tuning = {});
  VerbsSide& operator[](size_t rank) { return sides[rank]; }
  /// Progress on both sides until `done`, at most for a minute; false when that passes.
  bool run(const std::function<bool()>& done);
  /// Everything that was posted is complete.
  void drain();
};

/// Calls `action` until `done`, at most for `limit`; false when that passes.
bool repeat(const std::function<void()>& action, const std::function<bool()>& done,
            std::chrono::nanoseconds limit = std::chrono::seconds(60));

/// `rounds` writes of changing sizes from side 0 to side 1, a counter behind each, and a reader
/// that looks at the data as soon as the counter says that it is there.
void checkDataBeforeCounter(VerbsWorld& world, int rounds);

}  // namespace mscclpp::test
