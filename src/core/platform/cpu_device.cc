#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include <mscclpp/device/cpu/runtime.hpp>
#include <mscclpp/env.hpp>
#include <mscclpp/errors.hpp>

#include "core/platform/allocations.hpp"
#include "core/platform/backend.hpp"

namespace mscclpp::detail {

namespace {

namespace cpu = device::cpu;

constexpr int kMultiprocessors = 1024;
/// As on the newest GPUs: a kernel that fits here fits there.
constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr size_t kAlignment = 256;
constexpr size_t kPage = 4096;

/// An event of a stream, or (no native event) a moment on the host that has passed.
class CpuEvent final : public EventBackend {
 public:
  CpuEvent(cpu::Stream* stream, bool timed) : timed_(timed) {
    if (stream != nullptr) {
      event_ = std::make_unique<cpu::Event>();
      event_->record(*stream);
    } else {
      const auto now = std::chrono::steady_clock::now().time_since_epoch();
      hostNs_ =
          static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
    }
  }
  Platform platform() const noexcept override { return Platform::cpu; }
  bool query() const override { return !event_ || event_->query(); }
  void synchronize() const override {
    if (event_) event_->synchronize();
  }
  double elapsedMs(const EventBackend& since) const override {
    const auto& first = static_cast<const CpuEvent&>(since);
    check(timed_ && first.timed_, ErrorCode::invalidArgument,
          "Event::elapsedMs: an event was recorded with timed = false");
    check(query() && first.query(), ErrorCode::invalidState,
          "Event::elapsedMs: an event is not complete yet: synchronize() first");
    return (static_cast<double>(timeNs()) - static_cast<double>(first.timeNs())) / 1e6;
  }
  void* native() const noexcept override { return event_.get(); }

 private:
  uint64_t timeNs() const { return event_ ? event_->timestampNs() : hostNs_; }
  std::unique_ptr<cpu::Event> event_;
  uint64_t hostNs_ = 0;
  bool timed_;
};

class CpuDevice final : public Device {
 public:
  CpuDevice() : Device(Platform::cpu, 0) {}

  std::string describe() const override {
    return fmt::format("cpu 0: {} hardware threads, {} MiB of memory, host {}",
                       std::thread::hardware_concurrency(), physicalBytes() >> 20, hostId());
  }
  std::string id() const override { return "cpu@" + hostId(); }
  int multiprocessors() const override { return kMultiprocessors; }
  size_t maxSharedBytesPerBlock() const override { return kMaxSharedBytes; }

  std::shared_ptr<void> allocateExportable(size_t bytes) override;
  std::shared_ptr<void> allocatePinned(size_t bytes) override;
  std::shared_ptr<void> registerHost(std::shared_ptr<void> memory, size_t) override {
    return memory;
  }
  void* allocate(size_t bytes, Stream& stream) override;
  void release(void* memory, Stream& stream) noexcept override;
  void copy(void* destination, const void* source, size_t bytes, Stream& stream) override;
  void copyNow(void* destination, const void* source, size_t bytes) override {
    if (bytes > 0) std::memmove(destination, source, bytes);
  }
  void fill(void* memory, uint8_t value, size_t bytes, Stream& stream) override;
  Stream createStream(bool highPriority, int rank) override;
  Stream borrowStream(void* native) override;
  MemoryHandle exportMemory(void* memory, size_t bytes) override;
  std::shared_ptr<void> importMemory(const MemoryHandle& handle) override;
  void checkAsyncErrors() override;

  void streamGone(cpu::Stream* stream) {
    const std::lock_guard lock(mutex_);
    streams_.erase(stream);
  }

 private:
  static size_t physicalBytes() {
    return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) *
           static_cast<size_t>(sysconf(_SC_PAGESIZE));
  }
  std::shared_ptr<CpuDevice> self() {
    return std::static_pointer_cast<CpuDevice>(shared_from_this());
  }

  std::mutex mutex_;
  std::set<cpu::Stream*> streams_;  ///< made by createStream
};

class CpuStream final : public StreamBackend {
 public:
  CpuStream(std::shared_ptr<CpuDevice> device, cpu::Stream* stream, bool owned)
      : device_(std::move(device)), stream_(stream), owned_(owned) {}
  ~CpuStream() override {
    if (!owned_) return;
    device_->streamGone(stream_);
    cpu::destroyStream(stream_);
  }
  void* native() const noexcept override { return stream_; }
  Device& device() const noexcept override { return *device_; }
  std::shared_ptr<EventBackend> record(bool timed) override {
    return std::make_shared<CpuEvent>(stream_, timed);
  }
  void wait(const EventBackend& event) override {
    if (stream_ == nullptr) return event.synchronize();
    // An event of the host itself has passed already.
    if (auto* native = static_cast<cpu::Event*>(event.native())) native->streamWait(*stream_);
  }
  void synchronize() override {
    if (stream_ != nullptr) stream_->synchronize();
  }
  void runOnHost(std::function<void()> action) override {
    if (stream_ == nullptr) return action();
    stream_->enqueueHost(std::move(action));
  }

 private:
  std::shared_ptr<CpuDevice> device_;
  cpu::Stream* stream_;
  bool owned_;
};

/// A file descriptor that is closed in the end.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

char* mapShared(int fd, size_t bytes) {
  void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) {
    fail(ErrorCode::outOfMemory, "cannot map {} bytes of shared memory: {}", bytes,
         std::strerror(errno));
  }
  return static_cast<char*>(memory);
}

