#include "common_options.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include <mscclpp/env.hpp>
#include <mscclpp/errors.hpp>

namespace mscclpp::ep {
namespace {

/// Communication, reclaiming, and the caller's own; between nodes, one for the proxies' copies.
constexpr int kStreamsPerRank = 3;
/// Changes whenever ranks of two builds could not understand each other.
constexpr std::uint64_t kProtocolVersion = 3;

/// What every rank must have in common, compared at creation.
struct CommonOptions {
  std::uint64_t version, platform, numNvlBytes, numRdmaBytes, lowLatencyMode, stagingBytes,
      maxExpertsPerRank, firstEpoch;
  std::uint64_t process;  ///< not compared: tells threads that share a device from processes
  char deviceId[64];
};
struct CommonField {
  const char* name;
  std::uint64_t CommonOptions::*value;
};
constexpr CommonField kCommonFields[] = {
    {"library protocol version", &CommonOptions::version},
    {"platform (0 = cpu, 1 = cuda)", &CommonOptions::platform},
    {"num_nvl_bytes", &CommonOptions::numNvlBytes},
    {"num_rdma_bytes", &CommonOptions::numRdmaBytes},
    {"low_latency_mode", &CommonOptions::lowLatencyMode},
    {"staging_bytes", &CommonOptions::stagingBytes},
    {"max_experts_per_rank", &CommonOptions::maxExpertsPerRank},
    {"first_epoch", &CommonOptions::firstEpoch},
};

CommonOptions ownOptions(const BufferOptions& options, std::size_t stagingBytes,
                         const Device& device) {
  CommonOptions mine{kProtocolVersion,
                     options.platform == Platform::cuda ? 1u : 0u,
                     options.numNvlBytes,
                     options.numRdmaBytes,
                     options.lowLatencyMode ? 1u : 0u,
                     stagingBytes,
                     static_cast<std::uint64_t>(options.maxExpertsPerRank),
                     options.firstEpoch,
                     static_cast<std::uint64_t>(::getpid()),
                     {}};
  const std::string deviceId = device.id();
  check(deviceId.size() < sizeof(mine.deviceId), ErrorCode::internal,
        "device id '{}' is longer than {} bytes", deviceId, sizeof(mine.deviceId) - 1);
  std::memcpy(mine.deviceId, deviceId.data(), deviceId.size());
  return mine;
}

void checkEqual(const std::vector<CommonOptions>& all) {
  for (const CommonField& field : kCommonFields) {
    for (std::size_t r = 0; r < all.size(); ++r) {
      const std::uint64_t theirs = all[r].*field.value;
      check(theirs == all[0].*field.value, ErrorCode::invalidArgument,
            "Buffer: {} must be equal on all ranks: {} on rank 0, {} on rank {}", field.name,
            all[0].*field.value, theirs, r);
    }
  }
}

}  // namespace

int compareOptions(Bootstrap& bootstrap, const BufferOptions& options, std::size_t stagingBytes,
                   const Device& device, bool betweenNodes) {
  std::vector<CommonOptions> all(static_cast<std::size_t>(bootstrap.size()));
  const CommonOptions own = ownOptions(options, stagingBytes, device);
  all[static_cast<std::size_t>(bootstrap.rank())] = own;
  bootstrap.allGather(all);
  checkEqual(all);
  const auto onMyDevice = [&](const CommonOptions& o) {
    return std::memcmp(o.deviceId, own.deviceId, sizeof(own.deviceId)) == 0;
  };
  const auto sharers = static_cast<int>(std::count_if(all.begin(), all.end(), onMyDevice));
  if (options.platform == Platform::cpu) return sharers;
  check(sharers <= device.multiprocessors(), ErrorCode::invalidArgument,
        "{} ranks share one GPU of {} multiprocessors: no block each", sharers,
        device.multiprocessors());
  const auto threads = std::count_if(all.begin(), all.end(), [&](const CommonOptions& o) {
    return onMyDevice(o) && o.process == own.process;
  });
  const auto streams = threads * (kStreamsPerRank + (betweenNodes ? 1 : 0));
  check(threads == 1 || streams <= env().cudaMaxConnections, ErrorCode::invalidState,
        "{} ranks share {} as threads and need {} streams side by side, but "
        "CUDA_DEVICE_MAX_CONNECTIONS allows {}: a stream that waits behind another rank's would "
        "deadlock. Set it to {} or more (at most 32) before the process starts",
        threads, device.id(), streams, env().cudaMaxConnections, streams);
  return sharers;
}

}  // namespace mscclpp::ep
