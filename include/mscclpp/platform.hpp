// Devices, streams, events and memory behind one interface, for the CPU platform and for CUDA.
// No CUDA header is needed to include this file.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace mscclpp {

/// Where kernels run and memory lives.
enum class Platform { cpu, cuda };

/// "cpu" or "cuda".
std::string_view toString(Platform platform) noexcept;
/// The reverse of toString. @throws Error invalidArgument with the allowed names.
Platform parsePlatform(std::string_view name);

class Device;

namespace detail {
class EventBackend;
class GraphBackend;
class StreamBackend;
}  // namespace detail

/// A point in a stream's order: a shared handle, copied freely. A default-made Event is null and
/// counts as complete. It may outlive its stream and its device.
class Event {
 public:
  Event() = default;
  explicit Event(std::shared_ptr<detail::EventBackend> backend) : backend_(std::move(backend)) {}

  /// False for a null event.
  explicit operator bool() const noexcept { return backend_ != nullptr; }
  /// Whether everything before the event is done. Does not block. @throws on a failed device.
  bool query() const;
  /// Blocks the host thread until the event is complete. @throws on a failed device.
  void synchronize() const;
  /// Milliseconds from `since` to this event; both must be non-null, timed (Stream::record) and
  /// complete.
  double elapsedMs(const Event& since) const;
  /// cudaEvent_t or device::cpu::Event*; nullptr for a null event and for events of the host
  /// itself.
  void* native() const noexcept;

  const std::shared_ptr<detail::EventBackend>& backend() const noexcept { return backend_; }

 private:
  std::shared_ptr<detail::EventBackend> backend_;
};

/// Work that was recorded once and is enqueued as a whole: a shared handle, copied freely. A
/// default-made Graph is null.
class Graph {
 public:
  Graph() = default;
  explicit Graph(std::shared_ptr<detail::GraphBackend> backend) : backend_(std::move(backend)) {}
  explicit operator bool() const noexcept { return backend_ != nullptr; }
  const std::shared_ptr<detail::GraphBackend>& backend() const noexcept { return backend_; }

 private:
  std::shared_ptr<detail::GraphBackend> backend_;
};

/// Work in order on a device. Owns its native stream (Device::createStream) or borrows it
/// (Device::borrowStream). Movable, not copyable. Calls on one Stream may come from one thread at a
/// time. The Stream keeps its Device alive.
///
/// On the CPU platform a borrowed null stream is the host itself: record() gives a complete event,
/// wait() blocks the calling thread, copies happen at once.
class Stream {
 public:
  /// An empty Stream; only assignment, destruction and operator bool are allowed on it.
  Stream() noexcept;
  explicit Stream(std::unique_ptr<detail::StreamBackend> backend);
  ~Stream();
  Stream(Stream&&) noexcept;
  Stream& operator=(Stream&&) noexcept;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  explicit operator bool() const noexcept { return backend_ != nullptr; }
  /// cudaStream_t or device::cpu::Stream*, as a kernel launch takes it. Belongs to this object (or
  /// to the lender).
  void* native() const;
  Device& device() const;
  /// An event after everything enqueued so far. Does not block. `timed` false is a little cheaper
  /// and then elapsedMs() is refused.
  Event record(bool timed = true);
  /// Work enqueued after this call starts only after `event`, which may be of any stream or device
  /// of the same platform; null is ignored. Does not block (on the CPU's host stream it does).
  void wait(const Event& event);
  /// Blocks the host thread until everything enqueued is done. @throws on a failed device.
  void synchronize();
  /// Records what `enqueue` puts on this stream, and on streams that fork from it and join it
  /// again, without running it. Blocks until the graph is ready. CUDA only.
  /// @throws Error unsupported on the CPU platform; what `enqueue` throws.
  Graph capture(const std::function<void()>& enqueue);
  /// Whether work enqueued now is recorded into a graph instead of run. Does not block.
  bool capturing() const noexcept;
  /// Enqueues a captured graph. Does not block.
  void launch(const Graph& graph);
  /// Runs `action` on a host thread in stream order. It must not throw, and must not call the
  /// device.
  void runOnHost(std::function<void()> action);

