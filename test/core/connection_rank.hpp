// One rank of a test of connections: endpoint, a connection to every other rank, memories.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/connection.hpp>
#include <mscclpp/errors.hpp>

namespace mscclpp::test {

/// One way to run the conformance suite.
struct ConnectionInstance {
  std::string name;  ///< of the ctest entries: conformance.<name>/...
  Transport transport = Transport::shm;
  Platform platform = Platform::cpu;
  EndpointOptions options{};  ///< rank and timeout are filled in by the tests
  ConnectionCapabilities expected{};
  bool requiredInCi = true;  ///< under CI=true a machine that cannot run it is a failure
  bool noticesDeadProcesses = true;
  /// In place of Endpoint::create, for transports that are no row of the table.
  std::function<std::shared_ptr<Endpoint>(std::shared_ptr<Device>, const EndpointOptions&)> create =
      nullptr;

  std::shared_ptr<Endpoint> makeEndpoint(const EndpointOptions& changes) const;
};

/// At static-initialisation time: child processes find it by its name.
const ConnectionInstance& addInstance(ConnectionInstance instance);
const ConnectionInstance& findInstance(const std::string& name);

/// Memory of this rank that is registered with an endpoint, host or GPU, as the host sees it.
class Area {
 public:
  Area(const std::shared_ptr<Device>& device, Endpoint& endpoint, size_t bytes);

  const LocalMemory& local() const { return *local_; }
  void put(uint64_t offset, std::span<const unsigned char> bytes);
  std::vector<unsigned char> get(uint64_t offset, size_t bytes);
  void fill(uint64_t offset, unsigned char value, size_t bytes);
  /// Of a 64-bit word in host memory.
  int64_t* word(uint64_t offset) const;

 private:
  std::shared_ptr<Device> device_;
  std::shared_ptr<LocalMemory> local_;
  std::mutex mutex_;  ///< of the stream: a rank's proxy and its reader both use areas
  Stream stream_;
};

struct RankSetup {
  size_t dataBytes = size_t{4} << 20;
  int queueDepth = 0;                                            ///< 0: the instance's
  std::chrono::nanoseconds timeout = std::chrono::seconds(100);  ///< of the endpoint
};

class Rank {
 public:
  static constexpr size_t kWords = 1024;
  /// Words that the suite's own protocols use; tests use those below.
  static constexpr size_t kArrivals = 512;
  static constexpr size_t kCredits = 640;
  static constexpr size_t kDone = 1000;

  /// Collective.
  Rank(const ConnectionInstance& instance, int rank, int size, const UniqueId& id,
       const RankSetup& setup);

  int rank() const { return bootstrap_.rank(); }
  int size() const { return bootstrap_.size(); }
  /// The only other rank, of two.
  int other() const { return 1 - rank(); }
  const ConnectionInstance& instance() const { return instance_; }
  Bootstrap& bootstrap() { return bootstrap_; }
  Endpoint& endpoint() { return *endpoint_; }
  Connection& to(int peer) { return *connections_.at(static_cast<size_t>(peer)); }
  Area& data() { return *data_; }
  Area& words() { return *words_; }
  Area& deviceWords() { return *deviceWords_; }
  const RemoteMemory& dataOf(int peer) const { return *theirData_.at(static_cast<size_t>(peer)); }
  const RemoteMemory& wordsOf(int peer) const { return *theirWords_.at(static_cast<size_t>(peer)); }
  const RemoteMemory& deviceWordsOf(int peer) const {
    return *theirDeviceWords_.at(static_cast<size_t>(peer));
  }

  /// Collective: registered memories of all ranks, beyond those above.
  std::vector<std::shared_ptr<RemoteMemory>> exchange(const Area& area) {
    return exchangeMemories(bootstrap_, connections_, area.local());
  }

  /// What a proxy's loop does: moves all connections along.
  bool progress();
  /// Progresses until the condition holds; throws after a minute, and when a connection breaks.
  void waitFor(const std::string& what, const std::function<bool()>& condition);
  /// From the own data area into the peer's.
  void write(int peer, uint64_t localOffset, uint64_t remoteOffset, uint64_t bytes);
  void add(int peer, size_t word, int64_t value);
  /// Progresses until the connection takes an operation.
  Connection& postable(int peer);
  void flush();
  /// Own counter, as a waiter sees it.
  int64_t word(size_t index) const { return __atomic_load_n(wordAt(index), __ATOMIC_ACQUIRE); }
  void setWord(size_t index, int64_t value) {
    __atomic_store_n(wordAt(index), value, __ATOMIC_RELEASE);
  }
  /// Waits until all ranks are done with each other, then says good-bye. Every scenario ends so.
  void finish();

 private:
  int64_t* wordAt(size_t index) const { return words_->word(index * sizeof(int64_t)); }

  const ConnectionInstance& instance_;
  TcpBootstrap bootstrap_;
  std::shared_ptr<Endpoint> endpoint_;
  std::vector<std::shared_ptr<Connection>> connections_;
  std::unique_ptr<Area> data_;
  std::unique_ptr<Area> words_;        ///< host memory
  std::unique_ptr<Area> deviceWords_;  ///< memory of the device
  std::vector<std::shared_ptr<RemoteMemory>> theirData_;
  std::vector<std::shared_ptr<RemoteMemory>> theirWords_;
  std::vector<std::shared_ptr<RemoteMemory>> theirDeviceWords_;
};

/// A thread that does what a proxy does, until it is stopped or the work throws.
class ProxyThread {
 public:
  /// `work` is called again and again.
  explicit ProxyThread(std::function<void()> work);
  ~ProxyThread() { end(); }
  ProxyThread(const ProxyThread&) = delete;
  ProxyThread& operator=(const ProxyThread&) = delete;
  /// Whether the work threw.
  bool broken() const { return broken_.load(std::memory_order_acquire); }
  /// Ends the thread and throws what the work threw.
  void stop();

 private:
  void end() {
    stop_.store(true, std::memory_order_relaxed);
    if (thread_.joinable()) thread_.join();
  }
  std::atomic<bool> stop_ = false;
  std::atomic<bool> broken_ = false;
  std::exception_ptr error_;
  std::thread thread_;
};

/// Throws unless the condition holds: scenarios run in child processes too, where EXPECT_ does not
/// reach the test.
template <class... A>
void require(bool condition, fmt::format_string<A...> format, A&&... args) {
  check(condition, ErrorCode::internal, format, std::forward<A>(args)...);
}

/// A number that depends on all arguments, for payloads and sizes.
uint64_t mix(uint64_t a, uint64_t b = 0, uint64_t c = 0);
/// Bytes that say who sent them, and when.
std::vector<unsigned char> payload(uint64_t key, size_t bytes);
/// Throws with the first difference.
void requireBytes(const std::string& what, std::span<const unsigned char> found,
                  std::span<const unsigned char> expected);

inline bool isReady(const std::future<void>& future) {
  return future.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

inline constexpr std::chrono::seconds kPatience(60);

}  // namespace mscclpp::test
