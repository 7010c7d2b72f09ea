#pragma once

/// Launching kernels.

#include <mscclpp/device/platform.hpp>

#if MSCCLPP_PLATFORM_CUDA
#include <mscclpp/device/cuda/launch.hpp>
#else
#include <mscclpp/device/cpu/launch.hpp>
#endif
