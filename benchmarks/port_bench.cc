// Micro-benchmarks of port channels: triggers per second, latencies, bandwidth, each beside the
// bare transport of the same run. `port_bench --help` lists Google Benchmark's options.
#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include <benchmark/benchmark.h>

#include <mscclpp/errors.hpp>

#include "core/port_suite.hpp"
#include "port_bench_bare.hpp"
#include "port_bench_kernels.hpp"

namespace mscclpp::bench {

namespace {

using test::PortRank;
using test::PortSetup;

constexpr uint64_t kLimitNs = 20'000'000'000;
constexpr uint64_t kLargest = uint64_t{16} << 20;

/// Counts and forgets: what is left is the FIFO and the proxy.
class CountingConnection final : public Connection {
 public:
  CountingConnection() : Connection(Transport::shm, 0) {}

  void expect(uint64_t operations) { expected_ = posted() + operations; }
  double seconds() const { return std::chrono::duration<double>(last_ - first_).count(); }

  ConnectionCapabilities capabilities() const noexcept override { return {}; }
  std::string describe() const override { return "counts"; }
  std::vector<std::byte> address() const override { return {}; }
  void connect(std::span<const std::byte>) override {}
  std::shared_ptr<RemoteMemory> importMemory(std::span<const std::byte>) override {
    return std::make_shared<RemoteMemory>(64, false);
  }
  bool canPost() const override { return true; }
  bool progress() override { return false; }
  uint64_t completed() const noexcept override { return posted(); }

 private:
  void doWrite(const Write&) override { count(); }
  void doAdd(const Add&) override { count(); }
  void count() {
    if (!std::exchange(started_, true)) first_ = std::chrono::steady_clock::now();
    if (posted() != expected_) return;
    last_ = std::chrono::steady_clock::now();
    started_ = false;
  }

  uint64_t expected_ = 0;
  bool started_ = false;
  std::chrono::steady_clock::time_point first_;
  std::chrono::steady_clock::time_point last_;
};

struct Shape {
  int blocks;
  int threads;
  bool fifoPerBlock;
  bool relaxed;
};

void triggers(benchmark::State& state, Platform platform, const Shape& shape) {
  const auto device = Device::open(platform);
  const auto connection = std::make_shared<CountingConnection>();
  ProxyService service(device);
  PushArgs args{};
  std::vector<PortChannel> channels;
  for (int block = 0; block < shape.blocks; ++block) {
    channels.push_back(service.createChannel({.connection = connection,
                                              .semaphore = {},
                                              .local = nullptr,
                                              .remote = nullptr,
                                              .counters = connection->importMemory({}),
                                              .fifo = shape.fifoPerBlock ? block : 0}));
    args.channels[block] = channels.back().deviceHandle();
  }
  const uint64_t all = static_cast<uint64_t>(shape.blocks) * static_cast<uint64_t>(shape.threads);
  const uint64_t total = platform == Platform::cuda ? 400'000 : 20'000;
  args.control = {nullptr, kLimitNs, 0};
  args.perThread = static_cast<uint32_t>(std::max<uint64_t>(total / all, 1));
  args.relaxed = shape.relaxed ? 1 : 0;
  prepareKernels(*device);
  Stream stream = device->createStream();
  const uint64_t count = args.perThread * all;
  for (auto _ : state) {
    connection->expect(count);
    service.start();
    launchPush(*device, stream, static_cast<unsigned>(shape.blocks),
               static_cast<unsigned>(shape.threads), args);
    stream.synchronize();
    service.stop();
    state.SetIterationTime(connection->seconds());
  }
  state.SetItemsProcessed(static_cast<int64_t>(count) * state.iterations());
}

/// How fast a proxy thread takes triggers that are there already.
void draining(benchmark::State& state, Platform platform) {
  constexpr int kDepth = 1 << 19;
  constexpr uint32_t kTriggers = 400'000;
  const auto device = Device::open(platform);
  const auto connection = std::make_shared<CountingConnection>();
  ProxyService service(device, {.fifoDepth = kDepth});
  const PortChannel channel = service.createChannel({.connection = connection,
                                                     .semaphore = {},
                                                     .local = nullptr,
                                                     .remote = nullptr,
                                                     .counters = connection->importMemory({})});
  PushArgs args{};
  args.channels[0] = channel.deviceHandle();
  args.control = {nullptr, kLimitNs, 0};
  args.perThread = kTriggers / kMaxThreads;
  args.relaxed = 1;
  prepareKernels(*device);
  Stream stream = device->createStream();
  for (auto _ : state) {
    connection->expect(kTriggers);
    launchPush(*device, stream, 1, kMaxThreads, args);
    stream.synchronize();
    service.start();
    service.stop();
    state.SetIterationTime(connection->seconds());
  }
  state.SetItemsProcessed(int64_t{kTriggers} * state.iterations());
}

/// Two ranks, as threads while they are set up, both driven by the benchmark's thread then.
class Pair {
 public:
  Pair(Platform platform, Transport transport) {
    const PortSetup setup{.name = "bench", .platform = platform, .transport = transport};
    const UniqueId id = TcpBootstrap::createUniqueId();
    onBoth([&](size_t rank) {
      groups_[rank] = std::make_unique<TcpBootstrap>(static_cast<int>(rank), 2, id);
      ports_[rank] = std::make_unique<PortRank>(setup, *groups_[rank], 1, 2 * kLargest);
      prepareKernels(ports_[rank]->device());
      ports_[rank]->start();
    });
    times_ = ports_[0]->device().allocatePinned(2 * kRounds * sizeof(uint64_t));
  }
  ~Pair() {
    runNoThrow("ending a benchmark", [&] {
      onBoth([&](size_t rank) { ports_[rank]->stop(); });
      onBoth([&](size_t rank) {
        ports_[rank].reset();
        groups_[rank]->barrier();
      });
    });
  }
  Pair(const Pair&) = delete;
  Pair& operator=(const Pair&) = delete;

