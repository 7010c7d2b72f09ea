#include "ep/harness.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <thread>

#include <mscclpp/errors.hpp>

namespace mscclpp::ep::testing {

Platform testPlatform() {
  static const Platform platform = [] {
    const char* name = std::getenv("MSCCLPP_TEST_PLATFORM");
    return name != nullptr && *name != '\0' ? parsePlatform(name) : Platform::cpu;
  }();
  return platform;
}

int deviceOf(int rank) {
  static const int devices = std::max(Device::count(testPlatform()), 1);
  return rank % devices;
}

bool underSanitizer() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return true;
#elif defined(__has_feature)
  return __has_feature(address_sanitizer) || __has_feature(thread_sanitizer);
#else
  return false;
#endif
}

BufferOptions testOptions(std::size_t numNvlBytes) {
  BufferOptions options;
  options.platform = testPlatform();
  options.numNvlBytes = numNvlBytes;
  options.timeoutSeconds = underSanitizer() ? 60 : 20;
  return options;
}

std::shared_ptr<Bootstrap> Meeting::bootstrap(int rank) {
  return std::make_shared<CallbackBootstrap>(
      rank, ranks_, [this, rank](void* data, std::size_t bytes) { allGather(rank, data, bytes); });
}

void Meeting::abort(const std::string& reason) {
  const std::lock_guard lock(mutex_);
  if (aborted_.empty()) aborted_ = reason;
  changed_.notify_all();
}

void Meeting::allGather(int rank, void* data, std::size_t bytesPerRank) {
  std::unique_lock lock(mutex_);
  const auto checkAborted = [&] {
    if (!aborted_.empty()) throw Error(ErrorCode::peerFailure, "another rank failed: " + aborted_);
  };
  checkAborted();
  const std::size_t at = static_cast<std::size_t>(rank) * bytesPerRank;
  if (arrived_ == 0) shared_.assign(static_cast<std::size_t>(ranks_) * bytesPerRank, 0);
  std::memcpy(shared_.data() + at, static_cast<char*>(data) + at, bytesPerRank);
  // Everybody arrives, then everybody leaves with the data; the last one out opens the next round.
  const auto phase = [&] {
    const unsigned mine = generation_;
    if (++arrived_ == ranks_) {
      arrived_ = 0;
      ++generation_;
      changed_.notify_all();
      return;
    }
    const bool in = changed_.wait_for(lock, std::chrono::seconds(60),
                                      [&] { return generation_ != mine || !aborted_.empty(); });
    if (generation_ == mine) checkAborted();
    check(in, ErrorCode::timeout, "rank {} met {} of {} ranks within 60 s", rank, arrived_, ranks_);
  };
  phase();
  std::memcpy(data, shared_.data(), shared_.size());
  phase();
}

RankContext::RankContext(std::shared_ptr<Bootstrap> bootstrap, BufferOptions options)
    : rank_(bootstrap->rank()), ranks_(bootstrap->size()) {
  if (options.deviceIndex == 0) options.deviceIndex = deviceOf(rank_);
  device_ = Device::open(options.platform, options.deviceIndex);
  // Tensors may outlive this object: their owners keep the stream.
  compute_ = std::make_shared<Stream>(device_->createStream(false, rank_));
  if (options.platform == Platform::cuda) pinned_ = device_->allocatePinned(kPinnedBytes);
  buffer_ = std::make_unique<Buffer>(std::move(bootstrap), options);
}

RankContext::~RankContext() {
  expertMaps_.clear();
  buffer_.reset();
  try {
    compute_->synchronize();  // copies may still read sent_
  } catch (const std::exception& error) {
    std::fprintf(stderr, "rank %d: %s\n", rank_, error.what());
  }
}

StreamOrder RankContext::order() const {
  StreamOrder order;
  order.computeStream = compute_->native();
  return order;
}

