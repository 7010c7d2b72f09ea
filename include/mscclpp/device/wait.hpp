#pragma once

/// Bounded waits: every loop that can spin goes through these.

#include <mscclpp/device/platform.hpp>

#if MSCCLPP_PLATFORM_CUDA
#include <mscclpp/device/cuda/wait.hpp>
#else
#include <mscclpp/device/cpu/wait.hpp>
#endif
