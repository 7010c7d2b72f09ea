#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <set>
#include <utility>

#include <mscclpp/env.hpp>
#include <mscclpp/errors.hpp>

#include "core/platform/allocations.hpp"
#include "core/platform/backend.hpp"
#include "core/platform/cuda_check.hpp"
#include "core/platform/cuda_dma_buf.hpp"
#include "core/platform/cuda_register.hpp"
#include "core/platform/cuda_stream.hpp"

namespace mscclpp::detail {

namespace {

/// An IPC handle opens everything that shares the driver's block with the memory: blocks are 2 MiB.
constexpr size_t kExportGranularity = size_t{2} << 20;

/// Why there is no CUDA device, in words that say what to do; empty when there are some.
std::string whyNoDevice(cudaError_t result, int count) {
  if (result == cudaErrorInsufficientDriver) {
    int driver = 0;
    static_cast<void>(cudaDriverGetVersion(&driver));
    return driver == 0
               ? "no NVIDIA driver was found on this machine: install it, or use the platform cpu"
               : fmt::format("the NVIDIA driver supports CUDA {}.{} only, this library needs {}.{}",
                             driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
                             CUDART_VERSION % 1000 / 10);
  }
  if (result == cudaErrorNoDevice || (result == cudaSuccess && count == 0)) {
    return "no GPU is visible: look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use the platform "
           "cpu";
  }
  return result == cudaSuccess ? "" : cudaGetErrorString(result);
}

bool isHostMemory(const void* memory) {
  cudaPointerAttributes attributes{};
  cudaTry(cudaPointerGetAttributes(&attributes, memory), "cudaPointerGetAttributes");
  return attributes.type == cudaMemoryTypeHost || attributes.type == cudaMemoryTypeUnregistered;
}

/// Peer access is switched on once per process and pair of devices; asking twice is an error to
/// CUDA.
bool firstAccess(int from, int to) {
  struct Seen {
    std::mutex mutex;
    std::set<std::pair<int, int>> pairs;
  };
  static Seen* const seen = new Seen;
  const std::lock_guard lock(seen->mutex);
  return seen->pairs.emplace(from, to).second;
}

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index);
  ~CudaDevice() override;

  std::string describe() const override;
  std::string id() const override { return id_; }
  int multiprocessors() const override { return properties_.multiProcessorCount; }
  size_t maxSharedBytesPerBlock() const override { return properties_.sharedMemPerBlockOptin; }

  std::shared_ptr<void> allocateExportable(size_t bytes) override;
  std::shared_ptr<void> allocatePinned(size_t bytes) override;
  std::shared_ptr<void> registerHost(std::shared_ptr<void> memory, size_t bytes) override {
    return cudaRegisterHost(shared_from_this(), std::move(memory), bytes);
  }
  void* allocate(size_t bytes, Stream& stream) override;
  void release(void* memory, Stream& stream) noexcept override;
  void copy(void* destination, const void* source, size_t bytes, Stream& stream) override;
  void copyNow(void* destination, const void* source, size_t bytes) override;
  void fill(void* memory, uint8_t value, size_t bytes, Stream& stream) override;
  Stream createStream(bool highPriority, int rank) override;
  Stream borrowStream(void* native) override;
  MemoryHandle exportMemory(void* memory, size_t bytes) override;
  std::shared_ptr<void> importMemory(const MemoryHandle& handle) override;
  std::string pciAddress() const override { return cudaPciAddress(index()); }
  bool canExportDmaBuf() const noexcept override { return cudaCanExportDmaBuf(index()); }
  DmaBuf exportDmaBuf(const void* memory, size_t bytes) const override {
    return cudaExportDmaBuf(index(), memory, bytes);
  }
  void checkAsyncErrors() override;

 private:
  int enter() override {
    int previous = 0;
    cudaTry(cudaGetDevice(&previous), "cudaGetDevice");
    if (previous != index()) cudaTry(cudaSetDevice(index()), "cudaSetDevice");
    return previous;
  }
  void leave(int previous) noexcept override {
    if (previous != index()) cudaLog(cudaSetDevice(previous), "cudaSetDevice");
  }
  static cudaStream_t native(const Stream& stream) {
    return static_cast<cudaStream_t>(stream.native());
  }
  [[noreturn]] void failAllocation(cudaError_t result, const char* what, size_t bytes) const;
  void enablePeerAccess(int owner, const MemoryHandle& handle) const;

