#include <array>
#include <cstring>
#include <utility>

#include <mscclpp/errors.hpp>
#include <mscclpp/registered_memory.hpp>

namespace mscclpp {

RegisteredMemory::RegisteredMemory(std::shared_ptr<Device> device, std::shared_ptr<void> memory,
                                   size_t bytes)
    : device_(std::move(device)), memory_(std::move(memory)) {
  check(device_ != nullptr && memory_ != nullptr, ErrorCode::invalidArgument,
        "RegisteredMemory: {} is null", device_ == nullptr ? "the device" : "the memory");
  handle_ = device_->exportMemory(memory_.get(), bytes);
}

std::vector<std::byte> RegisteredMemory::serialize() const {
  check(memory_ != nullptr, ErrorCode::invalidState, "RegisteredMemory::serialize: it is empty");
  std::vector<std::byte> bytes(sizeof(handle_));
  std::memcpy(bytes.data(), &handle_, sizeof(handle_));
  return bytes;
}

RegisteredMemory RegisteredMemory::deserialize(std::shared_ptr<Device> device,
                                               std::span<const std::byte> bytes) {
  MemoryHandle handle{};
  check(bytes.size() == sizeof(handle), ErrorCode::invalidArgument,
        "RegisteredMemory::deserialize: {} bytes: a handle has {}", bytes.size(), sizeof(handle));
  std::memcpy(&handle, bytes.data(), sizeof(handle));
  return import(std::move(device), handle);
}

RegisteredMemory RegisteredMemory::import(std::shared_ptr<Device> device,
                                          const MemoryHandle& handle) {
  check(device != nullptr, ErrorCode::invalidArgument, "RegisteredMemory: the device is null");
  RegisteredMemory result;
  result.memory_ = device->importMemory(handle);
  result.device_ = std::move(device);
  result.handle_ = handle;
  return result;
}

namespace {

/// Whether a rank could map all memories, and if not, why.
struct Verdict {
  uint32_t failed;
  char text[508];
};

}  // namespace

std::vector<RegisteredMemory> exchangeMemories(Bootstrap& bootstrap,
                                               const RegisteredMemory& local) {
  const auto ranks = static_cast<size_t>(bootstrap.size());
  const auto own = static_cast<size_t>(bootstrap.rank());
  std::vector<MemoryHandle> handles(ranks);
  handles[own] = local.handle();  // all zero, and refused by everybody, when `local` is empty
  bootstrap.allGather(handles);

  // No rank may go on, or give up, alone: the verdicts of all decide.
  std::vector<RegisteredMemory> memories(ranks);
  std::vector<Verdict> verdicts(ranks);
  for (size_t rank = 0; rank < ranks; ++rank) {
    try {
      memories[rank] =
          rank == own && local ? local : RegisteredMemory::import(local.device(), handles[rank]);
    } catch (const std::exception& error) {
      const std::string text =
          fmt::format("rank {} cannot map the memory of rank {}: {}", own, rank, error.what());
      verdicts[own].failed = 1;
      text.copy(verdicts[own].text, sizeof(verdicts[own].text) - 1);
      break;
    }
  }
  bootstrap.allGather(verdicts);
  for (const Verdict& verdict : verdicts) {
    check(verdict.failed == 0, ErrorCode::unsupported, "exchanging memories: {}",
          std::string_view(verdict.text, strnlen(verdict.text, sizeof(verdict.text))));
  }
  return memories;
}

}  // namespace mscclpp
