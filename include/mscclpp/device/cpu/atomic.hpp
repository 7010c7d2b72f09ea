#pragma once

#include <cstdint>
#include <type_traits>

#include <mscclpp/device/cpu/primitives.hpp>

/// CPU half of <mscclpp/device/atomic.hpp>. One scope only: "Local" names are the same as the
/// others. These stay in the header so that a kernel built with ThreadSanitizer has its orders
/// checked.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {

template <class T>
constexpr bool kAtomicWord = std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

}  // namespace detail

template <class T>
T loadAcquire(const T* address) {
  static_assert(detail::kAtomicWord<T>, "4- or 8-byte integers");
  detail::beforeAtomicLoad(address);
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}
template <class T>
T loadRelaxed(const T* address) {
  static_assert(detail::kAtomicWord<T>, "4- or 8-byte integers");
  detail::beforeAtomicLoad(address);
  return __atomic_load_n(address, __ATOMIC_RELAXED);
}
template <class T>
void storeRelease(T* address, std::type_identity_t<T> value) {
  static_assert(detail::kAtomicWord<T>, "4- or 8-byte integers");
  detail::beforeAtomicUpdate();
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
}
template <class T>
void storeRelaxed(T* address, std::type_identity_t<T> value) {
  static_assert(detail::kAtomicWord<T>, "4- or 8-byte integers");
  detail::beforeAtomicUpdate();
  __atomic_store_n(address, value, __ATOMIC_RELAXED);
}
template <class T>
T fetchAddRelaxed(T* address, std::type_identity_t<T> value) {
  static_assert(detail::kAtomicWord<T>, "4- or 8-byte integers");
  detail::beforeAtomicUpdate();
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T>
T fetchAddAcqRel(T* address, std::type_identity_t<T> value) {
  static_assert(detail::kAtomicWord<T>, "4- or 8-byte integers");
  detail::beforeAtomicUpdate();
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
/// Two words at a multiple of 16 bytes. A reader may see one without the other: here often, because
/// the second is stored first and a thread may be preempted between them.
inline void storeReleasePair(uint64_t* address, uint64_t first, uint64_t second) {
  storeRelease(address + 1, second);
  storeRelease(address, first);
}
inline void storeRelaxedPair(uint64_t* address, uint64_t first, uint64_t second) {
  storeRelaxed(address + 1, second);
  storeRelaxed(address, first);
}
/// On failure writes the value found to `expected`.
template <class T>
bool compareExchangeAcqRel(T* address, T& expected, std::type_identity_t<T> desired) {
  static_assert(detail::kAtomicWord<T>, "4- or 8-byte integers");
  detail::beforeAtomicUpdate();
  return __atomic_compare_exchange_n(address, &expected, desired, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_ACQUIRE);
}

template <class T>
T loadLocalAcquire(const T* address) {
  return loadAcquire(address);
}
template <class T>
void storeLocalRelease(T* address, std::type_identity_t<T> value) {
  storeRelease(address, value);
}
template <class T>
T fetchAddLocalRelaxed(T* address, std::type_identity_t<T> value) {
  return fetchAddRelaxed(address, value);
}
template <class T>
T fetchAddLocalAcqRel(T* address, std::type_identity_t<T> value) {
  return fetchAddAcqRel(address, value);
}

}  // namespace cpu
}  // namespace mscclpp::device
