#pragma once

#include <mscclpp/errors.hpp>
#include <mscclpp/platform.hpp>

#include "kernels/api.cuh"
#include "kernels/internode_api.cuh"
#include "kernels/low_latency_api.cuh"

/// The kernels of this build, by platform.
namespace mscclpp::ep {

/// @throws Error unsupported when the build has none.
inline const IntranodeKernels& kernelsOf(Platform platform) {
  if (platform == Platform::cpu) return cpu::intranodeKernels();
#if MSCCLPP_HAVE_CUDA
  return cuda::intranodeKernels();
#else
  fail(ErrorCode::unsupported,
       "this build has no CUDA kernels; configure with MSCCLPP_USE_CUDA=ON");
#endif
}

inline const InternodeKernels& internodeKernelsOf(Platform platform) {
#if MSCCLPP_HAVE_CUDA
  if (platform == Platform::cuda) return cuda::internodeKernels();
#endif
  (void)platform;
  return cpu::internodeKernels();
}

inline const LowLatencyKernels& lowLatencyKernelsOf(Platform platform) {
#if MSCCLPP_HAVE_CUDA
  if (platform == Platform::cuda) return cuda::lowLatencyKernels();
#endif
  (void)platform;
  return cpu::lowLatencyKernels();
}

}  // namespace mscclpp::ep
