#include "core/connection_rank.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

namespace mscclpp::test {

namespace {

using Clock = std::chrono::steady_clock;

std::map<std::string, ConnectionInstance>& instances() {
  static std::map<std::string, ConnectionInstance> all;
  return all;
}

std::unique_ptr<Area> makeArea(const std::shared_ptr<Device>& device, Endpoint& endpoint,
                               size_t bytes) {
  return std::make_unique<Area>(device, endpoint, bytes);
}

}  // namespace

std::shared_ptr<Endpoint> ConnectionInstance::makeEndpoint(const EndpointOptions& changes) const {
  EndpointOptions all = options;
  all.rank = changes.rank;
  all.timeout = changes.timeout;
  if (changes.queueDepth != EndpointOptions{}.queueDepth) all.queueDepth = changes.queueDepth;
  if (!changes.interface.empty()) all.interface = changes.interface;
  auto device = Device::open(platform);
  return create ? create(std::move(device), all)
                : Endpoint::create(transport, std::move(device), all);
}

const ConnectionInstance& addInstance(ConnectionInstance instance) {
  const std::string name = instance.name;
  return instances()[name] = std::move(instance);
}

const ConnectionInstance& findInstance(const std::string& name) {
  return instances().at(name);
}

// --- Area ----------------------------------------------------------------------------------------

Area::Area(const std::shared_ptr<Device>& device, Endpoint& endpoint, size_t bytes)
    : device_(device),
      local_(endpoint.registerMemory(
          RegisteredMemory(device, device->allocateExportable(bytes), bytes))) {
  if (local_->onDevice()) stream_ = device->createStream();
}

// Host memory is touched without a lock: it would hide a missing release from TSan.

void Area::put(uint64_t offset, std::span<const unsigned char> bytes) {
  char* const to = local_->memory().data() + offset;
  if (!local_->onDevice()) {
    std::ranges::copy(bytes, reinterpret_cast<unsigned char*>(to));
    return;
  }
  const std::lock_guard lock(mutex_);
  device_->copy(to, bytes.data(), bytes.size(), stream_);
  stream_.synchronize();
}

std::vector<unsigned char> Area::get(uint64_t offset, size_t bytes) {
  const char* const from = local_->memory().data() + offset;
  if (!local_->onDevice()) return {from, from + bytes};
  std::vector<unsigned char> result(bytes);
  const std::lock_guard lock(mutex_);
  device_->copy(result.data(), from, bytes, stream_);
  stream_.synchronize();
  return result;
}

void Area::fill(uint64_t offset, unsigned char value, size_t bytes) {
  char* const at = local_->memory().data() + offset;
  if (!local_->onDevice()) {
    std::memset(at, value, bytes);
    return;
  }
  const std::lock_guard lock(mutex_);
  device_->fill(at, value, bytes, stream_);
  stream_.synchronize();
}

int64_t* Area::word(uint64_t offset) const {
  return reinterpret_cast<int64_t*>(local_->memory().data() + offset);
}

// --- Rank ----------------------------------------------------------------------------------------

Rank::Rank(const ConnectionInstance& instance, int rank, int size, const UniqueId& id,
           const RankSetup& setup)
    : instance_(instance),
      bootstrap_(rank, size, id, kPatience),
      endpoint_(instance.makeEndpoint(
          {.rank = rank,
           .timeout = setup.timeout,
           .queueDepth = setup.queueDepth > 0 ? setup.queueDepth : EndpointOptions{}.queueDepth})),
      connections_(connectAll(bootstrap_, *endpoint_)) {
  const auto host = Device::open(Platform::cpu);
  const size_t wordBytes = kWords * sizeof(int64_t);
  data_ = makeArea(endpoint_->device(), *endpoint_, setup.dataBytes);
  words_ = makeArea(host, *endpoint_, wordBytes);
  deviceWords_ = makeArea(endpoint_->device(), *endpoint_, wordBytes);
  theirData_ = exchangeMemories(bootstrap_, connections_, data_->local());
  theirWords_ = exchangeMemories(bootstrap_, connections_, words_->local());
  theirDeviceWords_ = exchangeMemories(bootstrap_, connections_, deviceWords_->local());
}

bool Rank::progress() {
  bool any = false;
  for (const auto& connection : connections_) {
    if (connection != nullptr && connection->progress()) any = true;
  }
  return any;
}

void Rank::waitFor(const std::string& what, const std::function<bool()>& condition) {
  const auto limit = Clock::now() + kPatience;
  while (!condition()) {
    if (progress()) continue;
    for (const auto& connection : connections_) {
      require(connection == nullptr || !connection->failed(), "rank {} waits for {}: {}", rank(),
              what, connection == nullptr ? "" : connection->failure());
    }
    require(Clock::now() < limit, "rank {} has waited for {} for a minute", rank(), what);
    std::this_thread::yield();
  }
}

Connection& Rank::postable(int peer) {
  waitFor(fmt::format("room for an operation to rank {}", peer),
          [&] { return to(peer).canPost(); });
  return to(peer);
}

void Rank::write(int peer, uint64_t localOffset, uint64_t remoteOffset, uint64_t bytes) {
  postable(peer).write({.local = &data_->local(),
                        .remote = &dataOf(peer),
                        .localOffset = localOffset,
                        .remoteOffset = remoteOffset,
                        .bytes = bytes});
}

void Rank::add(int peer, size_t index, int64_t value) {
  postable(peer).atomicAdd(
      {.remote = &wordsOf(peer), .offset = index * sizeof(int64_t), .value = value});
}

void Rank::flush() {
  for (const auto& connection : connections_) {
    if (connection != nullptr) connection->submit();
  }
  waitFor("its operations to complete", [&] {
    return std::ranges::all_of(
        connections_, [](const auto& c) { return c == nullptr || c->completed() == c->posted(); });
  });
}

void Rank::finish() {
  for (int peer = 0; peer < size(); ++peer) {
    if (peer != rank()) add(peer, kDone, 1);
  }
  flush();
  waitFor("all ranks to be done", [&] { return word(kDone) == size() - 1; });
  for (const auto& connection : connections_) {
    if (connection != nullptr) connection->close();
  }
}

// --- ProxyThread ---------------------------------------------------------------------------------

ProxyThread::ProxyThread(std::function<void()> work) {
  thread_ = std::thread([this, work = std::move(work)] {
    try {
      while (!stop_.load(std::memory_order_relaxed)) work();
    } catch (...) {
      error_ = std::current_exception();
      broken_.store(true, std::memory_order_release);
    }
  });
}

void ProxyThread::stop() {
  end();
  if (error_) std::rethrow_exception(error_);
}

// --- payloads ------------------------------------------------------------------------------------

uint64_t mix(uint64_t a, uint64_t b, uint64_t c) {
  // splitmix64, three times.
  uint64_t x = 0;
  for (const uint64_t value : {a, b, c}) {
    x += value + 0x9E3779B97F4A7C15U;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
    x ^= x >> 31;
  }
  return x;
}

std::vector<unsigned char> payload(uint64_t key, size_t bytes) {
  // A word at a time: tests make hundreds of megabytes of it, also under sanitizers.
  std::vector<uint64_t> words((bytes + 7) / 8);
  uint64_t x = mix(key);
  for (uint64_t& word : words) {
    x = x * 6364136223846793005U + 1442695040888963407U;
    word = x ^ (x >> 29);
  }
  const auto* const begin = reinterpret_cast<const unsigned char*>(words.data());
  return {begin, begin + bytes};
}

void requireBytes(const std::string& what, std::span<const unsigned char> found,
                  std::span<const unsigned char> expected) {
  require(found.size() == expected.size(), "{}: {} bytes instead of {}", what, found.size(),
          expected.size());
  if (found.empty() || std::memcmp(found.data(), expected.data(), found.size()) == 0) return;
  const auto [at, wanted] = std::ranges::mismatch(found, expected);
  fail(ErrorCode::internal, "{}: byte {} of {} is {:#x}, expected {:#x}", what, at - found.begin(),
       found.size(), *at, *wanted);
}

}  // namespace mscclpp::test
