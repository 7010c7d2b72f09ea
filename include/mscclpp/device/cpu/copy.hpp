#pragma once

#include <cstdint>

#include <mscclpp/device/cpu/primitives.hpp>
#include <mscclpp/device/vec16.hpp>

/// CPU half of <mscclpp/device/copy.hpp>.
namespace mscclpp::device {
inline namespace cpu {

inline Vec16 load16(const void* address) {
  return *static_cast<const Vec16*>(address);
}
inline Vec16 loadStreaming16(const void* address) {
  return *static_cast<const Vec16*>(address);
}
inline void store16(void* address, Vec16 value) {
  *static_cast<Vec16*>(address) = value;
}

/// Lives in shared memory, 8 bytes. Opaque.
struct alignas(8) Mbarrier {
  uint64_t opaque;
};

inline void initMbarrier(Mbarrier* barrier, unsigned arrivals, Site site = Site::current()) {
  detail::mbarrierInit(barrier, arrivals, site);
}
inline void fenceMbarrierInit() {}
inline void arrive(Mbarrier* barrier, Site site = Site::current()) {
  detail::mbarrierArrive(barrier, 0, site);
}
inline void arriveExpectBytes(Mbarrier* barrier, uint32_t bytes, Site site = Site::current()) {
  detail::mbarrierArrive(barrier, bytes, site);
}
inline bool testParity(Mbarrier* barrier, unsigned parity, Site site = Site::current()) {
  return detail::mbarrierTest(barrier, parity, site);
}

inline void bulkLoad(void* shared, const void* global, uint32_t bytes, Mbarrier* barrier,
                     Site site = Site::current()) {
  detail::bulkLoad(shared, global, bytes, barrier, site);
}
inline void bulkStore(void* global, const void* shared, uint32_t bytes,
                      Site site = Site::current()) {
  detail::bulkStore(global, shared, bytes, site);
}
inline void bulkCommit(Site = Site::current()) {
  detail::bulkCommit();
}
template <int N>
void bulkWait(Site site = Site::current()) {
  detail::bulkWait(N, false, site);
}
template <int N>
void bulkWaitRead(Site site = Site::current()) {
  detail::bulkWait(N, true, site);
}
inline void fenceProxyAsyncShared(Site = Site::current()) {
  detail::fenceProxyAsyncShared();
}
inline void fenceProxyAsyncGlobal(Site = Site::current()) {}

}  // namespace cpu
}  // namespace mscclpp::device
