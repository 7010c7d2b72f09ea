#include <utility>

#include <mscclpp/errors.hpp>
#include <mscclpp/semaphore.hpp>

namespace mscclpp {

namespace {

// Byte map of one side's state; words that different parties write are on lines of their own.
constexpr size_t kInboundAt = 0;
constexpr size_t kOutboundAt = 128;
constexpr size_t kExpectedAt = 192;

uint64_t* wordAt(const RegisteredMemory& memory, size_t offset) {
  return reinterpret_cast<uint64_t*>(memory.data() + offset);
}

RegisteredMemory allocateStates(std::shared_ptr<Device> device, size_t count) {
  check(device != nullptr, ErrorCode::invalidArgument, "MemorySemaphore: the device is null");
  const size_t bytes = count * MemorySemaphore::kStateBytes;
  auto memory = device->allocateExportable(bytes);
  return {std::move(device), std::move(memory), bytes};
}

}  // namespace

MemorySemaphore::MemorySemaphore(RegisteredMemory localState, size_t localOffset,
                                 RegisteredMemory remoteState, size_t remoteOffset)
    : local_(std::move(localState)),
      remote_(std::move(remoteState)),
      localOffset_(localOffset),
      remoteOffset_(remoteOffset) {
  const auto checkSide = [](const char* side, const RegisteredMemory& memory, size_t offset) {
    check(
        memory && offset % 8 == 0 && offset <= memory.size() &&
            kStateBytes <= memory.size() - offset,
        ErrorCode::invalidArgument,
        "MemorySemaphore: {} state at offset {} of {} bytes: it needs {} bytes at a multiple of 8",
        side, offset, memory.size(), kStateBytes);
  };
  checkSide("local", local_, localOffset_);
  checkSide("remote", remote_, remoteOffset_);
}

std::vector<MemorySemaphore> MemorySemaphore::createAll(Bootstrap& bootstrap,
                                                        std::shared_ptr<Device> device) {
  const auto ranks = static_cast<size_t>(bootstrap.size());
  const auto own = static_cast<size_t>(bootstrap.rank());
  // Every rank has one state per peer; the peer signals into the one that carries its own number.
  const RegisteredMemory states = allocateStates(std::move(device), ranks);
  const auto all = exchangeMemories(bootstrap, states);
  std::vector<MemorySemaphore> semaphores;
  semaphores.reserve(ranks);
  for (size_t peer = 0; peer < ranks; ++peer) {
    semaphores.emplace_back(states, peer * kStateBytes, all[peer], own * kStateBytes);
  }
  return semaphores;
}

MemorySemaphore MemorySemaphore::connect(Bootstrap& bootstrap, std::shared_ptr<Device> device,
                                         int peer, int tag) {
  const RegisteredMemory state = allocateStates(device, 1);
  const MemoryHandle own = state.handle();
  MemoryHandle theirs{};
  bootstrap.send(&own, sizeof(own), peer, tag);
  bootstrap.recv(&theirs, sizeof(theirs), peer, tag);
  return {state, 0, RegisteredMemory::import(std::move(device), theirs), 0};
}

MemorySemaphoreHandle MemorySemaphore::deviceHandle() const {
  check(static_cast<bool>(local_), ErrorCode::invalidState,
        "MemorySemaphore::deviceHandle: it is empty");
  return {.inbound = wordAt(local_, localOffset_ + kInboundAt),
          .remoteInbound = wordAt(remote_, remoteOffset_ + kInboundAt),
          .outbound = wordAt(local_, localOffset_ + kOutboundAt),
          .expected = wordAt(local_, localOffset_ + kExpectedAt)};
}

}  // namespace mscclpp
