#pragma once

#include <condition_variable>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <mscclpp/ext/ep/buffer.hpp>
#include <mscclpp/platform.hpp>

/// Groups of ranks inside a test: every rank is a thread with a Buffer of its own.
namespace mscclpp::ep::testing {

/// What the tests run on: MSCCLPP_TEST_PLATFORM, or --platform=cpu|cuda; cpu by default.
Platform testPlatform();
/// Ranks are dealt out to the devices there are.
int deviceOf(int rank);
/// Built with ThreadSanitizer or AddressSanitizer, which cost time.
bool underSanitizer();

/// Small heap, limits short enough that a hang fails the test rather than the whole run.
BufferOptions testOptions(std::size_t numNvlBytes = std::size_t{8} << 20);

/// Bootstrap of threads of one process. When one rank fails, the others come out with an error.
class Meeting {
 public:
  explicit Meeting(int ranks) : ranks_(ranks) {}
  std::shared_ptr<Bootstrap> bootstrap(int rank);
  /// Everybody who waits here, now or later, gets an error with this reason.
  void abort(const std::string& reason);

 private:
  void allGather(int rank, void* data, std::size_t bytesPerRank);

  const int ranks_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int arrived_ = 0;
  unsigned generation_ = 0;
  std::vector<char> shared_;
  std::string aborted_;
};

/// One rank in a test: its Buffer, a stream that plays the caller's compute stream, and tensors.
class RankContext {
 public:
  /// Collective: makes the Buffer.
  RankContext(std::shared_ptr<Bootstrap> bootstrap, BufferOptions options);
  ~RankContext();

  int rank() const { return rank_; }
  int ranks() const { return ranks_; }
  Buffer& buffer() { return *buffer_; }
  Device& device() { return *device_; }
  Stream& compute() { return *compute_; }
  StreamOrder order() const;

  /// An ordinary tensor full of 0xEE.
  Tensor empty(DType dtype, std::vector<std::int64_t> shape);
  /// A tensor with these values; the copy is enqueued on compute().
  template <class T>
  Tensor upload(DType dtype, std::vector<std::int64_t> shape, const std::vector<T>& values) {
    Tensor tensor = empty(dtype, std::move(shape));
    uploadTo(tensor, values);
    return tensor;
  }
  template <class T>
  void uploadTo(const Tensor& tensor, const std::vector<T>& values) {
    copyIn(tensor, values.data(), values.size() * sizeof(T));
  }
  /// Waits for compute() and reads the tensor. In manual mode: after the run.
  template <class T>
  std::vector<T> download(const Tensor& tensor) {
    std::vector<T> values(tensor.bytes() / sizeof(T));
    copyOut(tensor, values.data());
    return values;
  }
  /// Waits for compute(). By then it has waited for all communication, unless that was
  /// asynchronous.
  void sync();
  /// Fills the whole free pool with 0xCD bytes.
  void poisonPool();
  /// The explicit map with these hosts, made at the first call (which blocks) and kept.
  ExpertMap expertMap(const std::vector<int>& rankOfExpert);

 private:
  void copyIn(const Tensor& tensor, const void* values, std::size_t bytes);
  void copyOut(const Tensor& tensor, void* values);

  int rank_;
  int ranks_;
  std::shared_ptr<Device> device_;
  std::shared_ptr<Stream> compute_;
  std::vector<std::shared_ptr<void>> sent_;  ///< host memory that copies may still read
  /// CUDA: inputs go through here. A pageable copy that is queued behind a pending kernel blocks
  /// inside the driver, and with it the other ranks that share the GPU, for whom that kernel waits.
  static constexpr std::size_t kPinnedBytes = std::size_t{16} << 20;
  std::shared_ptr<void> pinned_;
  std::size_t pinnedUsed_ = 0;
  std::unique_ptr<Buffer> buffer_;
  std::map<std::vector<int>, ExpertMap> expertMaps_;
};

using RankFunction = std::function<void(RankContext&)>;

/// Runs `function` once per rank, each in a thread, and destroys the Buffers. What a rank throws is
/// a failure of the test that names the rank.
void runRanks(int ranks, const BufferOptions& options, const RankFunction& function);

/// The same without expectations: one text per rank, empty where nothing was thrown.
/// `optionsOf`: the options of each rank. Buffers are not destroyed when some rank failed.
std::vector<std::string> tryRanks(int ranks,
                                  const std::function<BufferOptions(int rank)>& optionsOf,
                                  const RankFunction& function);

/// "invalidArgument: the message" of what `action` throws, or "" when it does not.
std::string errorOf(const std::function<void()>& action);

/// Rows are equal, else a failure that says where the first difference is and how many there are.
/// `columns`: values per row.
template <class T>
void expectSame(const std::string& what, const std::vector<T>& expected,
                const std::vector<T>& actual, std::size_t columns = 1) {
  ASSERT_EQ(expected.size(), actual.size()) << what << ": number of values";
  if (expected.empty() ||
      std::memcmp(expected.data(), actual.data(), expected.size() * sizeof(T)) == 0) {
    return;
  }
  std::size_t first = expected.size(), different = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (std::memcmp(&expected[i], &actual[i], sizeof(T)) == 0) continue;
    if (different++ == 0) first = i;
  }
  ADD_FAILURE() << what << ": " << different << " of " << expected.size()
                << " values differ; the first in row " << first / columns << ", column "
                << first % columns << ": " << +actual[first] << " instead of " << +expected[first];
}

}  // namespace mscclpp::ep::testing
