// What fssdeploy.kernels.spectral.spectral_edges computes; the contract is there.
#pragma once

#include <cmath>
#include <optional>
#include <string_view>
#include <vector>

#include "tiles.h"

namespace fssdeploy::cpu {

enum class Negative { shift, clip, exp, keep };

// B_ij = exp(row * evidence_i) * exp(column * evidence_j), or the mean of the two.
struct Broadcast {
  float row, column;
  bool mean = false;
};

struct SpectralEdges {
  Index height, width;
  float sigma;
  Broadcast broadcast;
  Negative negative;
};

inline std::optional<Negative> negative_named(std::string_view name) {
  if (name == "shift") return Negative::shift;
  if (name == "clip") return Negative::clip;
  if (name == "exp") return Negative::exp;
  if (name == "keep") return Negative::keep;
  return std::nullopt;
}

inline std::optional<Broadcast> broadcast_named(std::string_view name) {
  if (name == "product") return Broadcast{1, 1};
  if (name == "geometric") return Broadcast{0.5f, 0.5f};
  if (name == "mean") return Broadcast{1, 1, true};
  if (name == "row") return Broadcast{1, 0};
  if (name == "column") return Broadcast{0, 1};
  if (name == "none") return Broadcast{0, 0};
  return std::nullopt;
}

inline void without_negatives(Negative rule, Eigen::Ref<Matrix> cosines) {
  auto values = cosines.array();
  if (rule == Negative::shift) values = (values + 1) * 0.5f;
  if (rule == Negative::clip) values = values.max(0.0f);
  if (rule == Negative::exp) values = (values - 1).exp();
}

// features (N, C) with N = height * width, labels (N) below the rows of table (R, R), evidence (N)
// -> edges (N, N), degree (N).
inline void spectral_edges(const SpectralEdges& graph, View features, const std::int64_t* labels, View table,
                           const float* evidence, MutableView edges, float* degree,
                           const Parallel& parallel = one_by_one) {
  const Index cells = features.rows();
  const Eigen::Map<const Vector> strength(evidence, cells);
  const float share = graph.broadcast.mean ? 0.5f : 1.0f;
  const Vector left = (graph.broadcast.row * strength).exp() * share;
  const Vector right = (graph.broadcast.column * strength).exp() * share;
  Matrix alike = table;
  without_negatives(graph.negative, alike);
  // A Gaussian of two cells is the product of one down and one across.
  const auto gaussian = [&](Index count) {
    const Vector distance = Vector::LinSpaced(count, 0, static_cast<float>(count - 1));
    return Vector((distance.square() * (-0.5f / (graph.sigma * graph.sigma))).exp());
  };
  const Vector down = gaussian(graph.height), across = gaussian(graph.width);

  for_row_tiles(1, cells, kQueryTile, parallel, [&](Index, Index first, Index count) {
    Eigen::ArrayXd sums = Eigen::ArrayXd::Zero(count);
    Matrix tile;
    Eigen::Array<float, 1, Eigen::Dynamic> nearness;
    for_product_tiles(features.middleRows(first, count), features, [&](Index column, const Matrix& cosines) {
      tile = cosines;
      without_negatives(graph.negative, tile);
      nearness.resize(tile.cols());
      for (Index row = 0; row < count; ++row) {
        const Index i = first + row, y = i / graph.width, x = i % graph.width;
        const auto similarity = alike.row(labels[i]);
        for (Index j = column; j < column + tile.cols(); ++j)
          nearness[j - column] = down[std::abs(y - j / graph.width)] * across[std::abs(x - j % graph.width)] +
                                 similarity[labels[j]];
        const auto column_share = right.segment(column, tile.cols()).transpose();
        auto weights = tile.row(row).array();
        weights *= nearness;
        if (graph.broadcast.mean)
          weights *= column_share + left[i];
        else
          weights *= column_share * left[i];
        sums[row] += weights.cast<double>().sum();
      }
      edges.block(first, column, count, tile.cols()) = tile;
    });
    Eigen::Map<Vector>(degree + first, count) = sums.cast<float>();
  });
}

}  // namespace fssdeploy::cpu
