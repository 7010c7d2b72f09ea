// What carries port channels: an Endpoint per rank and transport, a Connection per peer.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <mscclpp/registered_memory.hpp>

namespace mscclpp {

/// How a Connection moves data (MSCCLPP_EP_TRANSPORT).
enum class Transport {
  shm,      ///< CPU ranks of one host: the peer's memory is mapped
  cudaIpc,  ///< GPU ranks of one host: the copy engine writes into the peer's memory
  tcp,      ///< any two ranks; the receiver's CPU applies what comes
  verbs     ///< InfiniBand or RoCE
};

/// "shm", "cuda_ipc", "tcp" or "verbs".
std::string_view toString(Transport transport) noexcept;
/// The reverse of toString. @throws Error invalidArgument with the allowed names.
Transport parseTransport(std::string_view name);

/// What a connection can do; asked, never assumed.
struct ConnectionCapabilities {
  /// Writes reach the peer's memory without its CPU. Otherwise the peer's own Connection must be
  /// progressed meanwhile.
  bool oneSidedWrites = false;
  /// The same of atomicAdd and signals.
  bool oneSidedAtomics = false;
  /// GPU memory may be the source and the destination of writes.
  bool deviceMemory = false;
  /// GPU memory may be the target of atomicAdd. Otherwise counters live in host memory.
  bool deviceCounters = false;
  /// A signal behind a write is fastest into a word of GPU memory: semaphores keep one there too.
  bool deviceSignals = false;
};

/// Who makes endpoints, and how long set-up and silence may last.
struct EndpointOptions {
  int rank = 0;  ///< own rank: named in errors, told to peers
  /// Limit of connect() and of blocking flush(); also after how long a silent peer counts as lost
  /// where the transport can tell. 0 = no limit.
  std::chrono::nanoseconds timeout = std::chrono::seconds(100);
  /// tcp: interface or address to listen on and tell peers; verbs: device, such as "mlx5_0". Empty:
  /// chosen by the transport (verbs: the one nearest to the device).
  std::string interface = {};
  /// Operations that may be under way per connection before canPost() says no, 2 to 65536.
  int queueDepth = 1024;
  int queuePairs = 1;  ///< verbs: queue pairs per peer, 1 to 16
  /// cuda_ipc, and tcp with GPU memory: streams that all connections share for their copies, 1 to
  /// 64. Take 1 where ranks share a GPU as threads: it has few hardware queues.
  int copyStreams = 4;
};

/// Memory of this rank that connections of its endpoint may read and peers may write to. Made by
/// Endpoint::registerMemory; keeps the memory alive.
class LocalMemory {
 public:
  explicit LocalMemory(RegisteredMemory memory) : memory_(std::move(memory)) {}
  virtual ~LocalMemory() = default;
  LocalMemory(const LocalMemory&) = delete;
  LocalMemory& operator=(const LocalMemory&) = delete;

  const RegisteredMemory& memory() const noexcept { return memory_; }
  size_t size() const noexcept { return memory_.size(); }
  bool onDevice() const noexcept { return memory_.device()->platform() == Platform::cuda; }
  /// What Connection::importMemory of a peer needs: bytes of the transport's own, the same number
  /// for every memory of an endpoint.
  virtual std::vector<std::byte> describe() const = 0;

 private:
  RegisteredMemory memory_;
};

/// A peer's LocalMemory as one connection reaches it.
class RemoteMemory {
 public:
  RemoteMemory(size_t bytes, bool onDevice) : bytes_(bytes), onDevice_(onDevice) {}
  virtual ~RemoteMemory() = default;
  RemoteMemory(const RemoteMemory&) = delete;
  RemoteMemory& operator=(const RemoteMemory&) = delete;

  size_t size() const noexcept { return bytes_; }
  bool onDevice() const noexcept { return onDevice_; }

 private:
  size_t bytes_;
  bool onDevice_;
};

/// A way to one peer. Operations are posted and return at once; what was posted before an atomicAdd
/// or a signal is in the peer's memory before that is seen there. Writes among themselves have no
/// order, atomic adds and signals keep theirs.
///
/// Progress needs calls of progress() (a proxy thread makes them). All calls but describe(),
/// failed() and failure() come from one thread at a time.
class Connection {
 public:
  /// `bytes` from `local` to `remote`; offsets in bytes from the start of the memories, of any
  /// alignment. The source must stay as it is until the write is completed.
  struct Write {
    const LocalMemory* local;
    const RemoteMemory* remote;
    uint64_t localOffset;
    uint64_t remoteOffset;
    uint64_t bytes;
  };
  /// Adds `value` to a 64-bit counter at `offset` (a multiple of 8), wrapping.
  struct Add {
    const RemoteMemory* remote;
    uint64_t offset;
    int64_t value;
  };
  /// Where a signal lands: a host word, and with deviceSignals a word of GPU memory as well; the
  /// waiter adds the two up. Only one sender may signal to a pair of words.
  struct SignalTarget {
    const RemoteMemory* host = nullptr;
    uint64_t hostOffset = 0;
    const RemoteMemory* device = nullptr;
    uint64_t deviceOffset = 0;
    uint64_t sentToHost = 0;    ///< kept by the connection
    uint64_t sentToDevice = 0;  ///< kept by the connection
  };