 private:
  std::unique_ptr<detail::StreamBackend> backend_;
};

/// How another rank finds a piece of exportable memory: plain bytes, sent over any bootstrap.
/// Opaque: made by Device::exportMemory, read by Device::importMemory.
struct MemoryHandle {
  uint32_t version;
  uint32_t platform;
  uint64_t bytes;            ///< bytes exported, from `offset` on
  uint64_t offset;           ///< from the start of the allocation
  uint64_t allocationBytes;  ///< of the whole allocation
  uint64_t pointer;          ///< valid in the exporting process: offset already added
  uint64_t processRandom;    ///< with `pid`: tells one process from another
  uint64_t inode;            ///< CPU: of the shared-memory object, guards against reused ids
  int32_t pid;               ///< of the exporter
  int32_t descriptor;        ///< CPU: file descriptor of the shared memory in the exporter
  char hostId[64];           ///< zero terminated
  char deviceId[48];         ///< zero terminated
  unsigned char ipc[64];     ///< CUDA: cudaIpcMemHandle_t
};
static_assert(sizeof(MemoryHandle) == 240, "MemoryHandle travels between processes");

/// A piece of device memory as a kernel object that other drivers (of a NIC) can address.
struct DmaBuf {
  int descriptor;   ///< the receiver closes it
  uint64_t offset;  ///< of the memory asked for, in bytes
};

/// One CPU or one GPU. Thread safe. No method waits for the whole device or uses CUDA's default
/// stream; every method leaves CUDA's current device as it was.
class Device : public std::enable_shared_from_this<Device> {
 public:
  /// Opens a device; opening the same one again gives the same object while it lives. `index` is
  /// CUDA's ordinal among the visible devices; on the CPU platform it must be 0.
  /// @throws Error invalidArgument for a bad index, unsupported when this build has no CUDA or the
  /// machine no driver or GPU.
  static std::shared_ptr<Device> open(Platform platform, int index = 0);
  /// Devices that open() accepts: 1 for the CPU; 0 for CUDA without driver, GPU or CUDA build.
  /// Never throws.
  static int count(Platform platform) noexcept;

  virtual ~Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  Platform platform() const noexcept { return platform_; }
  int index() const noexcept { return index_; }
  /// One line for people: name, index, memory, multiprocessors.
  virtual std::string describe() const = 0;
  /// Equal exactly for the same physical device, whatever its index in this process: the GPU's
  /// UUID, or "cpu@" and the host id.
  virtual std::string id() const = 0;
  /// How many blocks can run at once, at one block per multiprocessor. CPU: 1024, because the
  /// blocks of all ranks are always co-resident there.
  virtual int multiprocessors() const = 0;
  /// Largest dynamic shared memory of a block, in bytes.
  virtual size_t maxSharedBytesPerBlock() const = 0;

  /// Memory that other ranks can map: zeroed, at least 256-byte aligned. CUDA: cudaMalloc; CPU: an
  /// anonymous shared-memory object that dies with its last user. Blocks (also the device: for
  /// set-up, not for the hot path). The pointer keeps the Device alive.
  /// @throws Error outOfMemory with the bytes asked for.
  virtual std::shared_ptr<void> allocateExportable(size_t bytes) = 0;
  /// Zeroed host memory that kernels of this device address with the same pointer. Blocks, as
  /// above.
  virtual std::shared_ptr<void> allocatePinned(size_t bytes) = 0;
  /// Makes host memory that was made elsewhere (an exportable allocation of the CPU device, say, or
  /// a mapping of a peer's) addressable for kernels of this device, with the same pointer, while
  /// the result lives; the result keeps `memory` alive. Blocks, as above. CPU: `memory` itself.
  virtual std::shared_ptr<void> registerHost(std::shared_ptr<void> memory, size_t bytes) = 0;
  /// Private device memory in stream order, not zeroed, at least 256-byte aligned: may be used by
  /// work enqueued on `stream` after this call. 0 bytes give nullptr. Does not block.
  virtual void* allocate(size_t bytes, Stream& stream) = 0;
  /// Gives memory of allocate() back once the work enqueued on `stream` so far is done; nullptr is
  /// ignored. Failures are logged.
  virtual void release(void* memory, Stream& stream) noexcept = 0;

