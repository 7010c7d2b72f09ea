#include <algorithm>
#include <utility>

#include <mscclpp/errors.hpp>
#include <mscclpp/port_channel.hpp>

#include "core/proxy/port_semaphore_state.hpp"

namespace mscclpp {

namespace {

constexpr size_t kWordBytes = 128;  ///< a word, on lines of its own

}  // namespace

RegisteredMemory allocateHostMemory(const std::shared_ptr<Device>& device, size_t bytes) {
  check(device != nullptr, ErrorCode::invalidArgument, "allocateHostMemory: the device is null");
  const auto cpu = Device::open(Platform::cpu);
  return {cpu, device->registerHost(cpu->allocateExportable(bytes), bytes), bytes};
}

std::vector<PortSemaphore> PortSemaphore::createAll(
    Bootstrap& bootstrap, Endpoint& endpoint,
    const std::vector<std::shared_ptr<Connection>>& connections) {
  const auto ranks = static_cast<size_t>(bootstrap.size());
  const auto own = static_cast<size_t>(bootstrap.rank());
  const auto& device = endpoint.device();
  const size_t bytes = ranks * kWordBytes;
  // Every rank has one word per peer; the peer signals into the one that carries its own number.
  const std::shared_ptr<LocalMemory> host =
      endpoint.registerMemory(allocateHostMemory(device, bytes));
  const auto remoteHost = exchangeMemories(bootstrap, connections, *host);
  const std::shared_ptr<void> expected = device->allocateExportable(bytes);
  std::shared_ptr<LocalMemory> words;
  std::vector<std::shared_ptr<RemoteMemory>> remoteWords(ranks);
  if (std::any_of(connections.begin(), connections.end(), [](const auto& connection) {
        return connection && connection->capabilities().deviceSignals;
      })) {
    words = endpoint.registerMemory({device, device->allocateExportable(bytes), bytes});
    remoteWords = exchangeMemories(bootstrap, connections, *words);
  }
  std::vector<PortSemaphore> semaphores(ranks);
  for (size_t peer = 0; peer < ranks; ++peer) {
    if (connections[peer] == nullptr) continue;
    const auto state = std::make_shared<State>();
    const auto wordIn = [&](char* memory) {
      return reinterpret_cast<uint64_t*>(memory + peer * kWordBytes);
    };
    state->handle = {.inboundHost = wordIn(host->memory().data()),
                     .inboundDevice = words ? wordIn(words->memory().data()) : nullptr,
                     .expected = wordIn(static_cast<char*>(expected.get()))};
    state->target = {.host = remoteHost[peer].get(),
                     .hostOffset = own * kWordBytes,
                     .device = remoteWords[peer].get(),
                     .deviceOffset = own * kWordBytes};
    state->owners = {host, words, remoteHost[peer], remoteWords[peer], expected};
    semaphores[peer].state_ = state;
  }
  return semaphores;
}

PortSemaphoreHandle PortSemaphore::deviceHandle() const {
  check(state_ != nullptr, ErrorCode::invalidState,
        "PortSemaphore::deviceHandle: it is empty: there is none to the own rank");
  return state_->handle;
}

PortChannelHandle PortChannel::deviceHandle() const {
  check(spec_ != nullptr, ErrorCode::invalidState, "PortChannel::deviceHandle: it is empty");
  return handle_;
}

}  // namespace mscclpp