  virtual ~Connection() = default;
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  int peer() const noexcept { return peer_; }
  Transport transport() const noexcept { return transport_; }
  virtual ConnectionCapabilities capabilities() const noexcept = 0;
  /// One line for people: both ends, and what was chosen.
  virtual std::string describe() const = 0;

  /// What the peer's connect() needs; the same number of bytes on all connections of an endpoint.
  virtual std::vector<std::byte> address() const = 0;
  /// Connects to the peer whose address() this is. May block until the other side connects too, at
  /// most for the endpoint's timeout; no rank may post before both have (connectAll() sees to
  /// that).
  /// @throws TimeoutError, PeerError, SystemError.
  virtual void connect(std::span<const std::byte> theirs) = 0;
  /// A memory of the peer, from LocalMemory::describe() there.
  /// @throws Error invalidArgument, unsupported.
  virtual std::shared_ptr<RemoteMemory> importMemory(std::span<const std::byte> description) = 0;

  /// False while as many operations are under way as fit: progress() first. Posting all the same is
  /// a bug of the caller.
  virtual bool canPost() const = 0;
  /// @throws Error invalidArgument when a range is outside its memory, an offset misaligned. After
  /// a failure these do nothing.
  void write(const Write& write);
  void atomicAdd(const Add& add);
  void signal(SignalTarget& target);
  /// Hands what was posted so far to the hardware; posting may gather.
  virtual void submit() {}
  /// Moves things along; returns whether anything happened. Never blocks, never throws: what goes
  /// wrong is kept in failure().
  virtual bool progress() = 0;

  /// How many operations were posted; how many of them, in order, are complete: their data is in
  /// the peer's memory and their sources may be overwritten.
  uint64_t posted() const noexcept { return posted_; }
  virtual uint64_t completed() const noexcept = 0;
  /// Blocks until everything posted is complete. @throws PeerError when the connection has failed,
  /// TimeoutError with the operations that are missing.
  void flush(std::chrono::nanoseconds timeout);

  /// Whether the connection is broken. It stays so; the first reason is kept.
  bool failed() const noexcept { return failed_.load(std::memory_order_acquire); }
  /// Why; empty while it is sound.
  std::string failure() const { return failed() ? failure_ : std::string(); }
  /// Breaks the connection from this side, for tests and for a peer that is given up.
  void fail(const std::string& why) noexcept;
  /// Says good-bye, so that the peer does not take the end for a death. Everything posted should be
  /// complete. Does not wait for the peer.
  virtual void close() noexcept {}

 protected:
  Connection(Transport transport, int peer) : transport_(transport), peer_(peer) {}

 private:
  virtual void doWrite(const Write& write) = 0;
  virtual void doAdd(const Add& add) = 0;
  /// Default: an atomicAdd of 1 to the host word.
  virtual void doSignal(SignalTarget& target);

  Transport transport_;
  int peer_;
  uint64_t posted_ = 0;
  std::atomic<bool> failed_ = false;
  std::string failure_;
};

/// One rank's end of a transport. Thread safe.
class Endpoint {
 public:
  /// @throws Error unsupported when this build or machine lacks the transport, with what is
  /// missing; invalidArgument for an option out of range. There is no fallback to another
  /// transport.
  static std::shared_ptr<Endpoint> create(Transport transport, std::shared_ptr<Device> device,
                                          const EndpointOptions& options = {});
  virtual ~Endpoint() = default;
  Endpoint(const Endpoint&) = delete;
  Endpoint& operator=(const Endpoint&) = delete;

  Transport transport() const noexcept { return transport_; }
  const std::shared_ptr<Device>& device() const noexcept { return device_; }
  const EndpointOptions& options() const noexcept { return options_; }
  /// One line for people: NIC, address, link, what it can do.
  virtual std::string describe() const = 0;

  /// Own memory for use by all connections of this endpoint: GPU memory of device(), or host memory
  /// (a RegisteredMemory of the CPU device). @throws Error unsupported, with what is missing.
  virtual std::shared_ptr<LocalMemory> registerMemory(RegisteredMemory memory) = 0;
  /// A connection to `peer`, not yet connected. `peer` may be the own rank where the transport
  /// allows it. It keeps the endpoint alive.
  virtual std::shared_ptr<Connection> open(int peer) = 0;

 protected:
  Endpoint(Transport transport, std::shared_ptr<Device> device, const EndpointOptions& options)
      : transport_(transport), device_(std::move(device)), options_(options) {}

 private:
  Transport transport_;
  std::shared_ptr<Device> device_;
  EndpointOptions options_;
};

/// Collective: a connection from every rank to every other one, by rank; the own entry is null.
/// With `wanted`, only to peers for which it is true; both ends must agree, and entries of the
/// others are null. When one rank cannot connect, every rank throws an Error that says which and
/// why.
std::vector<std::shared_ptr<Connection>> connectAll(
    Bootstrap& bootstrap, Endpoint& endpoint, const std::function<bool(int peer)>& wanted = {});

/// Collective: every rank gives a memory registered with its endpoint (sizes may differ) and gets
/// those of all ranks it is connected to, by rank; other entries are null.
std::vector<std::shared_ptr<RemoteMemory>> exchangeMemories(
    Bootstrap& bootstrap, const std::vector<std::shared_ptr<Connection>>& connections,
    const LocalMemory& local);

}  // namespace mscclpp
