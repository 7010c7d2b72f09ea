#pragma once

#include <cstdint>

#include <mscclpp/device/cuda/simt.hpp>
#include <mscclpp/device/cuda/soft_mbarrier.hpp>
#include <mscclpp/device/vec16.hpp>

/// CUDA half of <mscclpp/device/copy.hpp>. Bulk copies need sm_90. Below, mbarriers are kept in
/// software (soft_mbarrier.hpp) and bulk copies are loops of the calling thread, done when the call
/// returns: right, and slow.
namespace mscclpp::device {
inline namespace cuda {

// Plain accesses: the compiler keeps their order against its other accesses to the same memory.
__device__ __forceinline__ Vec16 load16(const void* address) {
  const uint4 v = *static_cast<const uint4*>(address);
  return Vec16{{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ void store16(void* address, Vec16 value) {
  *static_cast<uint4*>(address) = make_uint4(value.w[0], value.w[1], value.w[2], value.w[3]);
}
// Non-coherent path, not kept in L1: only data nobody writes while the kernel runs. Volatile keeps
// batches of independent loads in front of their first use.
__device__ __forceinline__ Vec16 loadStreaming16(const void* address) {
  Vec16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(address));
  return v;
}

/// Lives in shared memory, 8 bytes. Opaque.
struct alignas(8) Mbarrier {
  uint64_t opaque;
};

namespace detail {
__device__ __forceinline__ uint32_t sharedAddress(const void* pointer) {
  return static_cast<uint32_t>(::__cvta_generic_to_shared(pointer));
}
}  // namespace detail

#if MSCCLPP_HARDWARE_BULK

__device__ __forceinline__ void initMbarrier(Mbarrier* barrier, unsigned arrivals,
                                             Site = Site::current()) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(detail::sharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void fenceMbarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(Mbarrier* barrier, Site = Site::current()) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(detail::sharedAddress(barrier))
               : "memory");
}
__device__ __forceinline__ void arriveExpectBytes(Mbarrier* barrier, uint32_t bytes,
                                                  Site = Site::current()) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   detail::sharedAddress(barrier)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ bool testParity(Mbarrier* barrier, unsigned parity,
                                           Site = Site::current()) {
  uint32_t done;
  asm volatile(
      "{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
      : "=r"(done)
      : "r"(detail::sharedAddress(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}
namespace detail {
/// As testParity, but the hardware may park the thread for a while.
__device__ __forceinline__ bool tryWaitParity(Mbarrier* barrier, unsigned parity) {
  uint32_t done;
  asm volatile(
      "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
      : "=r"(done)
      : "r"(sharedAddress(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}
}  // namespace detail

__device__ __forceinline__ void bulkLoad(void* shared, const void* global, uint32_t bytes,
                                         Mbarrier* barrier, Site = Site::current()) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(detail::sharedAddress(shared)),
      "l"(global), "r"(bytes), "r"(detail::sharedAddress(barrier))
      : "memory");
}
__device__ __forceinline__ void bulkStore(void* global, const void* shared, uint32_t bytes,
                                          Site = Site::current()) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(detail::sharedAddress(shared)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulkCommit(Site = Site::current()) {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void bulkWait(Site = Site::current()) {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
template <int N>
__device__ __forceinline__ void bulkWaitRead(Site = Site::current()) {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void fenceProxyAsyncShared(Site = Site::current()) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void fenceProxyAsyncGlobal(Site = Site::current()) {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

#else

__device__ __forceinline__ void initMbarrier(Mbarrier* barrier, unsigned arrivals,
                                             Site = Site::current()) {
  soft::init(&barrier->opaque, arrivals);
}
__device__ __forceinline__ void fenceMbarrierInit() {}
__device__ __forceinline__ void arrive(Mbarrier* barrier, Site = Site::current()) {
  soft::update(&barrier->opaque, 1, 0);
}
__device__ __forceinline__ void arriveExpectBytes(Mbarrier* barrier, uint32_t bytes,
                                                  Site = Site::current()) {
  soft::update(&barrier->opaque, 1, static_cast<int32_t>(bytes));
}
__device__ __forceinline__ bool testParity(Mbarrier* barrier, unsigned parity,
                                           Site = Site::current()) {
  return soft::test(&barrier->opaque, parity);
}
namespace detail {
__device__ __forceinline__ bool tryWaitParity(Mbarrier* barrier, unsigned parity) {
  return soft::test(&barrier->opaque, parity);
}
__device__ __forceinline__ void copyNow(void* to, const void* from, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; i += sizeof(Vec16)) {
    store16(static_cast<char*>(to) + i, load16(static_cast<const char*>(from) + i));
  }
}
}  // namespace detail

__device__ __forceinline__ void bulkLoad(void* shared, const void* global, uint32_t bytes,
                                         Mbarrier* barrier, Site = Site::current()) {
  detail::copyNow(shared, global, bytes);
  soft::update(&barrier->opaque, 0, -static_cast<int32_t>(bytes));
}
__device__ __forceinline__ void bulkStore(void* global, const void* shared, uint32_t bytes,
                                          Site = Site::current()) {
  detail::copyNow(global, shared, bytes);
}
__device__ __forceinline__ void bulkCommit(Site = Site::current()) {}
template <int N>
__device__ __forceinline__ void bulkWait(Site = Site::current()) {}
template <int N>
__device__ __forceinline__ void bulkWaitRead(Site = Site::current()) {}
__device__ __forceinline__ void fenceProxyAsyncShared(Site = Site::current()) {}
__device__ __forceinline__ void fenceProxyAsyncGlobal(Site = Site::current()) {}

#endif

}  // namespace cuda
}  // namespace mscclpp::device
