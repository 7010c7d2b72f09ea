// Runs the program and looks at its exit code and its output, as scripts and people do.

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace {

using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;

struct Ran {
  int code = -1;
  std::string output;  ///< standard output and error together
};

Ran run(const std::string& arguments, const std::string& environment = "") {
  const std::string command =
      fmt::format("{} '{}' {} 2>&1", environment, MSCCLPP_EP_PROGRAM, arguments);
  std::FILE* pipe = popen(command.c_str(), "r");
  Ran ran;
  if (pipe == nullptr) return ran;
  std::array<char, 4096> piece;
  while (const std::size_t got = std::fread(piece.data(), 1, piece.size(), pipe)) {
    ran.output.append(piece.data(), got);
  }
  const int status = pclose(pipe);
  if (WIFEXITED(status)) ran.code = WEXITSTATUS(status);
  return ran;
}

/// A file that disappears with the object.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& content = "") {
    static int count = 0;
    path_ =
        (std::filesystem::temp_directory_path() / fmt::format("cli_tests_{}_{}", getpid(), count++))
            .string();
    std::ofstream(path_) << content;
  }
  ~TemporaryFile() { std::filesystem::remove(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

constexpr const char* kSmall =
    "demo --platform cpu --tokens 24 --hidden 136 --topk 3 --experts 8 --iterations 2";

struct DemoCase {
  int ranks;
  const char* dtype;
  bool processes;
};

class Demo : public ::testing::TestWithParam<DemoCase> {};

TEST_P(Demo, EveryValueIsChecked) {
  const DemoCase& c = GetParam();
  const Ran ran = run(fmt::format("{} --ranks {} --dtype {}{}", kSmall, c.ranks, c.dtype,
                                  c.processes ? " --processes" : ""));
  EXPECT_EQ(ran.code, 0) << ran.output;
  // tokens x hidden x ranks x iterations
  const int values = 24 * 136 * c.ranks * 2;
  EXPECT_THAT(ran.output,
              HasSubstr(fmt::format("OK: {},{:03} values", values / 1000, values % 1000)));
  EXPECT_THAT(ran.output, Not(HasSubstr("FAILED")));
}

INSTANTIATE_TEST_SUITE_P(All, Demo,
                         ::testing::Values(DemoCase{1, "bf16", false}, DemoCase{2, "bf16", false},
                                           DemoCase{4, "bf16", false}, DemoCase{1, "fp8", false},
                                           DemoCase{2, "fp8", false}, DemoCase{4, "fp8", false},
                                           DemoCase{1, "bf16", true}, DemoCase{2, "bf16", true},
                                           DemoCase{4, "fp8", true}),
                         [](const auto& instance) {
                           return fmt::format("{}Ranks_{}_{}", instance.param.ranks,
                                              instance.param.dtype,
                                              instance.param.processes ? "Processes" : "Threads");
                         });

TEST(Demo, RanksPlayNodes) {
  for (const char* nodes : {"--ranks 2 --nodes 2", "--ranks 4 --nodes 2 --dtype fp8",
                            "--ranks 4 --nodes 2 --transport tcp --processes"}) {
    const Ran ran = run(fmt::format("{} {}", kSmall, nodes));
    EXPECT_EQ(ran.code, 0) << ran.output;
    EXPECT_THAT(ran.output, AllOf(HasSubstr("on 2 nodes ("), HasSubstr("OK: ")));
  }
}

TEST(DemoInput, ZeroTokens) {
  for (const char* more : {"", " --dtype fp8", " --processes"}) {
    const Ran ran = run(fmt::format(
        "demo --platform cpu --ranks 2 --tokens 0 --hidden 64 --experts 8 --iterations 2{}", more));
    EXPECT_EQ(ran.code, 0) << ran.output;
    EXPECT_THAT(ran.output, HasSubstr("OK: 0 values"));
  }
}

TEST(DemoInput, OwnTextAndSeed) {
  const TemporaryFile text("abc");  // shorter than what is read: starts again
  const Ran ran = run(fmt::format("{} --ranks 2 --seed 7 --text '{}'", kSmall, text.path()));
  EXPECT_EQ(ran.code, 0) << ran.output;
  EXPECT_THAT(ran.output, HasSubstr("3 bytes, read more than once"));
}

/// An expert's output that is wrong in one value on one rank is found, wherever it comes from.
TEST(DemoCheck, PlantedErrorIsFound) {
  for (const char* more : {"--plant-error 0", "--plant-error 1", "--plant-error 1 --dtype fp8",
                           "--plant-error 1 --processes"}) {
    const Ran ran = run(fmt::format("{} --ranks 2 {}", kSmall, more));
    EXPECT_EQ(ran.code, 1) << more << "\n" << ran.output;
    EXPECT_THAT(ran.output, HasSubstr("FAILED: rank "));
    EXPECT_THAT(ran.output, HasSubstr(", column 0: got "));
    EXPECT_THAT(ran.output, Not(HasSubstr("OK:")));
  }
}

struct BadCase {
  const char* arguments;
  const char* says;  ///< must be in the message
};

TEST(BadOptions, AreRefusedWithWhatIsAllowed) {
  const TemporaryFile empty;
  const std::string emptyText = fmt::format("demo --text '{}'", empty.path());
  const BadCase cases[] = {
      {"", "demo, bench, bench-ll, traffic-ll or info"},
      {"dance", "dance"},
      {"demo --ranks 0", "1 (to|-) 64"},
      {"demo --ranks two", "two"},
      {"demo --ranks 4 --nodes 5", "4 ranks .* cannot make 5 nodes"},
      {"demo --ranks 4 --nodes 3 --experts 12", "4 ranks .* cannot make 3 nodes"},
      {"demo --nodes 2 --transport pigeon", "shm,cuda_ipc,tcp,verbs"},
      {"demo --ranks", "--ranks"},
      {"demo --ranks 65", "1 (to|-) 64"},
      {"demo --tokens -1", "0 (to|-) 1048576"},
      {"demo --hidden 100", "multiple of 8"},
      {"demo --experts 30 --ranks 4", "divisible by the 4 ranks"},
      {"demo --topk 9 --experts 8", "more than the 8 experts"},
      {"demo --topk 33", "1 (to|-) 32"},
      {"demo --dtype fp16", "bf16,fp8"},
      {"demo --platform tpu", "cpu,cuda"},
      {"demo --iterations 0", "1 (to|-) "},
      {"demo --text /no/such/file", "/no/such/file"},
      {emptyText.c_str(), "is empty"},
      {"demo --colour", "--colour"},
      {"bench --blocks 8,0", "1 (to|-) 1024"},
      {"bench --cases dispatch", "dispatch-bf16"},
      {"bench --hidden 12", "multiple of 8"},
      {"traffic-ll --logfmt --combine-reduce source", "--logfmt.*--combine-reduce rank"},
      {"bench-ll --combine-reduce home", "rank,source"},
      {"traffic-ll --combine-reduce home", "rank,source"},
      {"info --ranks 0", "1 (to|-) 64"},
      {"info --transport tcp", "--ranks"},
      {"info --ranks 2 --transport udp", "udp"},
  };
  for (const BadCase& bad : cases) {
    const Ran ran = run(bad.arguments);
    EXPECT_EQ(ran.code, 2) << bad.arguments << "\n" << ran.output;
    EXPECT_THAT(ran.output, ContainsRegex(bad.says)) << bad.arguments;
  }
}

TEST(BadOptions, BadEnvironmentIsNamed) {
  setenv("MSCCLPP_EP_PLATFORM", "tpu", 1);
  const Ran ran = run("demo");
  unsetenv("MSCCLPP_EP_PLATFORM");
  EXPECT_EQ(ran.code, 2) << ran.output;
  EXPECT_THAT(ran.output, HasSubstr("MSCCLPP_EP_PLATFORM"));
}

TEST(BadOptions, MemberIsNotForPeople) {
  const Ran ran = run("demo --platform cpu --member < /dev/null");
  EXPECT_EQ(ran.code, 3) << ran.output;
  EXPECT_THAT(ran.output, HasSubstr("--processes"));
}

TEST(Help, NamesEveryOptionWithItsDefault) {
  const Ran demo = run("demo --help");
  EXPECT_EQ(demo.code, 0);
  for (const char* text :
       {"--text", "--ranks", "--tokens", "--hidden", "--topk", "--experts", "--dtype", "--platform",
        "--processes", "--sms", "--seed", "--iterations", "1 to 64; default 4", "default 256",
        "default 512", "default 32", "default bf16"}) {
    EXPECT_THAT(demo.output, HasSubstr(text));
  }
  EXPECT_THAT(demo.output, Not(HasSubstr("--plant-error")));
  EXPECT_THAT(demo.output, Not(HasSubstr("--member")));
  const Ran bench = run("bench --help");
  EXPECT_EQ(bench.code, 0);
  for (const char* text : {"--blocks", "--cases", "--json", "--flush", "--warmup", "7168"}) {
    EXPECT_THAT(bench.output, HasSubstr(text));
  }
  const Ran info = run("info --help");
  EXPECT_EQ(info.code, 0);
  for (const char* text : {"--ranks", "--ranks-per-node", "--transport", "--platform", "1 to 64",
                           "MSCCLPP_EP_TRANSPORT", "default: not printed"}) {
    EXPECT_THAT(info.output, HasSubstr(text));
  }
}

TEST(Info, PrintsBuildDevicesAndEnvironment) {
  const Ran ran = run("info");
  EXPECT_EQ(ran.code, 0) << ran.output;
  for (const char* text : {"platforms built: cpu", "cpu:0", "MSCCLPP_EP_TIMEOUT", "100 s"}) {
    EXPECT_THAT(ran.output, HasSubstr(text));
  }
}

TEST(Info, SaysWhatCarriesDataFromEachDevice) {
  const Ran ran = run("info");
  for (const char* text :
       {"shm on cpu 0", "no cuda_ipc: ", "tcp on ", "to a peer of the same node: mapped memory"}) {
    EXPECT_THAT(ran.output, HasSubstr(text));
  }
  // With an RDMA device it is verbs that serves both.
  EXPECT_THAT(ran.output,
              ContainsRegex("(no verbs: |verbs on .*GID .*NUMA node .*GPUDirect none)"));
  EXPECT_THAT(ran.output, ContainsRegex("to a peer of another node on this host: (shm|verbs) "));
  EXPECT_THAT(ran.output, ContainsRegex("to a peer of another host: (tcp|verbs) "));
  const Ran asked = run("info", "MSCCLPP_EP_TRANSPORT=cuda_ipc");
  EXPECT_THAT(asked.output,
              HasSubstr("to a peer of another host: cuda_ipc (asked for), which is not there"));
}

TEST(Info, PrintsTheTopologyThatTheLibrarySees) {
  const Ran one = run("info --ranks 2 --platform cpu");
  EXPECT_EQ(one.code, 0) << one.output;
  EXPECT_THAT(one.output, HasSubstr("topology: 2 ranks on 1 node; inside a node: mapped memory\n"));
  EXPECT_THAT(one.output, HasSubstr("rank 1 node 0 host "));
  const Ran two = run("info --ranks 4 --ranks-per-node 2 --transport tcp --platform cpu");
  EXPECT_EQ(two.code, 0) << two.output;
  EXPECT_THAT(two.output, HasSubstr("topology: 4 ranks on 2 nodes"));
  EXPECT_THAT(two.output, HasSubstr("between nodes: tcp (asked for)"));
  EXPECT_THAT(two.output, ContainsRegex("rank 3 node 1 host .*\n    tcp on "));
  // No silent fallback.
  const Ran none = run("info --ranks 2 --ranks-per-node 1 --transport cuda_ipc --platform cpu");
  EXPECT_EQ(none.code, 3) << none.output;
  EXPECT_THAT(none.output, HasSubstr("rank 0 cannot use the transport cuda_ipc"));
  // The library tells on request.
  const Ran logged = run("info --ranks 3 --platform cpu", "MSCCLPP_LOG_LEVEL=info");
  EXPECT_THAT(logged.output, ContainsRegex("info[^\n]*topology: 3 ranks on 1 node"));
}

/// The roofline's pull writes a token's row once for every rank that held it: the same bytes to one
/// place, which ThreadSanitizer rightly calls a race. It is no part of the library.
constexpr const char* kBenchEnvironment = "TSAN_OPTIONS=report_bugs=0:atexit_sleep_ms=0";
constexpr const char* kSmallBench =
    "bench --platform cpu --ranks 2 --tokens 12 --hidden 256 --topk 2 --experts 4 --blocks 1,3 "
    "--warmup 1 --iterations 3";

TEST(Traffic, IsWorkedOutForAnyGroup) {
  const Ran one = run("traffic-ll --ranks 8");
  EXPECT_EQ(one.code, 0) << one.output;
  EXPECT_THAT(one.output, HasSubstr("dispatch")) << one.output;
  const Ran many = run("traffic-ll --ranks 16 --ranks-per-node 8 --tokens 4 --topk 2");
  EXPECT_EQ(many.code, 0) << many.output;
  // 8 peers in the other node: a put and an add of a dispatch, two puts and an add of a combine; no
  // bare signals.
  EXPECT_THAT(many.output, ContainsRegex("16 +dispatch +[0-9.]+ +8 +[0-9.]+ +0 +8 "));
  EXPECT_THAT(many.output, ContainsRegex("16 +combine +[0-9.]+ +16 +[0-9.]+ +0 +8 "));
  EXPECT_EQ(run("traffic-ll --hidden 12").code, 2);
}

/// They are not exact: what is wrong is noticed all the same.
TEST(BenchLowLatency, LogarithmicSums) {
  const std::string small =
      "bench-ll --platform cpu --tokens 3 --hidden 256 --topk 2 --experts 4 --calls 1 "
      "--iterations 1 --logfmt";
  const Ran good = run(small);
  EXPECT_EQ(good.code, 0) << good.output;
  EXPECT_THAT(good.output, HasSubstr("LogFMT back"));
  const Ran bad = run(small + " --plant-error");
  EXPECT_EQ(bad.code, 1) << bad.output;
  EXPECT_THAT(bad.output, HasSubstr("WRONG"));
}

TEST(Bench, TableAndJson) {
  const TemporaryFile file;
  const Ran ran = run(fmt::format("{} --json '{}'", kSmallBench, file.path()), kBenchEnvironment);
  ASSERT_EQ(ran.code, 0) << ran.output;
  EXPECT_THAT(ran.output, HasSubstr("OK: every timed result was checked"));
  std::ifstream stream(file.path());
  const nlohmann::json root = nlohmann::json::parse(stream);
  EXPECT_EQ(root["ranks"], 2);
  EXPECT_EQ(root["hidden"], 256);
  ASSERT_EQ(root["results"].size(), 11u);  // 5 cases of 2 block counts, and the layout
  for (const auto& result : root["results"]) {
    SCOPED_TRACE(result.dump());
    EXPECT_TRUE(result["correct"].get<bool>());
    EXPECT_GT(result["median_us"].get<double>(), 0);
    EXPECT_LE(result["min_us"].get<double>(), result["median_us"].get<double>());
    EXPECT_LE(result["median_us"].get<double>(), result["max_us"].get<double>());
    EXPECT_GT(result["host_us"].get<double>(), 0);
    if (result["case"] == "layout") continue;
    EXPECT_TRUE(result["copy"]["correct"].get<bool>());
    EXPECT_GT(result["copy"]["median_us"].get<double>(), 0);
    EXPECT_GT(result["ratio"].get<double>(), 0);
    // Rows of the payload only; fp8 has 256 bytes and two scales.
    const double rowBytes = result["case"] == "dispatch-fp8" ? 256 + 8 : 512;
    EXPECT_DOUBLE_EQ(result["bytes"].get<double>(), root["mean_rows"].get<double>() * rowBytes);
  }
}

TEST(Bench, ProcessesAndFlush) {
  const Ran ran =
      run(fmt::format("{} --processes --flush --cases dispatch-bf16,combine-plain", kSmallBench),
          kBenchEnvironment);
  EXPECT_EQ(ran.code, 0) << ran.output;
  EXPECT_THAT(ran.output, HasSubstr("OK: every timed result was checked"));
}

/// A third node is smaller; sums of a node's rows are rounded on their way.
TEST(Bench, BetweenNodes) {
  const TemporaryFile file;
  const Ran ran = run(fmt::format("bench --platform cpu --ranks 5 --nodes 3 --transport tcp "
                                  "--tokens 40 --hidden 64 --topk 4 --experts 10 --blocks 2 "
                                  "--warmup 0 --iterations 2 --cases dispatch-fp8,combine-plain "
                                  "--json '{}'",
                                  file.path()),
                      kBenchEnvironment);
  ASSERT_EQ(ran.code, 0) << ran.output;
  EXPECT_THAT(ran.output, HasSubstr("bare tcp us"));
  std::ifstream stream(file.path());
  const nlohmann::json root = nlohmann::json::parse(stream);
  EXPECT_EQ(root["nodes"], 3);
  EXPECT_EQ(root["transport"], "tcp");
  ASSERT_EQ(root["results"].size(), 2u);
  for (const auto& result : root["results"]) {
    SCOPED_TRACE(result.dump());
    EXPECT_TRUE(result["copy"]["correct"].get<bool>());
    // Rows of rank 0 to two other nodes: at most all its tokens to each.
    const double rowBytes = result["case"] == "dispatch-fp8" ? 64 + 4 : 128;
    EXPECT_GT(result["network_bytes"].get<double>(), 40 * rowBytes);
    EXPECT_LE(result["network_bytes"].get<double>(), 2 * 40 * rowBytes);
  }
  const Ran odd = run("bench --platform cpu --ranks 4 --nodes 3");
  EXPECT_EQ(odd.code, 2);
  EXPECT_THAT(odd.output, HasSubstr("4 ranks (--ranks) cannot make 3 nodes"));
}

/// Of every message: who had it how long. The parts are those of one clock, so none is negative up
/// to where the transport has it.
TEST(BenchLowLatency, SaysWhereTheTimeGoes) {
  const TemporaryFile file;
  const Ran ran = run(fmt::format("bench-ll --platform cpu --ranks 3 --nodes 3 --tokens 5 "
                                  "--hidden 64 --topk 2 --experts 6 --calls 1 --iterations 3 "
                                  "--phases --json '{}'",
                                  file.path()),
                      kBenchEnvironment);
  ASSERT_EQ(ran.code, 0) << ran.output;
  EXPECT_THAT(ran.output, HasSubstr("where the time goes, 5 tokens, FP8"));
  std::ifstream stream(file.path());
  const nlohmann::json root = nlohmann::json::parse(stream);
  ASSERT_EQ(root["lines"].size(), 2u);
  for (const auto& line : root["lines"]) {
    SCOPED_TRACE(line.dump());
    EXPECT_TRUE(line["correct"].get<bool>());
    const auto& phases = line["phases"];
    ASSERT_EQ(phases.size(), 3u);
    EXPECT_EQ(phases[0]["message"], "ids and rows");
    EXPECT_EQ(phases[1]["message"], "weights");
    EXPECT_EQ(phases[2]["message"], "sums");
    for (const auto& phase : phases) {
      for (const char* part : {"kernel_us", "fifo_us", "proxy_us", "rest_us"}) {
        EXPECT_GE(phase[part].get<double>(), 0) << part;
      }
      EXPECT_GT(phase["kernel_us"].get<double>() + phase["fifo_us"].get<double>(), 0);
      EXPECT_LT(phase["kernel_us"].get<double>(), 60e6) << "not of one clock";
    }
  }
  const Ran one = run("bench-ll --platform cpu --ranks 2 --phases");
  EXPECT_EQ(one.code, 2);
  EXPECT_THAT(one.output, HasSubstr("pass --nodes = 2 or more"));
}

/// Every result that is compared with a wrong byte is marked; none is compared with itself.
TEST(Bench, WrongResultsAreMarked) {
  const TemporaryFile file;
  const Ran ran =
      run(fmt::format("{} --plant-error --json '{}'", kSmallBench, file.path()), kBenchEnvironment);
  EXPECT_EQ(ran.code, 1) << ran.output;
  EXPECT_THAT(ran.output, HasSubstr("FAILED: results marked '!' are wrong"));
  std::ifstream stream(file.path());
  const nlohmann::json report = nlohmann::json::parse(stream);
  EXPECT_GT(report.at("results").size(), 0u);
  for (const auto& result : report.at("results")) {
    EXPECT_FALSE(result["correct"].get<bool>()) << result.dump();
  }
}

}  // namespace
