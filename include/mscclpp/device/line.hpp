#pragma once

/// Lines: messages that carry their own arrival, so that no flag has to follow them.
///
/// A line is 128 bytes at a multiple of 128: seven units of 16 bytes and a tail of two words and a
/// 64-bit epoch. Eight neighbouring lanes move one line together, a unit each; the last of them has
/// the tail. A line is there when its tail holds the epoch that the reader expects, whatever lay
/// there before: nothing is ever cleaned.
///
/// Every lane of a warp makes these calls together; lanes whose line is not wanted pass active =
/// false.

#include <mscclpp/device/platform.hpp>

#if MSCCLPP_PLATFORM_CUDA
#include <mscclpp/device/cuda/line.hpp>
#else
#include <mscclpp/device/cpu/line.hpp>
#endif