uint64_t inodeOf(int fd) {
  struct stat status {};
  if (::fstat(fd, &status) != 0) throw SystemError(errno, "fstat of a shared-memory object");
  return status.st_ino;
}

std::shared_ptr<void> CpuDevice::allocateExportable(size_t bytes) {
  const size_t mapped = roundUp(std::max<size_t>(bytes, 1), kPage);
  check(bytes <= physicalBytes(), ErrorCode::outOfMemory,
        "{} bytes of shared memory: this host has {} bytes of memory in all", bytes,
        physicalBytes());
  // An anonymous object: nothing stays behind when the process dies, and /dev/shm may be small.
  Descriptor fd(::memfd_create("mscclpp", MFD_CLOEXEC));
  if (fd.get() < 0) throw SystemError(errno, "memfd_create");
  if (::ftruncate(fd.get(), static_cast<off_t>(mapped)) != 0) {
    fail(ErrorCode::outOfMemory, "{} bytes of shared memory could not be had: {}", bytes,
         std::strerror(errno));
  }
  const uint64_t inode = inodeOf(fd.get());
  char* const base = mapShared(fd.get(), mapped);
  const int descriptor = fd.release();
  const std::shared_ptr<void> memory(base, [device = self(), descriptor, mapped](void* pointer) {
    removeAllocation(pointer);
    ::munmap(pointer, mapped);
    ::close(descriptor);
  });
  addAllocation({.memory = memory,
                 .platform = Platform::cpu,
                 .deviceIndex = 0,
                 .base = base,
                 .bytes = bytes,
                 .descriptor = descriptor,
                 .inode = inode});
  return memory;
}

void* alignedAllocate(size_t bytes) {
  void* memory = std::aligned_alloc(kAlignment, roundUp(std::max<size_t>(bytes, 1), kAlignment));
  check(memory != nullptr, ErrorCode::outOfMemory, "{} bytes of host memory could not be had",
        bytes);
  return memory;
}

std::shared_ptr<void> CpuDevice::allocatePinned(size_t bytes) {
  void* memory = alignedAllocate(bytes);
  std::memset(memory, 0, std::max<size_t>(bytes, 1));
  return {memory, [device = self()](void* pointer) { std::free(pointer); }};
}

void* CpuDevice::allocate(size_t bytes, Stream&) {
  return bytes == 0 ? nullptr : alignedAllocate(bytes);
}

void CpuDevice::release(void* memory, Stream& stream) noexcept {
  if (memory == nullptr) return;
  // The closure owns the memory: a stream that fails drops its work, and the memory with it.
  runNoThrow("releasing memory", [&] {
    const std::shared_ptr<void> owner(memory, [](void* pointer) { std::free(pointer); });
    if (stream.native() != nullptr) stream.runOnHost([owner] {});
  });
}

void CpuDevice::copy(void* destination, const void* source, size_t bytes, Stream& stream) {
  if (bytes == 0) return;
  stream.runOnHost([=] { std::memmove(destination, source, bytes); });
}

void CpuDevice::fill(void* memory, uint8_t value, size_t bytes, Stream& stream) {
  if (bytes == 0) return;
  stream.runOnHost([=] { std::memset(memory, value, bytes); });
}

Stream CpuDevice::createStream(bool, int rank) {
  cpu::Stream* const stream = cpu::createStream(rank);
  const std::lock_guard lock(mutex_);
  streams_.insert(stream);
  return Stream(std::make_unique<CpuStream>(self(), stream, true));
}

Stream CpuDevice::borrowStream(void* native) {
  return Stream(std::make_unique<CpuStream>(self(), static_cast<cpu::Stream*>(native), false));
}

MemoryHandle CpuDevice::exportMemory(void* memory, size_t bytes) {
  return makeHandle(*this, findAllocation(*this, memory, bytes), memory, bytes);
}

std::shared_ptr<void> CpuDevice::importMemory(const MemoryHandle& handle) {
  checkHandle(*this, handle);
  if (auto own = findOwn(handle)) return own;
  const std::string path = fmt::format("/proc/{}/fd/{}", handle.pid, handle.descriptor);
  const Descriptor fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (fd.get() < 0) {
    throw SystemError(
        errno,
        fmt::format("cannot open shared memory of {} through {}: it must be alive, of the same "
                    "user and in the same pid namespace",
                    exporterOf(handle), path));
  }
  check(inodeOf(fd.get()) == handle.inode, ErrorCode::invalidState,
        "the shared memory of {} is gone: {} is something else now", exporterOf(handle), path);
  const size_t mapped = roundUp(std::max<size_t>(handle.allocationBytes, 1), kPage);
  const std::shared_ptr<void> whole(
      mapShared(fd.get(), mapped),
      [device = self(), mapped](void* base) { ::munmap(base, mapped); });
  return {whole, static_cast<char*>(whole.get()) + handle.offset};
}

void CpuDevice::checkAsyncErrors() {
  const std::lock_guard lock(mutex_);
  for (cpu::Stream* stream : streams_) {
    const std::string report = stream->failure();
    if (!report.empty()) throw cpu::DeviceError(report);
  }
}

}  // namespace

std::shared_ptr<Device> makeCpuDevice() {
  return std::make_shared<CpuDevice>();
}

}  // namespace mscclpp::detail
