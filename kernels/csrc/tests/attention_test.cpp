#include "attention.h"

#include "check.h"

using namespace check;
namespace cpu = fssdeploy::cpu;

// `logits` spreads the queries, so that weights range from even to nearly one-hot.
static void attention(Index keys, Index start, Index calibrated, bool global, float spread = 1, Index queries = 131) {
  const cpu::CalibratedAttention sizes{2, queries, keys, 24, 7, start, calibrated, 10.0f, 0.25f, global};
  const Floats query = normal(2 * queries * 24, spread), key = normal(2 * keys * 24), value = normal(2 * keys * 7);
  const Floats calibration = weights(2 * calibrated, 0.1f);
  Floats found(2 * queries * 7, kPoison);
  Doubles expected;
  for (Index b = 0; b < 2; ++b) {
    std::vector<Doubles> logits(queries, Doubles(keys));
    double lowest = kInfinite, highest = -kInfinite;
    for (Index i = 0; i < queries; ++i)
      for (Index j = 0; j < keys; ++j) {
        const float* other = key.data() + (b * keys + j) * 24;
        const double logit = logits[i][j] = 0.25 * dot(query.data() + (b * queries + i) * 24, other, 24);
        if (j >= start && j < start + calibrated) lowest = std::min(lowest, logit), highest = std::max(highest, logit);
      }
    for (Doubles& row : logits) {
      double low = lowest, high = highest, total = 0;
      if (!global && calibrated > 0) {
        low = *std::min_element(row.begin() + start, row.begin() + start + calibrated);
        high = *std::max_element(row.begin() + start, row.begin() + start + calibrated);
      }
      for (Index j = 0; j < calibrated; ++j) {
        const double norm = (row[start + j] - low) / (high - low + 1e-7);
        row[start + j] += 10 * std::min(0.0, norm + calibration[b * calibrated + j] - 1);
      }
      const double top = *std::max_element(row.begin(), row.end());
      for (double& logit : row) total += logit = std::exp(logit - top);
      for (Index v = 0; v < 7; ++v) {
        double mixed = 0;
        for (Index j = 0; j < keys; ++j) mixed += row[j] / total * value[(b * keys + j) * 7 + v];
        expected.push_back(mixed);
      }
    }
  }
  cpu::calibrated_attention(sizes, query.data(), key.data(), value.data(), calibration.data(), found.data(), backwards);
  close("calibrated_attention", found, expected, 1e-4);
}

int main() {
  for (const bool global : {false, true}) {
    attention(1, 0, 1, global);
    attention(611, 203, 299, global);
    attention(611, 203, 299, global, 30);
    attention(257, 0, 257, global);
    attention(19, 18, 1, global, 1, 1);
    attention(300, 150, 0, global);  // plain attention
  }
}
