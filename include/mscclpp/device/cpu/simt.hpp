#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <mscclpp/device/cpu/primitives.hpp>

/// CPU half of <mscclpp/device/simt.hpp>. docs/device.md describes every function.
namespace mscclpp::device {
inline namespace cpu {

inline constexpr unsigned kFullMask = 0xFFFFFFFFu;
inline constexpr unsigned kWarpSize = 32;

inline unsigned threadIndex() {
  return detail::threadIndex();
}
inline unsigned blockIndex() {
  return detail::position().block;
}
inline unsigned blockSize() {
  return detail::position().blockThreads;
}
inline unsigned gridSize() {
  return detail::position().gridBlocks;
}
inline unsigned laneId() {
  return detail::threadIndex() & 31u;
}
inline unsigned warpId() {
  return detail::threadIndex() >> 5;
}

namespace detail {

template <class T>
uint64_t toWord(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>,
                "shuffle takes at most 8 bytes, trivially copyable");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <class T>
T fromWord(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

}  // namespace detail

template <class T>
T shuffle(T value, int sourceLane, unsigned mask = kFullMask, Site site = Site::current()) {
  return detail::fromWord<T>(detail::warpCollective(detail::CollectiveOp::shuffle, mask,
                                                    detail::toWord(value),
                                                    static_cast<unsigned>(sourceLane) & 31u, site));
}
template <class T>
T shuffleXor(T value, int laneMask, unsigned mask = kFullMask, Site site = Site::current()) {
  const unsigned source = (laneId() ^ static_cast<unsigned>(laneMask)) & 31u;
  return detail::fromWord<T>(detail::warpCollective(detail::CollectiveOp::shuffle, mask,
                                                    detail::toWord(value), source, site));
}
/// The value of lane - delta; lanes below delta keep their own.
template <class T>
T shuffleUp(T value, int delta, unsigned mask = kFullMask, Site site = Site::current()) {
  const unsigned lane = laneId();
  const unsigned source =
      lane >= static_cast<unsigned>(delta) ? lane - static_cast<unsigned>(delta) : lane;
  return detail::fromWord<T>(detail::warpCollective(detail::CollectiveOp::shuffle, mask,
                                                    detail::toWord(value), source, site));
}
inline unsigned ballot(bool predicate, unsigned mask = kFullMask, Site site = Site::current()) {
  return static_cast<unsigned>(
      detail::warpCollective(detail::CollectiveOp::ballot, mask, predicate ? 1 : 0, 0, site));
}
inline bool any(bool predicate, unsigned mask = kFullMask, Site site = Site::current()) {
  return ballot(predicate, mask, site) != 0;
}
inline bool all(bool predicate, unsigned mask = kFullMask, Site site = Site::current()) {
  return ballot(!predicate, mask, site) == 0;
}
inline void syncWarp(unsigned mask = kFullMask, Site site = Site::current()) {
  detail::warpCollective(detail::CollectiveOp::sync, mask, 0, 0, site);
}

inline void syncBlock(Site site = Site::current()) {
  detail::barrier(0, 0, true, site);
}
inline void syncBarrier(int id, int threads, Site site = Site::current()) {
  detail::barrier(id, threads, true, site);
}
inline void arriveBarrier(int id, int threads, Site site = Site::current()) {
  detail::barrier(id, threads, false, site);
}

/// Sum over the warp, the same in every lane.
inline uint32_t sumWarp(uint32_t value, Site site = Site::current()) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value += shuffleXor(value, distance, kFullMask, site);
  }
  return value;
}
/// Bitwise or over the warp, the same in every lane.
inline uint32_t orWarp(uint32_t value, Site site = Site::current()) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value |= shuffleXor(value, distance, kFullMask, site);
  }
  return value;
}
/// The smaller of each pair of unsigned 16-bit halves.
inline uint32_t minHalves(uint32_t a, uint32_t b) {
  const uint32_t low = std::min(a & 0xFFFFu, b & 0xFFFFu);
  return std::min(a >> 16, b >> 16) << 16 | low;
}
inline int popCount(uint32_t bits) {
  return std::popcount(bits);
}
inline int findFirstSet(uint32_t bits) {
  return bits == 0 ? 0 : std::countr_zero(bits) + 1;
}
inline float bitsToFloat(uint32_t bits) {
  return std::bit_cast<float>(bits);
}
inline uint32_t floatToBits(float value) {
  return std::bit_cast<uint32_t>(value);
}
inline float fma(float a, float b, float c) {
  return std::fma(a, b, c);
}

/// Nanoseconds of the host's steady clock.
inline uint64_t nanoseconds() {
  return detail::nanoseconds();
}

template <class T>
T& sharedStorage(size_t offset = 0, Site site = Site::current()) {
  return *static_cast<T*>(detail::sharedMemory(offset, sizeof(T), alignof(T), site));
}
inline char* sharedBytes(size_t offset, size_t bytes, Site site = Site::current()) {
  return static_cast<char*>(detail::sharedMemory(offset, bytes, 1, site));
}

/// Kernels of a stream never overlap here.
inline void waitForPreviousKernel() {}
inline void letNextKernelStart() {}

/// Internal invariant: on failure the kernel ends with an error on both platforms.
inline void check(bool ok, const char* what, Site site = Site::current()) {
  if (!ok) detail::failKernel(what, nullptr, site);
}
[[noreturn]] inline void trap(Site site = Site::current()) {
  detail::failKernel("trap", nullptr, site);
}

}  // namespace cpu
}  // namespace mscclpp::device
