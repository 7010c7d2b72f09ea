#pragma once

#include <cstddef>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/ext/ep/buffer.hpp>
#include <mscclpp/platform.hpp>

namespace mscclpp::ep {

/// Collective: every rank's Buffer has what all must have in common. `stagingBytes`: as the plan
/// has it; `betweenNodes`: the proxies' copies take a stream, too. Returns how many ranks share
/// this rank's device.
/// @throws Error invalidArgument with the first value that differs, and where; invalidState when
/// ranks that share a GPU as threads need more streams than CUDA keeps apart.
int compareOptions(Bootstrap& bootstrap, const BufferOptions& options, std::size_t stagingBytes,
                   const Device& device, bool betweenNodes);

}  // namespace mscclpp::ep
