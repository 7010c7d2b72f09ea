#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

/// What the inline primitives of this folder call in the runtime (src/device_cpu). Kernels never
/// use these names.
namespace mscclpp::device {
inline namespace cpu {

/// Call site for reports, taken by default arguments of the primitives.
using Site = std::source_location;

namespace detail {

struct ThreadPosition {
  unsigned thread;
  unsigned block;
  unsigned blockThreads;
  unsigned gridBlocks;
};
ThreadPosition position();
unsigned threadIndex();

enum class CollectiveOp : uint8_t { shuffle, ballot, sync };
/// Shuffle: returns `value` of `sourceLane`; Ballot: a mask of the lanes whose `value` is not 0.
uint64_t warpCollective(CollectiveOp op, uint32_t mask, uint64_t value, unsigned sourceLane,
                        const Site& site);
void barrier(int id, int threads, bool wait, const Site& site);
void* sharedMemory(size_t offset, size_t bytes, size_t alignment, const Site& site);

/// Before an atomic that may change memory: lets other threads run now and then.
void beforeAtomicUpdate();
/// Before an atomic load: as above; also notices loops that poll without a wait primitive.
void beforeAtomicLoad(const void* address);

/// One wait that polls, on the waiting thread's stack. Reports read it while the thread sleeps.
struct Polling {
  const void* address = nullptr;  ///< may be null
  bool wordKnown = false;  ///< `address` is a 4-byte flag, `expected` and `seen` are its values
  uint32_t expected = 0;
  uint32_t seen = 0;
  uint32_t what = 0;
  int32_t peer = -1;
  Site site;
};
/// Around a loop that polls: pausePolling() returns when the others had a chance to run.
void beginPolling(Polling& polling);
void pausePolling();
void endPolling();

struct MbarrierWait {
  uint64_t limitNs = 0;  ///< 0 = none
  uint32_t what = 0;
  int32_t peer = -1;
};
/// Blocks until the phase completes; false after the limit. `waitedNs` is set when it is false.
bool mbarrierWait(void* barrier, unsigned parity, const MbarrierWait& wait, const Site& site,
                  uint64_t& waitedNs);
void mbarrierInit(void* barrier, unsigned arrivals, const Site& site);
void mbarrierArrive(void* barrier, uint32_t expectBytes, const Site& site);
bool mbarrierTest(void* barrier, unsigned parity, const Site& site);

void bulkLoad(void* shared, const void* global, uint32_t bytes, void* barrier, const Site& site);
void bulkStore(void* global, const void* shared, uint32_t bytes, const Site& site);
void bulkCommit();
void bulkWait(int groupsInFlight, bool readOnly, const Site& site);
void fenceProxyAsyncShared();

/// Ends everything that runs on this runtime with a report.
[[noreturn]] void failKernel(const char* what, const void* address, const Site& site);

uint64_t nanoseconds();

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
