#pragma once

/// 16-byte accesses, mbarriers and bulk asynchronous copies.

#include <mscclpp/device/platform.hpp>

#if MSCCLPP_PLATFORM_CUDA
#include <mscclpp/device/cuda/copy.hpp>
#else
#include <mscclpp/device/cpu/copy.hpp>
#endif
