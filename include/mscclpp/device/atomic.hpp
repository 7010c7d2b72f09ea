#pragma once

/// Atomics: the only way words shared between threads, blocks, ranks or with the host are touched.

#include <mscclpp/device/platform.hpp>

#if MSCCLPP_PLATFORM_CUDA
#include <mscclpp/device/cuda/atomic.hpp>
#else
#include <mscclpp/device/cpu/atomic.hpp>
#endif