  cudaDeviceProp properties_{};
  std::string id_;
  cudaStream_t ownStream_ = nullptr;  ///< for setting up and looking for errors
  cudaMemPool_t pool_ = nullptr;
  std::shared_ptr<CudaEventPool> events_;
};

CudaDevice::CudaDevice(int index) : Device(Platform::cuda, index) {
  const CurrentDevice current(index);
  cudaTry(cudaGetDeviceProperties(&properties_, index), "cudaGetDeviceProperties");
  id_ = "cuda@";
  for (const char byte : properties_.uuid.bytes) {
    id_ += fmt::format("{:02x}", static_cast<unsigned char>(byte));
  }
  int pools = 0;
  cudaTry(cudaDeviceGetAttribute(&pools, cudaDevAttrMemoryPoolsSupported, index),
          "cudaDeviceGetAttribute");
  check(pools != 0, ErrorCode::unsupported,
        "{} has no stream-ordered memory pools: this library needs them", properties_.name);
  cudaTry(cudaStreamCreateWithFlags(&ownStream_, cudaStreamNonBlocking),
          "cudaStreamCreateWithFlags");
  cudaMemPoolProps options{};
  options.allocType = cudaMemAllocationTypePinned;
  options.location.type = cudaMemLocationTypeDevice;
  options.location.id = index;
  cudaTry(cudaMemPoolCreate(&pool_, &options), "cudaMemPoolCreate");
  uint64_t keepAll = UINT64_MAX;  // memory goes back to the driver only with the pool: no stalls
  cudaTry(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &keepAll),
          "cudaMemPoolSetAttribute");
  // An allocation on one stream must never make it wait for another: that stream's kernel may
  // itself wait for work that this allocation is for.
  int no = 0;
  cudaTry(cudaMemPoolSetAttribute(pool_, cudaMemPoolReuseAllowInternalDependencies, &no),
          "cudaMemPoolSetAttribute");
  events_ = std::make_shared<CudaEventPool>(index);
}

CudaDevice::~CudaDevice() {
  runNoThrow("closing a CUDA device", [this] {
    const CurrentDevice current(index());
    if (pool_ != nullptr) cudaLog(cudaMemPoolDestroy(pool_), "cudaMemPoolDestroy");
    if (ownStream_ != nullptr) cudaLog(cudaStreamDestroy(ownStream_), "cudaStreamDestroy");
  });
}

std::string CudaDevice::describe() const {
  return fmt::format("cuda {}: {} (sm_{}{}), {} MiB, {} multiprocessors, {}", index(),
                     properties_.name, properties_.major, properties_.minor,
                     properties_.totalGlobalMem >> 20, properties_.multiProcessorCount, id_);
}

void CudaDevice::failAllocation(cudaError_t result, const char* what, size_t bytes) const {
  static_cast<void>(cudaGetLastError());
  if (result != cudaErrorMemoryAllocation) {
    cudaTry(result, fmt::format("{} of {} bytes", what, bytes));
  }
  size_t available = 0;
  size_t total = 0;
  static_cast<void>(cudaMemGetInfo(&available, &total));
  fail(ErrorCode::outOfMemory, "{} of {} bytes on cuda device {}: {} of {} bytes are free", what,
       bytes, index(), available, total);
}

std::shared_ptr<void> CudaDevice::allocateExportable(size_t bytes) {
  const CurrentDevice current(index());
  const RelaxedCapture relaxed;
  const size_t allocated = roundUp(std::max<size_t>(bytes, 1), kExportGranularity);
  void* base = nullptr;
  const cudaError_t result = cudaMalloc(&base, allocated);
  if (result != cudaSuccess) failAllocation(result, "cudaMalloc", allocated);
  const std::shared_ptr<void> memory(base, [device = shared_from_this()](void* pointer) {
    removeAllocation(pointer);
    runNoThrow("freeing device memory", [&] {
      const CurrentDevice owner(device->index());
      const RelaxedCapture relaxedFree;
      cudaLog(cudaFree(pointer), "cudaFree");
    });
  });
  addAllocation({.memory = memory,
                 .platform = Platform::cuda,
                 .deviceIndex = index(),
                 .base = static_cast<char*>(base),
                 .bytes = bytes,
                 .descriptor = -1,
                 .inode = 0});
  cudaTry(cudaMemsetAsync(base, 0, allocated, ownStream_), "cudaMemsetAsync");
  cudaTry(cudaStreamSynchronize(ownStream_), "zeroing device memory");
  return memory;
}