Tensor RankContext::empty(DType dtype, std::vector<std::int64_t> shape) {
  Tensor tensor;
  tensor.present = true;
  tensor.dtype = dtype;
  tensor.shape = std::move(shape);
  tensor.platform = device_->platform();
  tensor.deviceIndex = device_->index();
  tensor.data = device_->allocate(tensor.bytes(), *compute_);
  tensor.owner = std::shared_ptr<void>(
      tensor.data, [device = device_, stream = compute_](void* p) { device->release(p, *stream); });
  device_->fill(tensor.data, 0xEE, tensor.bytes(), *compute_);
  return tensor;
}

void RankContext::copyIn(const Tensor& tensor, const void* values, std::size_t bytes) {
  check(bytes == tensor.bytes(), ErrorCode::invalidArgument, "{} takes {} bytes, not {}",
        tensor.describe(), tensor.bytes(), bytes);
  if (bytes == 0) return;
  if (pinned_) {
    const std::size_t taken = (bytes + 255) / 256 * 256;
    if (pinnedUsed_ + taken > kPinnedBytes) sync();
    if (taken <= kPinnedBytes) {
      char* at = static_cast<char*>(pinned_.get()) + pinnedUsed_;
      pinnedUsed_ += taken;
      std::memcpy(at, values, bytes);
      device_->copy(tensor.data, at, bytes, *compute_);
      return;
    }
  }
  const std::shared_ptr<char[]> kept(new char[bytes]);
  std::memcpy(kept.get(), values, bytes);
  sent_.emplace_back(kept, kept.get());
  device_->copy(tensor.data, kept.get(), bytes, *compute_);
}

void RankContext::copyOut(const Tensor& tensor, void* values) {
  sync();
  if (tensor.bytes() == 0) return;
  if (device_->platform() == Platform::cpu) {
    std::memcpy(values, tensor.data, tensor.bytes());
  } else {
    device_->copy(values, tensor.data, tensor.bytes(), *compute_);
    compute_->synchronize();
  }
}

void RankContext::sync() {
  compute_->synchronize();
  sent_.clear();
  pinnedUsed_ = 0;
}

void RankContext::poisonPool() {
  const auto bytes = static_cast<std::int64_t>(buffer_->poolBytesFree() / 256 * 256);
  const Tensor all = buffer_->createTensor(DType::u8, {bytes}, compute_->native());
  check(buffer_->inPool(all), ErrorCode::internal, "the free pool is not in one piece");
  device_->fill(all.data, 0xCD, all.bytes(), *compute_);
}

ExpertMap RankContext::expertMap(const std::vector<int>& rankOfExpert) {
  ExpertMap& map = expertMaps_[rankOfExpert];
  if (!map) map = buffer_->createExpertMap(rankOfExpert);
  return map;
}

namespace {

std::string textOf(const std::exception& error) {
  const auto* ours = dynamic_cast<const Error*>(&error);
  return (ours ? std::string(toString(ours->code())) : std::string("exception")) + ": " +
         error.what();
}

}  // namespace

std::string errorOf(const std::function<void()>& action) {
  try {
    action();
    return "";
  } catch (const std::exception& error) {
    return textOf(error);
  }
}

std::vector<std::string> tryRanks(int ranks,
                                  const std::function<BufferOptions(int rank)>& optionsOf,
                                  const RankFunction& function) {
  Meeting meeting(ranks);
  std::vector<std::string> errors(static_cast<std::size_t>(ranks));
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; ++r) {
    threads.emplace_back([&, r] {
      const ::testing::ScopedTrace trace(__FILE__, __LINE__, "rank " + std::to_string(r));
      std::string& mine = errors[static_cast<std::size_t>(r)];
      mine = errorOf([&] {
        RankContext context(meeting.bootstrap(r), optionsOf(r));
        function(context);
        context.sync();
        context.buffer().destroy();
      });
      if (!mine.empty()) meeting.abort("rank " + std::to_string(r) + ": " + mine);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return errors;
}

void runRanks(int ranks, const BufferOptions& options, const RankFunction& function) {
  const auto errors = tryRanks(
      ranks, [&](int) { return options; }, function);
  for (int r = 0; r < ranks; ++r) {
    const std::string& error = errors[static_cast<std::size_t>(r)];
    if (!error.empty()) ADD_FAILURE() << "rank " << r << ": " << error;
  }
}

}  // namespace mscclpp::ep::testing