  /// Copies in stream order between any two addresses that this device or the host can reach. Host
  /// memory must stay valid until the copy is done. Does not block, except on CUDA with host memory
  /// that is not pinned.
  virtual void copy(void* destination, const void* source, size_t bytes, Stream& stream) = 0;
  /// Copies as copy() and waits for it: blocks. For setting up: it uses a stream that the device
  /// has anyway, since a GPU's hardware queues keep only a few streams apart.
  virtual void copyNow(void* destination, const void* source, size_t bytes) = 0;
  /// Sets `bytes` bytes to `value` in stream order.
  virtual void fill(void* memory, uint8_t value, size_t bytes, Stream& stream) = 0;

  /// A new stream that does not synchronise with CUDA's default stream. `rank` only names it in the
  /// reports (and chaos schedules) of the CPU runtime.
  virtual Stream createStream(bool highPriority = false, int rank = 0) = 0;
  /// Wraps a stream of the caller's, who keeps it alive and destroys it. CUDA: any cudaStream_t of
  /// this device, also 0; CPU: a device::cpu::Stream*, or nullptr for the host itself.
  virtual Stream borrowStream(void* native) = 0;

  /// Describes [memory, memory + bytes), which must lie in one allocateExportable() of this device,
  /// to other ranks. The allocation must stay alive until they have imported it (CUDA, other
  /// processes: and while they use it).
  virtual MemoryHandle exportMemory(void* memory, size_t bytes) = 0;
  /// The exported memory, as this device's kernels address it, until the pointer is dropped.
  /// Same process: the plain pointer, with peer access enabled when it is on another GPU; it keeps
  /// the allocation alive. Another process of this host: CUDA IPC (the exporter must outlive it),
  /// or a mapping of the shared memory, found through the exporter's /proc/<pid>/fd: there is no
  /// name that could stay behind, and no size limit of /dev/shm. For that the exporter must be
  /// alive and of the same user and pid namespace at the moment of the call.
  /// @throws Error unsupported for memory of another host (names both) or of another platform.
  virtual std::shared_ptr<void> importMemory(const MemoryHandle& handle) = 0;

  /// Where the device sits on the PCI bus ("0000:18:00.0"); empty for the CPU.
  virtual std::string pciAddress() const { return {}; }
  /// Whether exportDmaBuf() works with this driver and kernel.
  virtual bool canExportDmaBuf() const noexcept { return false; }
  /// The pages that hold [memory, memory + bytes) of this device. @throws Error unsupported.
  virtual DmaBuf exportDmaBuf(const void* memory, size_t bytes) const;

  /// Throws what a kernel or copy failed with since, if anything. Does not block.
  virtual void checkAsyncErrors() = 0;

 protected:
  Device(Platform platform, int index) : platform_(platform), index_(index) {}

 private:
  friend class DeviceScope;
  /// Makes this the calling thread's current device; returns what leave() needs to undo it.
  virtual int enter() { return 0; }
  virtual void leave(int /*previous*/) noexcept {}

  Platform platform_;
  int index_;
};

/// Makes `device` current for the calling thread while the object lives, as kernel launches need on
/// CUDA. Costs nothing on the CPU platform. The device must outlive the scope.
class DeviceScope {
 public:
  explicit DeviceScope(Device& device) : device_(device), previous_(device.enter()) {}
  ~DeviceScope() { device_.leave(previous_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  Device& device_;
  int previous_;
};

}  // namespace mscclpp