std::shared_ptr<void> CudaDevice::allocatePinned(size_t bytes) {
  const CurrentDevice current(index());
  const RelaxedCapture relaxed;
  void* memory = nullptr;
  const size_t allocated = std::max<size_t>(bytes, 1);
  const cudaError_t result =
      cudaHostAlloc(&memory, allocated, cudaHostAllocPortable | cudaHostAllocMapped);
  if (result != cudaSuccess) failAllocation(result, "cudaHostAlloc", bytes);
  std::memset(memory, 0, allocated);
  return {memory, [device = shared_from_this()](void* pointer) {
            runNoThrow("freeing pinned memory", [&] {
              const CurrentDevice owner(device->index());
              const RelaxedCapture relaxedFree;
              cudaLog(cudaFreeHost(pointer), "cudaFreeHost");
            });
          }};
}

void* CudaDevice::allocate(size_t bytes, Stream& stream) {
  if (bytes == 0) return nullptr;
  const CurrentDevice current(index());
  void* memory = nullptr;
  const cudaError_t result = cudaMallocFromPoolAsync(&memory, bytes, pool_, native(stream));
  if (result != cudaSuccess) failAllocation(result, "cudaMallocFromPoolAsync", bytes);
  return memory;
}

void CudaDevice::release(void* memory, Stream& stream) noexcept {
  if (memory == nullptr) return;
  runNoThrow("releasing device memory", [&] {
    const CurrentDevice current(index());
    cudaLog(cudaFreeAsync(memory, native(stream)), "cudaFreeAsync");
  });
}

void CudaDevice::copy(void* destination, const void* source, size_t bytes, Stream& stream) {
  if (bytes == 0) return;
  const CurrentDevice current(index());
  // Between two host addresses cudaMemcpyAsync waits for the stream and copies at once.
  if (isHostMemory(destination) && isHostMemory(source)) {
    return stream.runOnHost([=] { std::memmove(destination, source, bytes); });
  }
  cudaTry(cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDefault, native(stream)),
          fmt::format("cudaMemcpyAsync of {} bytes", bytes));
}

void CudaDevice::copyNow(void* destination, const void* source, size_t bytes) {
  const CurrentDevice current(index());
  cudaTry(cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDefault, ownStream_),
          fmt::format("cudaMemcpyAsync of {} bytes", bytes));
  cudaTry(cudaStreamSynchronize(ownStream_), "waiting for a copy");
}

void CudaDevice::fill(void* memory, uint8_t value, size_t bytes, Stream& stream) {
  if (bytes == 0) return;
  const CurrentDevice current(index());
  cudaTry(cudaMemsetAsync(memory, value, bytes, native(stream)),
          fmt::format("cudaMemsetAsync of {} bytes", bytes));
}

Stream CudaDevice::createStream(bool highPriority, int) {
  const CurrentDevice current(index());
  int lowest = 0;
  int highest = 0;
  cudaTry(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange");
  cudaStream_t stream = nullptr;
  cudaTry(
      cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, highPriority ? highest : lowest),
      "cudaStreamCreateWithPriority");
  return Stream(std::make_unique<CudaStream>(shared_from_this(), events_, stream, true));
}

Stream CudaDevice::borrowStream(void* native) {
  return Stream(std::make_unique<CudaStream>(shared_from_this(), events_,
                                             static_cast<cudaStream_t>(native), false));
}

