#include <mscclpp/errors.hpp>
#include <mscclpp/memory_channel.hpp>

namespace mscclpp {

MemoryChannelHandle MemoryChannel::deviceHandle() const {
  check(local_ && remote_, ErrorCode::invalidState,
        "MemoryChannel::deviceHandle: the {} memory is empty", local_ ? "remote" : "local");
  return {.semaphore = semaphore_.deviceHandle(),
          .local = local_.data(),
          .remote = remote_.data(),
          .localBytes = local_.size(),
          .remoteBytes = remote_.size()};
}

}  // namespace mscclpp