  static constexpr uint32_t kRounds = 1000;
  PortRank& rank(size_t i) { return *ports_[i]; }
  uint64_t* times(size_t rank) { return static_cast<uint64_t*>(times_.get()) + rank * kRounds; }
  void synchronize() {
    for (const auto& port : ports_) {
      port->stream().synchronize();
      port->service().checkHealth();
      check(!failurePublished(port->record()), ErrorCode::timeout, "a wait of a benchmark failed");
    }
  }

 private:
  static void onBoth(const std::function<void(size_t)>& action) {
    std::thread other([&] { action(1); });
    action(0);
    other.join();
  }

  std::array<std::unique_ptr<TcpBootstrap>, 2> groups_;
  std::array<std::unique_ptr<PortRank>, 2> ports_;
  std::shared_ptr<void> times_;
};

/// Median and p99 of `rounds` times in ns, divided by `hops`.
void report(benchmark::State& state, const uint64_t* times, uint32_t rounds, double hops) {
  std::vector<uint64_t> sorted(times, times + rounds);
  std::sort(sorted.begin(), sorted.end());
  const double median = static_cast<double>(sorted[rounds / 2]) / hops;
  state.SetIterationTime(median / 1e9);
  state.counters["median_us"] = median / 1e3;
  state.counters["p99_us"] = static_cast<double>(sorted[rounds * 99 / 100]) / hops / 1e3;
}

void latency(benchmark::State& state, Platform platform, Transport transport, uint64_t bytes) {
  Pair pair(platform, transport);
  for (auto _ : state) {
    for (const size_t rank : {0, 1}) {
      PortRank& port = pair.rank(rank);
      launchPing(port.device(), port.stream(),
                 {.channel = port.channel(static_cast<int>(1 - rank)),
                  .control = port.control(kLimitNs),
                  .rounds = Pair::kRounds,
                  .rank = static_cast<uint32_t>(rank),
                  .bytes = bytes,
                  .times = pair.times(rank)});
    }
    pair.synchronize();
    report(state, pair.times(0), Pair::kRounds, 2);
  }
}

void flushing(benchmark::State& state, Platform platform, Transport transport, uint64_t bytes) {
  Pair pair(platform, transport);
  for (auto _ : state) {
    PortRank& port = pair.rank(0);
    launchFlush(port.device(), port.stream(),
                {.channel = port.channel(1),
                 .control = port.control(kLimitNs),
                 .rounds = Pair::kRounds,
                 .reserved = 0,
                 .bytes = bytes,
                 .times = pair.times(0)});
    pair.synchronize();
    report(state, pair.times(0), Pair::kRounds, 1);
  }
}

/// Bytes that take long enough to be timed.
uint64_t budgetOf(Platform platform, Transport transport) {
  if (platform == Platform::cuda) return uint64_t{4} << 30;
  if (transport == Transport::verbs) return uint64_t{1} << 25;  // emulated: megabytes per second
  return uint64_t{1} << (transport == Transport::shm ? 30 : 28);
}

void bandwidth(benchmark::State& state, Platform platform, Transport transport, uint64_t bytes,
               unsigned threads) {
  Pair pair(platform, transport);
  PortRank& port = pair.rank(0);
  const uint64_t wanted = std::clamp<uint64_t>(budgetOf(platform, transport) / bytes, 32, 16384);
  const auto perThread = static_cast<uint32_t>(wanted / threads);
  const uint64_t count = uint64_t{perThread} * threads;
  const auto stream = [&](uint32_t times) {
    launchStream(port.device(), port.stream(),
                 {.channel = port.channel(1),
                  .control = port.control(kLimitNs),
                  .perThread = times,
                  .threads = threads,
                  .bytes = bytes,
                  .times = pair.times(0)});
    pair.synchronize();
  };
  double seconds = 0;
  double bare = 0;
  stream(2);  // touches the memory
  for (auto _ : state) {
    stream(perThread);
    seconds = static_cast<double>(*pair.times(0)) / 1e9;
    state.SetIterationTime(seconds);
    // Right behind: what else the machine does slows both down.
    if (transport == Transport::verbs) continue;  // tools/rxe_vm/bench.py runs perftest beside it
    bare = transport == Transport::tcp
               ? bareSockets(bytes, count)
               : bareCopies(port.device(), pair.rank(1).memory(), port.memory() + bytes, bytes,
                            count, threads == 1 ? 1 : 64);
  }
  state.counters["GB/s"] = static_cast<double>(count * bytes) / seconds / 1e9;
  if (bare > 0) {
    state.counters["bare_GB/s"] = static_cast<double>(count * bytes) / bare / 1e9;
    state.counters["of_bare"] = bare / seconds;
  }
  uint64_t largestRun = 0;
  for (const auto& thread : port.service().statistics()) {
    largestRun = std::max(largestRun, thread.largestRun);
  }
  state.counters["largest_run"] = static_cast<double>(largestRun);
}

/// 64-bit adds, from the launch until all are at the peer.
void adding(benchmark::State& state, Platform platform, Transport transport, unsigned threads) {
  Pair pair(platform, transport);
  PortRank& port = pair.rank(0);
  PushArgs push{};
  push.channels[0] = port.channel(1);
  push.control = port.control(kLimitNs);
  push.perThread = (transport == Transport::verbs ? 8192 : 65536) / threads;
  const FlushArgs flush{.channel = port.channel(1),
                        .control = port.control(kLimitNs),
                        .rounds = 1,
                        .reserved = 0,
                        .bytes = 0,
                        .times = pair.times(0)};
  const uint64_t count = uint64_t{push.perThread} * threads;
  for (auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    launchPush(port.device(), port.stream(), 1, threads, push);
    launchFlush(port.device(), port.stream(), flush);
    pair.synchronize();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    state.SetIterationTime(taken.count());
  }
  state.SetItemsProcessed(static_cast<int64_t>(count) * state.iterations());
}

template <class F>
void add(const std::string& name, F&& body) {
  benchmark::RegisterBenchmark(name.c_str(), std::forward<F>(body))
      ->UseManualTime()
      ->Iterations(1)
      ->ReportAggregatesOnly()
      ->Unit(benchmark::kMicrosecond);
}

void addAll(Platform platform, const std::vector<Transport>& transports) {
  const std::string on(toString(platform));
  add("drain/" + on, [=](benchmark::State& state) { draining(state, platform); });
  for (const bool relaxed : {false, true}) {
    for (const bool own : {false, true}) {
      for (const auto& [blocks, threads] :
           {std::pair{1, 1}, {2, 1}, {4, 1}, {8, 1}, {32, 1}, {1, 32}, {8, 32}}) {
        if (own && blocks == 1) continue;
        const Shape shape{blocks, threads, own, relaxed};
        add(fmt::format("triggers/{}/{}/{}/{}x{}", on, relaxed ? "relaxed" : "release",
                        own ? "fifo_per_block" : "one_fifo", blocks, threads),
            [=](benchmark::State& state) { triggers(state, platform, shape); });
      }
    }
  }
  for (const Transport transport : transports) {
    const std::string over = on + "/" + std::string(toString(transport));
    for (const uint64_t bytes : {0, 7168, 57344, 1048576}) {
      add(fmt::format("{}/{}/{}", bytes == 0 ? "signal" : "put_signal", over, bytes),
          [=](benchmark::State& state) { latency(state, platform, transport, bytes); });
      add(fmt::format("flush/{}/{}", over, bytes),
          [=](benchmark::State& state) { flushing(state, platform, transport, bytes); });
    }
    for (const unsigned threads : {1u, 32u}) {
      add(fmt::format("adds/{}/1x{}", over, threads),
          [=](benchmark::State& state) { adding(state, platform, transport, threads); });
    }
    for (const uint64_t bytes : {7168, 57344, 65536, 262144, 1048576, 4194304}) {
      for (const unsigned threads : {1u, 32u}) {
        add(fmt::format("put/{}/{}/{}", over, threads == 1 ? "singles" : "batches", bytes),
            [=](benchmark::State& state) {
              bandwidth(state, platform, transport, bytes, threads);
            });
      }
    }
  }
}

}  // namespace
}  // namespace mscclpp::bench

int main(int argc, char** argv) {
  using namespace mscclpp;
  std::string repetitions = "--benchmark_repetitions=5";  // what the caller gives comes later
  std::vector<char*> arguments(argv, argv + argc);
  arguments.insert(arguments.begin() + 1, repetitions.data());
  argc = static_cast<int>(arguments.size());
  arguments.push_back(nullptr);
  argv = arguments.data();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
#ifdef MSCCLPP_HAVE_CUDA
  if (Device::count(Platform::cuda) == 0) {
    fmt::print(stderr, "port_bench: built for GPUs, and none is visible\n");
    return 1;
  }
  bench::addAll(Platform::cuda, {Transport::cudaIpc, Transport::tcp});
#else
  std::vector<Transport> transports = {Transport::shm, Transport::tcp};
  try {
    Endpoint::create(Transport::verbs, Device::open(Platform::cpu), {.rank = 0});
    transports.push_back(Transport::verbs);
  } catch (const Error&) {  // no RDMA device here
  }
  bench::addAll(Platform::cpu, transports);
#endif
  return benchmark::RunSpecifiedBenchmarks() > 0 ? 0 : 1;
}
