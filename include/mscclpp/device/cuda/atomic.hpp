#pragma once

#include <cstdint>
#include <type_traits>

/// CUDA half of <mscclpp/device/atomic.hpp>: PTX with explicit order and scope. Names without
/// "Local" have system scope (a peer GPU, the host or a NIC may be on the other side); "Local" ones
/// have device scope. Addresses are generic: shared memory works with the Local ones too.
namespace mscclpp::device {
inline namespace cuda {
namespace detail {

template <class T>
constexpr bool kAtomicWord = std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

// One load, store, add and exchange per order and scope, in 4 and 8 bytes. The "memory" clobber
// keeps the compiler from moving other accesses across them, the order keeps the hardware from
// doing so.
#define MSCCLPP_PTX_LOAD(NAME, ORDER)                                                     \
  template <class T>                                                                      \
  __device__ __forceinline__ T NAME(const T* address) {                                   \
    static_assert(kAtomicWord<T>, "4- or 8-byte integers");                               \
    if constexpr (sizeof(T) == 4) {                                                       \
      uint32_t value;                                                                     \
      asm volatile("ld." ORDER ".u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory"); \
      return static_cast<T>(value);                                                       \
    } else {                                                                              \
      uint64_t value;                                                                     \
      asm volatile("ld." ORDER ".u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory"); \
      return static_cast<T>(value);                                                       \
    }                                                                                     \
  }
#define MSCCLPP_PTX_STORE(NAME, ORDER)                                                            \
  template <class T>                                                                              \
  __device__ __forceinline__ void NAME(T* address, T value) {                                     \
    static_assert(kAtomicWord<T>, "4- or 8-byte integers");                                       \
    if constexpr (sizeof(T) == 4) {                                                               \
      asm volatile("st." ORDER ".u32 [%0], %1;" ::"l"(address), "r"(static_cast<uint32_t>(value)) \
                   : "memory");                                                                   \
    } else {                                                                                      \
      asm volatile("st." ORDER ".u64 [%0], %1;" ::"l"(address), "l"(static_cast<uint64_t>(value)) \
                   : "memory");                                                                   \
    }                                                                                             \
  }
#define MSCCLPP_PTX_ADD(NAME, ORDER)                                 \
  template <class T>                                                 \
  __device__ __forceinline__ T NAME(T* address, T value) {           \
    static_assert(kAtomicWord<T>, "4- or 8-byte integers");          \
    if constexpr (sizeof(T) == 4) {                                  \
      uint32_t old;                                                  \
      asm volatile("atom." ORDER ".add.u32 %0, [%1], %2;"            \
                   : "=r"(old)                                       \
                   : "l"(address), "r"(static_cast<uint32_t>(value)) \
                   : "memory");                                      \
      return static_cast<T>(old);                                    \
    } else {                                                         \
      uint64_t old;                                                  \
      asm volatile("atom." ORDER ".add.u64 %0, [%1], %2;"            \
                   : "=l"(old)                                       \
                   : "l"(address), "l"(static_cast<uint64_t>(value)) \
                   : "memory");                                      \
      return static_cast<T>(old);                                    \
    }                                                                \
  }

MSCCLPP_PTX_LOAD(loadAcquireSys, "acquire.sys")
MSCCLPP_PTX_LOAD(loadRelaxedSys, "relaxed.sys")
MSCCLPP_PTX_LOAD(loadAcquireGpu, "acquire.gpu")
MSCCLPP_PTX_STORE(storeReleaseSys, "release.sys")
MSCCLPP_PTX_STORE(storeRelaxedSys, "relaxed.sys")
MSCCLPP_PTX_STORE(storeReleaseGpu, "release.gpu")
MSCCLPP_PTX_ADD(fetchAddRelaxedSys, "relaxed.sys")
MSCCLPP_PTX_ADD(fetchAddAcqRelSys, "acq_rel.sys")
MSCCLPP_PTX_ADD(fetchAddRelaxedGpu, "relaxed.gpu")
MSCCLPP_PTX_ADD(fetchAddAcqRelGpu, "acq_rel.gpu")
#undef MSCCLPP_PTX_LOAD
#undef MSCCLPP_PTX_STORE
#undef MSCCLPP_PTX_ADD

}  // namespace detail

// The second parameter is a non-deduced context: storeRelease(uint32Pointer, 1) takes any integer.
template <class T>
__device__ __forceinline__ T loadAcquire(const T* address) {
  return detail::loadAcquireSys(address);
}
template <class T>
__device__ __forceinline__ T loadRelaxed(const T* address) {
  return detail::loadRelaxedSys(address);
}
template <class T>
__device__ __forceinline__ void storeRelease(T* address, std::type_identity_t<T> value) {
  detail::storeReleaseSys(address, value);
}
template <class T>
__device__ __forceinline__ void storeRelaxed(T* address, std::type_identity_t<T> value) {
  detail::storeRelaxedSys(address, value);
}
template <class T>
__device__ __forceinline__ T fetchAddRelaxed(T* address, std::type_identity_t<T> value) {
  return detail::fetchAddRelaxedSys(address, value);
}
template <class T>
__device__ __forceinline__ T fetchAddAcqRel(T* address, std::type_identity_t<T> value) {
  return detail::fetchAddAcqRelSys(address, value);
}
/// Two words at a multiple of 16 bytes, in one access. Nobody promises that a reader sees both at
/// once: each word must tell by itself whether it has come.
__device__ __forceinline__ void storeReleasePair(uint64_t* address, uint64_t first,
                                                 uint64_t second) {
  asm volatile("st.release.sys.v2.u64 [%0], {%1, %2};" ::"l"(address), "l"(first), "l"(second)
               : "memory");
}
__device__ __forceinline__ void storeRelaxedPair(uint64_t* address, uint64_t first,
                                                 uint64_t second) {
  asm volatile("st.relaxed.sys.v2.u64 [%0], {%1, %2};" ::"l"(address), "l"(first), "l"(second)
               : "memory");
}
/// On failure writes the value found to `expected`.
template <class T>
__device__ __forceinline__ bool compareExchangeAcqRel(T* address, T& expected,
                                                      std::type_identity_t<T> desired) {
  static_assert(detail::kAtomicWord<T>, "4- or 8-byte integers");
  T old;
  if constexpr (sizeof(T) == 4) {
    uint32_t found;
    asm volatile("atom.acq_rel.sys.cas.b32 %0, [%1], %2, %3;"
                 : "=r"(found)
                 : "l"(address), "r"(static_cast<uint32_t>(expected)),
                   "r"(static_cast<uint32_t>(desired))
                 : "memory");
    old = static_cast<T>(found);
  } else {
    uint64_t found;
    asm volatile("atom.acq_rel.sys.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(found)
                 : "l"(address), "l"(static_cast<uint64_t>(expected)),
                   "l"(static_cast<uint64_t>(desired))
                 : "memory");
    old = static_cast<T>(found);
  }
  const bool exchanged = old == expected;
  expected = old;
  return exchanged;
}

template <class T>
__device__ __forceinline__ T loadLocalAcquire(const T* address) {
  return detail::loadAcquireGpu(address);
}
template <class T>
__device__ __forceinline__ void storeLocalRelease(T* address, std::type_identity_t<T> value) {
  detail::storeReleaseGpu(address, value);
}
template <class T>
__device__ __forceinline__ T fetchAddLocalRelaxed(T* address, std::type_identity_t<T> value) {
  return detail::fetchAddRelaxedGpu(address, value);
}
template <class T>
__device__ __forceinline__ T fetchAddLocalAcqRel(T* address, std::type_identity_t<T> value) {
  return detail::fetchAddAcqRelGpu(address, value);
}

}  // namespace cuda
}  // namespace mscclpp::device
