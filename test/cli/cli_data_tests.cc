// What the demo and the benchmark believe about their own data.

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <mscclpp/device/convert.hpp>

#include "cli/bench_data.hpp"
#include "cli/default_text.hpp"
#include "cli/demo_model.hpp"
#include "cli/text_table.hpp"

namespace mscclpp::ep::cli {
namespace {

ModelShape smallShape(bool fp8 = false) {
  ModelShape shape;
  shape.ranks = 2;
  shape.tokens = 64;
  shape.hidden = 136;  // not a multiple of 128: the last scale has a short block
  shape.topk = 4;
  shape.experts = 16;
  shape.fp8 = fp8;
  return shape;
}

TEST(DemoModel, RoutesDistinctExpertsWithWeightsThatSumToOne) {
  const ModelShape shape = smallShape();
  const DemoModel model(shape, std::string(defaultText()));
  const LayerInput in = model.input(0, 1);
  ASSERT_EQ(in.topkIdx.size(), 64u * 4u);
  for (std::size_t t = 0; t < 64; ++t) {
    std::set<std::int64_t> chosen;
    float sum = 0;
    for (std::size_t k = 0; k < 4; ++k) {
      const std::int64_t e = in.topkIdx[t * 4 + k];
      const float w = in.topkWeights[t * 4 + k];
      if (e < 0) {
        EXPECT_EQ(w, 0.0f);
        continue;
      }
      EXPECT_LT(e, 16);
      EXPECT_GT(w, 0.0f);
      EXPECT_TRUE(chosen.insert(e).second) << "expert " << e << " twice for token " << t;
      sum += w;
    }
    EXPECT_FALSE(chosen.empty());
    EXPECT_NEAR(sum, 1.0f, 1e-5f);
  }
}

TEST(DemoModel, TrafficIsSkewedAndSomeChoicesAreDropped) {
  ModelShape shape = smallShape();
  shape.tokens = 512;
  shape.experts = 32;
  const DemoModel model(shape, std::string(defaultText()));
  std::vector<int> load(32, 0);
  int dropped = 0, sum = 0;
  for (const std::int64_t e : model.input(0, 0).topkIdx) {
    if (e < 0) {
      ++dropped;
    } else {
      ++load[static_cast<std::size_t>(e)], ++sum;
    }
  }
  EXPECT_GT(dropped, 0);
  EXPECT_GT(*std::max_element(load.begin(), load.end()), 2 * sum / 32);
  EXPECT_LT(*std::min_element(load.begin(), load.end()), sum / 64);
}

TEST(DemoModel, ExpertsComputeDifferentThings) {
  const DemoModel model(smallShape(), "x");
  std::set<std::pair<float, float>> results;
  for (const ExpertParameters& expert : model.experts()) {
    float even = 0.5f, odd = -0.25f;
    cpu::applyExpert(expert, even, odd);
    EXPECT_LT(std::abs(even), 1.0f);
    EXPECT_LT(std::abs(odd), 1.0f);
    results.insert({even, odd});
  }
  EXPECT_EQ(results.size(), 16u);
}

/// The two references of one row agree within the bound, and the bound is not so wide that a
/// missing expert would pass.
TEST(DemoModel, ExactReferenceLiesWithinTheBoundOfThePlainOne) {
  for (const bool fp8 : {false, true}) {
    const DemoModel model(smallShape(fp8), std::string(defaultText()));
    LayerInput in = model.input(0, 0);
    ExpectedRow row, without;
    int caught = 0;
    for (int t = 0; t < 64; ++t) {
      model.expect(in, t, row);
      auto& last = in.topkIdx[static_cast<std::size_t>(t) * 4 + 1];
      const std::int64_t kept = last;
      last = -1;
      model.expect(in, t, without);
      last = kept;
      bool differs = false;
      for (std::size_t c = 0; c < 136; ++c) {
        const float exact = device::bf16ToFloat(row.exact[c]);
        EXPECT_LE(std::abs(exact - row.plain[c]), row.bound[c]) << "token " << t << " column " << c;
        differs = differs || std::abs(without.plain[c] - row.plain[c]) > row.bound[c];
      }
      caught += differs || kept < 0 ? 1 : 0;
    }
    EXPECT_EQ(caught, 64);
  }
}

TEST(DemoModel, Fp8ScalesTakeTheLargestValueTo448) {
  const DemoModel model(smallShape(true), std::string(defaultText()));
  const LayerInput in = model.input(0, 0);
  ASSERT_EQ(in.scales.size(), 64u * 2u);
  for (std::size_t t = 0; t < 64; ++t) {
    for (std::size_t b = 0; b < 2; ++b) {
      std::uint8_t largest = 0;
      for (std::size_t c = b * 128; c < std::min<std::size_t>(136, b * 128 + 128); ++c) {
        largest = std::max<std::uint8_t>(largest, in.x8[t * 136 + c] & 0x7f);
      }
      EXPECT_EQ(largest, 0x7e) << "token " << t << " block " << b;  // 448 in e4m3
    }
  }
}

TEST(DemoModel, DealsTheTextOutWithoutGapsAndAroundTheEnd) {
  ModelShape shape = smallShape();
  shape.tokens = 2;
  shape.hidden = 8;
  const DemoModel model(shape, "abcde");
  const DemoModel same(shape, "abcdeabcde");
  // Positions differ, so compare with a text in which they fall on the same bytes.
  for (int iteration = 0; iteration < 2; ++iteration) {
    for (int rank = 0; rank < 2; ++rank) {
      EXPECT_EQ(model.input(iteration, rank).x, same.input(iteration, rank).x);
    }
  }
  EXPECT_NE(model.input(0, 0).x, model.input(0, 1).x);
}

TEST(BenchRouting, RowsAndTargetsAgree) {
  BenchOptions options;
  options.ranks = 4;
  options.tokens = 50;
  options.experts = 16;
  options.topk = 3;
  const BenchRouting routing(options);
  std::int64_t rows = 0, targets = 0;
  for (int r = 0; r < 4; ++r) {
    const auto mine = routing.rowsOf(r);
    EXPECT_EQ(static_cast<std::int64_t>(mine.size()), routing.rowCount(r));
    rows += routing.rowCount(r);
    const auto idx = routing.topkIdx(r);
    for (int t = 0; t < 50; ++t) {
      std::set<std::int64_t> experts, ranks;
      for (int k = 0; k < 3; ++k) {
        const std::int64_t e = idx[static_cast<std::size_t>(t * 3 + k)];
        experts.insert(e);
        ranks.insert(e / 4);
      }
      EXPECT_EQ(experts.size(), 3u) << "distinct experts";
      EXPECT_EQ(ranks.size(), routing.targets(r, t).size());
      targets += static_cast<std::int64_t>(ranks.size());
    }
  }
  EXPECT_EQ(rows, targets);
}

TEST(TextTable, AlignsColumns) {
  TextTable table({"a", "long head"});
  table.add({"1", "2"});
  EXPECT_EQ(table.text(0), "a  long head\n1          2\n");
  TextTable words({"a", "bb", "c"}, 3);
  words.add({"1", "2", "3"});
  EXPECT_EQ(words.text(), "  a  bb  c\n  1  2   3\n");
}

TEST(Numbers, AreGroupedAndScaled) {
  EXPECT_EQ(grouped(0), "0");
  EXPECT_EQ(grouped(999), "999");
  EXPECT_EQ(grouped(1000), "1,000");
  EXPECT_EQ(grouped(-1234567), "-1,234,567");
  EXPECT_EQ(duration(0.0123), "12.3 us");
  EXPECT_EQ(duration(4.56), "4.56 ms");
  EXPECT_EQ(duration(1200), "1.20 s");
}

}  // namespace
}  // namespace mscclpp::ep::cli
