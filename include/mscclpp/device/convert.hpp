#pragma once

/// bf16 and e4m3 conversion, the same bits on both platforms.

#include <mscclpp/device/platform.hpp>

#if MSCCLPP_PLATFORM_CUDA
#include <mscclpp/device/cuda/convert.hpp>
#else
#include <mscclpp/device/cpu/convert.hpp>
#endif