MemoryHandle CudaDevice::exportMemory(void* memory, size_t bytes) {
  const Allocation allocation = findAllocation(*this, memory, bytes);
  MemoryHandle handle = makeHandle(*this, allocation, memory, bytes);
  const CurrentDevice current(index());
  cudaIpcMemHandle_t ipc{};
  static_assert(sizeof(ipc) == sizeof(handle.ipc));
  // Where IPC is not to be had, threads of one process still work: the importer reports the code.
  const cudaError_t result = cudaIpcGetMemHandle(&ipc, allocation.base);
  if (result != cudaSuccess) static_cast<void>(cudaGetLastError());
  handle.descriptor = static_cast<int32_t>(result);
  std::memcpy(handle.ipc, &ipc, sizeof(ipc));
  return handle;
}

void CudaDevice::enablePeerAccess(int owner, const MemoryHandle& handle) const {
  if (owner == index()) return;
  int possible = 0;
  cudaTry(cudaDeviceCanAccessPeer(&possible, index(), owner), "cudaDeviceCanAccessPeer");
  check(possible != 0, ErrorCode::unsupported,
        "cuda device {} ({}) cannot address the memory of cuda device {} ({}): peer access is not "
        "possible between them on this machine",
        index(), id_, owner, handle.deviceId);
  if (!firstAccess(index(), owner)) return;
  const cudaError_t result = cudaDeviceEnablePeerAccess(owner, 0);
  if (result == cudaErrorPeerAccessAlreadyEnabled) {
    static_cast<void>(cudaGetLastError());
    return;
  }
  cudaTry(result, fmt::format("cudaDeviceEnablePeerAccess({}) on device {}", owner, index()));
}

std::shared_ptr<void> CudaDevice::importMemory(const MemoryHandle& handle) {
  checkHandle(*this, handle);
  const CurrentDevice current(index());
  int owner = index();
  if (auto own = findOwn(handle, &owner)) {
    enablePeerAccess(owner, handle);
    return own;
  }
  check(handle.descriptor == cudaSuccess, ErrorCode::unsupported,
        "memory of {} ({}) cannot be mapped: CUDA IPC does not work there ({}): run the ranks as "
        "threads "
        "of one process",
        exporterOf(handle), handle.deviceId,
        cudaGetErrorString(static_cast<cudaError_t>(handle.descriptor)));
  cudaIpcMemHandle_t ipc{};
  std::memcpy(&ipc, handle.ipc, sizeof(ipc));
  void* base = nullptr;
  cudaTry(
      cudaIpcOpenMemHandle(&base, ipc, cudaIpcMemLazyEnablePeerAccess),
      fmt::format("mapping {} bytes of {} ({}) on cuda device {} by CUDA IPC: are both GPUs of one "
                  "host, with peer access, and do the processes share an IPC namespace?",
                  handle.allocationBytes, exporterOf(handle), handle.deviceId, index()));
  const std::shared_ptr<void> whole(base, [device = shared_from_this()](void* pointer) {
    runNoThrow("unmapping a peer's memory", [&] {
      const CurrentDevice importer(device->index());
      cudaLog(cudaIpcCloseMemHandle(pointer), "cudaIpcCloseMemHandle");
    });
  });
  return {whole, static_cast<char*>(base) + handle.offset};
}

void CudaDevice::checkAsyncErrors() {
  const CurrentDevice current(index());
  const RelaxedCapture relaxed;
  const cudaError_t result = cudaStreamQuery(ownStream_);
  if (result == cudaErrorNotReady) {
    static_cast<void>(cudaGetLastError());
    return;
  }
  cudaTry(result, fmt::format("work on cuda device {} failed", index()));
}

}  // namespace

int cudaDeviceCount() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return 0;
  }
  return count;
}

std::shared_ptr<Device> makeCudaDevice(int index) {
  int count = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);
  if (result != cudaSuccess) static_cast<void>(cudaGetLastError());
  const std::string why = whyNoDevice(result, count);
  check(why.empty(), ErrorCode::unsupported, "cuda device {}: {}", index, why);
  check(index >= 0 && index < count, ErrorCode::invalidArgument,
        "cuda device {}: {} are visible, indices are 0 to {}", index, count, count - 1);
  return std::make_shared<CudaDevice>(index);
}

}  // namespace mscclpp::detail
