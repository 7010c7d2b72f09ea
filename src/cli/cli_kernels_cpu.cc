// The same kernels for the CPU platform: the host compiler reads what nvcc reads.
#include <mscclpp/errors.hpp>

#include "cli_kernels.cu"

namespace mscclpp::ep::cli {

const CliKernels& kernelsOf(Platform platform) {
  if (platform == Platform::cpu) return cpu::cliKernels();
#if MSCCLPP_HAVE_CUDA
  return cuda::cliKernels();
#else
  fail(ErrorCode::unsupported,
       "this build has no CUDA kernels; configure with MSCCLPP_USE_CUDA=ON");
#endif
}

}  // namespace mscclpp::ep::cli
