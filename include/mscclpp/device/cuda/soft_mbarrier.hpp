#pragma once

#include <cstdint>

// Hardware bulk copies and mbarriers with byte counts exist from sm_90 on. MSCCLPP_SOFTWARE_BULK
// forces the software form, so that it can be tested on a newer GPU.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && !defined(MSCCLPP_SOFTWARE_BULK)
#define MSCCLPP_HARDWARE_BULK 1
#else
#define MSCCLPP_HARDWARE_BULK 0
#endif

/// An mbarrier in software: a phase completes when all arrivals and all expected bytes have come.
namespace mscclpp::device {
inline namespace cuda {
namespace soft {

// [0,32) bytes still expected (signed: copies may finish before they are announced), [32,46)
// arrivals missing, [46,60) arrivals per phase, bit 63 the phase.
__device__ __forceinline__ uint64_t pack(uint32_t bytes, uint32_t missing, uint32_t arrivals,
                                         uint32_t phase) {
  return uint64_t{bytes} | uint64_t{missing} << 32 | uint64_t{arrivals} << 46 |
         uint64_t{phase} << 63;
}

__device__ __forceinline__ void init(uint64_t* word, unsigned arrivals) {
  *reinterpret_cast<volatile uint64_t*>(word) = pack(0, arrivals, arrivals, 0);
}

__device__ __forceinline__ void update(uint64_t* word, uint32_t arrived, int32_t addedBytes) {
  uint64_t old = *reinterpret_cast<volatile uint64_t*>(word);
  for (;;) {
    uint32_t bytes = static_cast<uint32_t>(old) + static_cast<uint32_t>(addedBytes);
    const uint32_t arrivals = static_cast<uint32_t>(old >> 46) & 0x3FFFu;
    uint32_t missing = (static_cast<uint32_t>(old >> 32) & 0x3FFFu) - arrived;
    uint32_t phase = static_cast<uint32_t>(old >> 63);
    if (missing == 0 && bytes == 0) {
      missing = arrivals;
      phase ^= 1u;
    }
    uint64_t found;
    asm volatile("atom.acq_rel.cta.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(found)
                 : "l"(word), "l"(old), "l"(pack(bytes, missing, arrivals, phase))
                 : "memory");
    if (found == old) return;
    old = found;
  }
}

/// True when the phase of this parity is complete.
__device__ __forceinline__ bool test(const uint64_t* word, unsigned parity) {
  uint64_t value;
  asm volatile("ld.acquire.cta.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return (value >> 63) != (parity & 1u);
}

}  // namespace soft
}  // namespace cuda
}  // namespace mscclpp::device
