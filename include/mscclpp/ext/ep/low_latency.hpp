#pragma once

#include <functional>
#include <memory>

#include <mscclpp/ext/ep/types.hpp>
#include <mscclpp/platform.hpp>

/// Requests and results of the low-latency calls of Buffer. A call runs on the caller's own stream
/// unless it has asyncFinish, previousEvent or allocateOnCommStream, and then on the Buffer's. The
/// stream must live until the Buffer has been used with another one, or is destroyed. All ranks
/// make them alike: equal maxTokens, hidden, top-k, experts and options; token counts may differ.
namespace mscclpp::ep {

struct LowLatencyHandleState;

/// Where a low-latency dispatch put its rows: what the combine needs. Cheap to copy; belongs to the
/// Buffer that made it.
class LowLatencyHandle {
 public:
  LowLatencyHandle() = default;
  explicit LowLatencyHandle(std::shared_ptr<const LowLatencyHandleState> state)
      : state_(std::move(state)) {}
  explicit operator bool() const { return state_ != nullptr; }
  const LowLatencyHandleState* operator->() const { return state_.get(); }

  Tensor sourceInfo() const;   ///< i32 [local experts, ranks * maxTokens]: the source's token
  Tensor layoutRange() const;  ///< i64 [local experts, ranks]: first row << 32 | rows
  int maxTokens() const;
  int hidden() const;
  int experts() const;

 private:
  std::shared_ptr<const LowLatencyHandleState> state_;
};

/// The second half of a call whose halves are apart. Callable once, before the Buffer's third call
/// of that kind. Enqueues the receive half; afterwards `computeStream` waits for it.
using ReceiveHook = std::function<void(void* computeStream)>;

struct LowLatencyDispatchRequest {
  Tensor x;  ///< bf16 [tokens, hidden], hidden a multiple of 8 up to 131072
  /// i64 [tokens, topk], topk up to 32; -1 = no selection. A row may name an expert again as long
  /// as every expert gets ranks * maxTokens rows at most; more than that is an error of its rank's.
  Tensor topkIdx;
  int maxTokens = 0;        ///< of any rank, up to 4096; equal on all ranks
  int experts = 0;          ///< of all ranks; rank r hosts those from r * ceil(experts / ranks) on
  bool useFp8 = true;       ///< rows arrive as e4m3 with f32 scales per 128 values
  bool roundScale = false;  ///< scales are powers of two
  bool useUe8m0 = false;    ///< with roundScale: scales arrive as their exponents, 4 to an i32
  bool returnRecvHook = false;
  Tensor expertTotals;  ///< optional i32 [local experts]: received rows are added
  Tensor waitTotals;  ///< optional i64 [ranks], or [ranks, ranks] of which this rank's row is used:
                      ///< nanoseconds spent waiting for each rank are added
  int numSms = 0;     ///< blocks at most; 0 = one per multiprocessor
  /// Optional i64 [8], for measurements between nodes: moments in nanoseconds of the device's
  /// clock. Entered; ids, weights, sums written; the same arrived; left. Those that exist are
  /// written.
  Tensor times;

  /// Outputs that the caller brings; absent ones are allocated. A captured graph needs all of them.
  struct Outputs {
    Tensor recvX;        ///< see LowLatencyDispatchResult
    Tensor recvXScales;  ///< [.., .., ..] as stored, see LowLatencyDispatchResult
    Tensor recvCount;
    Tensor sourceInfo;
    Tensor layoutRange;
    Tensor slots;         ///< i32 [ranks, maxTokens, topk], the handle's own
    Tensor sourceTokens;  ///< i32 [ranks], the handle's own
    Tensor rowTable;      ///< i32 [2, ranks, maxTokens + 2], the handle's own
  } outputs;
  StreamOrder order;
};

struct LowLatencyDispatchResult {
  Tensor recvX;  ///< e4m3 or bf16 [local experts, ranks * maxTokens, hidden]; see recvCount
  /// f32 [local experts, ceil(hidden / 128), ranks * maxTokens], or with useUe8m0 i32
  /// [local experts, ceil(hidden / 512), ranks * maxTokens]: rows are the last dimension.
  Tensor recvXScales;
  Tensor recvCount;  ///< i32 [local experts]: rows that are defined, by source and token
  LowLatencyHandle handle;
  Event event;       ///< after the call, or after its send half; null unless asyncFinish
  ReceiveHook hook;  ///< only with returnRecvHook
};

/// Where the rows of a token are multiplied with their weights and added.
enum class LowLatencyReduce {
  /// On the ranks of the experts, which send one bf16 row per token that they have rows of: the
  /// fewest bytes. Each such sum is rounded to bf16 once.
  rank,
  /// At the token's home, to which every selection's row is sent: rounded only at the end. The
  /// least there is to wait for.
  source,
};

struct LowLatencyCombineRequest {
  Tensor x;            ///< bf16 [local experts, ranks * maxTokens, hidden]: the experts' output
  Tensor topkIdx;      ///< i64 [tokens, topk], as dispatched
  Tensor topkWeights;  ///< f32 [tokens, topk]
  LowLatencyHandle handle;
  /// Sums travel as 10-bit logarithmic values instead of bf16: 5/8 of the bytes, less exact, see
  /// docs/low_latency.md. All ranks alike.
  bool useLogfmt = false;
  /// Equal on all ranks; may change from call to call. With `source` the hook reads topkWeights
  /// again, as it always does topkIdx.
  LowLatencyReduce reduce = LowLatencyReduce::rank;
  bool returnRecvHook = false;
  Tensor waitTotals;  ///< as in the dispatch
  int numSms = 0;
  Tensor times;  ///< as in the dispatch
  Tensor out;    ///< optional bf16 [tokens, hidden], written by the call
  StreamOrder order;
};

struct LowLatencyCombineResult {
  Tensor x;     ///< bf16 [tokens, hidden]: sum of weight * row over the selections
  Event event;  ///< as in the dispatch
  ReceiveHook hook;
};

/// What else the size of a region depends on. The defaults are enough for LowLatencyReduce::rank.
struct LowLatencySizeOptions {
  LowLatencyReduce reduce = LowLatencyReduce::rank;
  int topk = 32;            ///< of any call, 1 .. 32
  bool spansNodes = false;  ///< some ranks are on another node; matters to LowLatencyReduce::source
};
/// Bytes for BufferOptions::numRdmaBytes, so that low-latency calls of this size fit: per rank and
/// direction two areas (odd and even calls). With LowLatencyReduce::rank they hold maxTokens rows
/// per rank, and the ids or weights; does not grow with the experts. With `source` an area holds a
/// row per selection of maxTokens tokens, if that is more; between nodes, since the outbox is as
/// large, maxTokens rows per rank and selection that a token may have there: the smaller of topk
/// and ceil(experts / ranks). A Buffer that reduces in both ways needs the larger of both sizes.
std::size_t lowLatencySizeHint(int maxTokens, int hidden, int ranks, int experts,
                               const LowLatencySizeOptions& options = {});
/// The same in words and figures.
std::string describeLowLatencySize(int maxTokens, int hidden, int ranks, int experts,
                                   const LowLatencySizeOptions& options = {});

}  // namespace mscclpp::ep
