#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

/// CUDA half of <mscclpp/device/simt.hpp>. docs/device.md describes every function.
namespace mscclpp::device {
inline namespace cuda {

/// Call site for reports. Empty here: it costs nothing; the CPU platform has a real one.
struct Site {
  __host__ __device__ static constexpr Site current() { return {}; }
};

inline constexpr unsigned kFullMask = 0xFFFFFFFFu;
inline constexpr unsigned kWarpSize = 32;

__device__ __forceinline__ unsigned threadIndex() {
  return ::threadIdx.x;
}
__device__ __forceinline__ unsigned blockIndex() {
  return ::blockIdx.x;
}
__device__ __forceinline__ unsigned blockSize() {
  return ::blockDim.x;
}
__device__ __forceinline__ unsigned gridSize() {
  return ::gridDim.x;
}
__device__ __forceinline__ unsigned laneId() {
  return ::threadIdx.x & 31u;
}
__device__ __forceinline__ unsigned warpId() {
  return ::threadIdx.x >> 5;
}

namespace detail {

/// A T in the 4- or 8-byte word that a shuffle takes (there is no overload for pointers).
template <class T>
struct ShuffleWord {
  static_assert(sizeof(T) <= 8, "shuffle takes at most 8 bytes");
  using Type = unsigned long long;
};
template <class T>
requires(sizeof(T) <= 4) struct ShuffleWord<T> {
  using Type = unsigned;
};

template <class T>
__device__ __forceinline__ typename ShuffleWord<T>::Type toWord(T value) {
  typename ShuffleWord<T>::Type word = 0;
  memcpy(&word, &value, sizeof(T));
  return word;
}
template <class T>
__device__ __forceinline__ T fromWord(typename ShuffleWord<T>::Type word) {
  T value;
  memcpy(&value, &word, sizeof(T));
  return value;
}

}  // namespace detail

template <class T>
__device__ __forceinline__ T shuffle(T value, int sourceLane, unsigned mask = kFullMask,
                                     Site = Site::current()) {
  return detail::fromWord<T>(::__shfl_sync(mask, detail::toWord(value), sourceLane));
}
template <class T>
__device__ __forceinline__ T shuffleXor(T value, int laneMask, unsigned mask = kFullMask,
                                        Site = Site::current()) {
  return detail::fromWord<T>(::__shfl_xor_sync(mask, detail::toWord(value), laneMask));
}
template <class T>
__device__ __forceinline__ T shuffleUp(T value, int delta, unsigned mask = kFullMask,
                                       Site = Site::current()) {
  return detail::fromWord<T>(
      ::__shfl_up_sync(mask, detail::toWord(value), static_cast<unsigned>(delta)));
}
__device__ __forceinline__ unsigned ballot(bool predicate, unsigned mask = kFullMask,
                                           Site = Site::current()) {
  return ::__ballot_sync(mask, predicate);
}
__device__ __forceinline__ bool any(bool predicate, unsigned mask = kFullMask,
                                    Site = Site::current()) {
  return ::__any_sync(mask, predicate) != 0;
}
__device__ __forceinline__ bool all(bool predicate, unsigned mask = kFullMask,
                                    Site = Site::current()) {
  return ::__all_sync(mask, predicate) != 0;
}
__device__ __forceinline__ void syncWarp(unsigned mask = kFullMask, Site = Site::current()) {
  ::__syncwarp(mask);
}

__device__ __forceinline__ void syncBlock(Site = Site::current()) {
  ::__syncthreads();
}
__device__ __forceinline__ void syncBarrier(int id, int threads, Site = Site::current()) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void arriveBarrier(int id, int threads, Site = Site::current()) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Sum over the warp, the same in every lane.
__device__ __forceinline__ uint32_t sumWarp(uint32_t value, Site = Site::current()) {
  return ::__reduce_add_sync(kFullMask, value);
}
/// Bitwise or over the warp, the same in every lane.
__device__ __forceinline__ uint32_t orWarp(uint32_t value, Site = Site::current()) {
  return ::__reduce_or_sync(kFullMask, value);
}
/// The smaller of each pair of unsigned 16-bit halves.
__device__ __forceinline__ uint32_t minHalves(uint32_t a, uint32_t b) {
  return ::__vminu2(a, b);
}
__device__ __forceinline__ int popCount(uint32_t bits) {
  return ::__popc(bits);
}
__device__ __forceinline__ int findFirstSet(uint32_t bits) {
  return ::__ffs(static_cast<int>(bits));
}
__device__ __forceinline__ float bitsToFloat(uint32_t bits) {
  return ::__uint_as_float(bits);
}
__device__ __forceinline__ uint32_t floatToBits(float value) {
  return ::__float_as_uint(value);
}
__device__ __forceinline__ float fma(float a, float b, float c) {
  return ::__fmaf_rn(a, b, c);
}

/// Nanoseconds of a clock that every block of the GPU shares; it advances in steps of up to 1 us.
__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time)::"memory");
  return time;
}

namespace detail {
__device__ __forceinline__ char* sharedBase() {
  extern __shared__ __align__(1024) unsigned char mscclppSharedMemory[];
  return reinterpret_cast<char*>(mscclppSharedMemory);
}
}  // namespace detail

template <class T>
__device__ __forceinline__ T& sharedStorage(size_t offset = 0, Site = Site::current()) {
  return *reinterpret_cast<T*>(detail::sharedBase() + offset);
}
__device__ __forceinline__ char* sharedBytes(size_t offset, size_t /*bytes*/,
                                             Site = Site::current()) {
  return detail::sharedBase() + offset;
}

/// In a kernel launched `early`: waits until the one before it in its stream has ended and all it
/// wrote is visible. Does nothing in others.
__device__ __forceinline__ void waitForPreviousKernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/// Allows the next kernel of the stream, if it is launched `early`, to take free multiprocessors.
__device__ __forceinline__ void letNextKernelStart() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Ends the whole launch. For broken invariants only; never for a peer that does not answer.
[[noreturn]] __device__ __forceinline__ void trap() {
  asm volatile("trap;");
  __builtin_unreachable();
}
/// Internal invariant: on failure the kernel ends with an error on both platforms.
__device__ __forceinline__ void check(bool ok, const char* /*what*/, Site = Site::current()) {
  if (!ok) trap();
}

}  // namespace cuda
}  // namespace mscclpp::device
