#pragma once

/// Thread indices, warp collectives, barriers, shared memory, time.

#include <mscclpp/device/platform.hpp>

#if MSCCLPP_PLATFORM_CUDA
#include <mscclpp/device/cuda/simt.hpp>
#else
#include <mscclpp/device/cpu/simt.hpp>
#endif
