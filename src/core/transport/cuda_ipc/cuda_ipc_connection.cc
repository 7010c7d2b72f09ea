#include "core/transport/cuda_ipc/cuda_ipc_connection.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include <mscclpp/errors.hpp>

#include "core/platform/cuda_check.hpp"

namespace mscclpp::transport {

using detail::cudaLog;
using detail::cudaTry;

namespace {

/// Copies per call of the driver; more at once keep the copy engine waiting for the whole list.
constexpr size_t kBatch = 64;
/// Gathered bytes that do not wait for more: 20 us of the wire, beside the 10 us of CPU that a call
/// for them costs.
constexpr size_t kBatchBytes = 8 << 20;

char* addressIn(const RemoteMemory* memory, uint64_t offset) {
  return static_cast<const MappedIpcMemory*>(memory)->data() + offset;
}

uint64_t* wordIn(const RemoteMemory* memory, uint64_t offset) {
  return reinterpret_cast<uint64_t*>(addressIn(memory, offset));
}

cudaStream_t native(const Stream& stream) {
  return static_cast<cudaStream_t>(stream.native());
}

}  // namespace

NumberTable::NumberTable(const std::shared_ptr<Device>& device)
    : memory_(device->allocateExportable(kNumbers * sizeof(uint16_t))) {
  const auto host = device->allocatePinned(kNumbers * sizeof(uint16_t));
  for (uint64_t i = 0; i < kNumbers; ++i) {
    static_cast<uint16_t*>(host.get())[i] = static_cast<uint16_t>(i);
  }
  device->copyNow(memory_.get(), host.get(), kNumbers * sizeof(uint16_t));
}

CudaIpcConnection::CudaIpcConnection(std::shared_ptr<Endpoint> endpoint,
                                     std::shared_ptr<Stream> stream,
                                     std::shared_ptr<const NumberTable> numbers, int peer)
    : Connection(Transport::cudaIpc, peer),
      endpoint_(std::move(endpoint)),
      process_(endpoint_->options().rank),
      depth_(static_cast<uint64_t>(endpoint_->options().queueDepth)),
      stream_(std::move(stream)),
      numbers_(std::move(numbers)),
      values_(endpoint_->device()->allocatePinned((depth_ + 1) * sizeof(uint64_t))) {}

CudaIpcConnection::~CudaIpcConnection() {
  runNoThrow("closing a cuda_ipc connection", [&] {
    const DeviceScope scope(*endpoint_->device());
    stream_->synchronize();  // the copies read memory that may go with this object
    for (const Step& step : steps_) {
      if (step.event != nullptr) cudaLog(cudaEventDestroy(step.event), "cudaEventDestroy");
    }
    for (cudaEvent_t event : freeEvents_) cudaLog(cudaEventDestroy(event), "cudaEventDestroy");
  });
}

std::string CudaIpcConnection::describe() const {
  return fmt::format("rank {} to rank {}: cuda_ipc, copy engine of {}", endpoint_->options().rank,
                     peer(), endpoint_->device()->describe());
}

std::vector<std::byte> CudaIpcConnection::address() const {
  const PeerProcess::Address own = process_.address();
  std::vector<std::byte> bytes(sizeof(own));
  std::memcpy(bytes.data(), &own, sizeof(own));
  return bytes;
}

void CudaIpcConnection::connect(std::span<const std::byte> theirs) {
  PeerProcess::Address address;
  check(theirs.size() == sizeof(address), ErrorCode::invalidArgument,
        "cuda_ipc: an address has {} bytes, not {}: did the peer open another transport?",
        sizeof(address), theirs.size());
  std::memcpy(&address, theirs.data(), sizeof(address));
  process_.connect(address);
}

std::shared_ptr<RemoteMemory> CudaIpcConnection::importMemory(
    std::span<const std::byte> description) {
  MemoryHandle handle{};
  check(description.size() == sizeof(handle), ErrorCode::invalidArgument,
        "cuda_ipc: a memory is described by {} bytes, not {}", sizeof(handle), description.size());
  std::memcpy(&handle, description.data(), sizeof(handle));
  const auto& device = endpoint_->device();
  if (handle.platform == static_cast<uint32_t>(Platform::cuda)) {
    return std::make_shared<MappedIpcMemory>(device->importMemory(handle), handle.bytes, true);
  }
  // Registered, so that the copy engine can write there as well as this CPU.
  const auto cpu = Device::open(Platform::cpu);
  return std::make_shared<MappedIpcMemory>(
      device->registerHost(cpu->importMemory(handle), handle.bytes), handle.bytes, false);
}

template <class F>
void CudaIpcConnection::guarded(F&& action) {
  try {
    const DeviceScope scope(*endpoint_->device());
    action();
  } catch (const std::exception& error) {
    fail(error.what());
  }
}

/// An operation that is done already is complete in its turn.
void CudaIpcConnection::noteDone() {
  if (quiet()) {
    completed_ = posted();
  } else if (sources_.empty()) {
    steps_.back().upTo = posted();
  }  // else what comes behind the gathered copies counts it
}

void CudaIpcConnection::doWrite(const Write& write) {
  char* const destination = addressIn(write.remote, write.remoteOffset);
  char* const source = write.local->memory().data() + write.localOffset;
  if (write.bytes == 0) return noteDone();
  if (!write.remote->onDevice() && !write.local->onDevice()) {
    std::memmove(destination, source, write.bytes);
    return noteDone();
  }
  // The driver's work is per copy. Memories that happen to lie side by side stay apart.
  if (!sizes_.empty() && last_.local == write.local && last_.remote == write.remote &&
      last_.localOffset + last_.bytes == write.localOffset &&
      last_.remoteOffset + last_.bytes == write.remoteOffset) {
    sizes_.back() += write.bytes;
  } else {
    destinations_.push_back(destination);
    sources_.push_back(source);
    sizes_.push_back(write.bytes);
  }
  last_ = write;
  gatheredBytes_ += write.bytes;
  if (gatheredBytes_ < kBatchBytes) return;
  submit();
  progress();  // a caller that posts a lot does not come to that soon
}

void CudaIpcConnection::copyGathered() {
  for (size_t first = 0; first < sources_.size(); first += kBatch) {
    copyBatch(first, std::min(kBatch, sources_.size() - first));
  }
  destinations_.clear();
  sources_.clear();
  sizes_.clear();
  gatheredBytes_ = 0;
}

void CudaIpcConnection::copyBatch(size_t first, size_t count) {
#if CUDART_VERSION >= 13000
  if (count > 1) {
    cudaMemcpyAttributes attributes{};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
    size_t attributesFrom = 0;
    return cudaTry(cudaMemcpyBatchAsync(destinations_.data() + first, sources_.data() + first,
                                        sizes_.data() + first, count, &attributes, &attributesFrom,
                                        1, native(*stream_)),
                   "cudaMemcpyBatchAsync to a peer");
  }
#endif
  for (size_t i = first; i < first + count; ++i) {
    cudaTry(cudaMemcpyAsync(destinations_[i], sources_[i], sizes_[i], cudaMemcpyDefault,
                            native(*stream_)),
            "cudaMemcpyAsync to a peer");
  }
}

cudaEvent_t CudaIpcConnection::takeEvent() {
  if (!freeEvents_.empty()) {
    cudaEvent_t event = freeEvents_.back();
    freeEvents_.pop_back();
    return event;
  }
  cudaEvent_t event = nullptr;
  cudaTry(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  return event;
}

void CudaIpcConnection::recordEvent() {
  const cudaEvent_t event = takeEvent();
  const bool alone = behindGathered_.empty();
  steps_.push_back(
      {Step::Kind::copies, alone ? posted() : behindGathered_.front().upTo - 1, event, nullptr, 0});
  cudaTry(cudaEventRecord(event, native(*stream_)), "cudaEventRecord");
  if (alone) return;
  behindGathered_.back().upTo = posted();  // later copies of the batch are complete by then
  steps_.insert(steps_.end(), behindGathered_.begin(), behindGathered_.end());
  hostSteps_ += behindGathered_.size();
  behindGathered_.clear();
}

void CudaIpcConnection::submit() {
  if (sources_.empty() || failed()) return;
  guarded([&] {
    copyGathered();
    recordEvent();
  });
}

void CudaIpcConnection::apply(const Step& step) {
  if (step.kind == Step::Kind::add) {
    __atomic_fetch_add(step.word, step.value, __ATOMIC_ACQ_REL);
  } else {
    __atomic_store_n(step.word, step.value, __ATOMIC_RELEASE);
  }
}

/// At once when nothing is under way, else behind it.
void CudaIpcConnection::onHost(Step::Kind kind, uint64_t* word, uint64_t value) {
  const Step step{kind, posted(), nullptr, word, value};
  if (!sources_.empty()) return behindGathered_.push_back(step);
  if (!steps_.empty()) {
    ++hostSteps_;
    return steps_.push_back(step);
  }
  apply(step);
  completed_ = posted();
}

void CudaIpcConnection::doAdd(const Add& add) {
  onHost(Step::Kind::add, wordIn(add.remote, add.offset), static_cast<uint64_t>(add.value));
}

/// Sets the peer's word to `count`. Now and then the high part changes too: the low part goes
/// first, so that the word is too small for a moment, never too large.
void CudaIpcConnection::copySignal(char* word, uint64_t count) {
  constexpr size_t kLow = sizeof(uint16_t);
  cudaTry(cudaMemcpyAsync(word, numbers_->find(count), kLow, cudaMemcpyDefault, native(*stream_)),
          "cudaMemcpyAsync of a signal");
  if (count % NumberTable::kNumbers != 0) return;
  uint64_t* const value = static_cast<uint64_t*>(values_.get()) + posted() % (depth_ + 1);
  *value = count;
  cudaTry(cudaMemcpyAsync(word + kLow, reinterpret_cast<const char*>(value) + kLow,
                          sizeof(count) - kLow, cudaMemcpyDefault, native(*stream_)),
          "cudaMemcpyAsync of a signal's high part");
}

void CudaIpcConnection::doSignal(SignalTarget& target) {
  // A signal may not pass an add or signal that waits for the copies; behind copies alone the
  // stream carries it, which spares the way back to this thread.
  const bool copiesOnly =
      behindGathered_.empty() && (steps_.empty() || steps_.back().kind == Step::Kind::copies);
  if (quiet() || !copiesOnly || target.device == nullptr) {
    return onHost(Step::Kind::store, wordIn(target.host, target.hostOffset), ++target.sentToHost);
  }
  guarded([&] {
    if (!sources_.empty()) copyGathered();
    copySignal(addressIn(target.device, target.deviceOffset), ++target.sentToDevice);
    recordEvent();
  });
}

bool CudaIpcConnection::finishSteps() {
  bool worked = false;
  while (!steps_.empty()) {
    const Step step = steps_.front();
    if (step.kind == Step::Kind::copies) {
      const cudaError_t result = cudaEventQuery(step.event);
      if (result == cudaErrorNotReady) {
        static_cast<void>(cudaGetLastError());
        break;
      }
      cudaTry(result, "a copy to a peer");
      freeEvents_.push_back(step.event);
    } else {
      apply(step);
      --hostSteps_;
    }
    completed_ = step.upTo;
    steps_.pop_front();
    worked = true;
  }
  if (steps_.empty()) asked_ = false;
  return worked;
}

void CudaIpcConnection::checkPeer() {
  const std::string death = process_.death();
  if (!death.empty()) fail(death);
}

bool CudaIpcConnection::progress() {
  if (failed()) return false;
  checkPeer();
  if (steps_.empty() || failed()) return false;
  const bool fillingUp = posted() - completed_ > depth_ / 2;
  if (!asked_ && !fillingUp && hostSteps_ == 0) return false;
  bool worked = false;
  guarded([&] { worked = finishSteps(); });
  return worked;
}

}  // namespace mscclpp::transport
