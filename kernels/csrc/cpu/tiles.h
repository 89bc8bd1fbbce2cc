// Row-major matrices in memory of the caller, products of them in tiles, and how work is shared out.
//
// All kernels here compute in float32 on dense arrays, take any sizes including zero rows, and never hold the matrix of
// all inner products: a tile of it is made by Eigen's matrix product and reduced while it is in the cache.
#pragma once

#include <Eigen/Core>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>

namespace fssdeploy::cpu {

using Index = Eigen::Index;
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using View = Eigen::Map<const Matrix>;
using MutableView = Eigen::Map<Matrix>;
using Vector = Eigen::ArrayXf;

// 128 KiB of products: what stays in the second-level cache beside the rows that made it.
constexpr Index kQueryTile = 128;
constexpr Index kSupportTile = 256;
constexpr float kInfinite = std::numeric_limits<float>::infinity();

// Calls body(0) to body(count - 1) in any order, on any threads, and returns when all are done.
using Parallel = std::function<void(Index count, const std::function<void(Index)>& body)>;

inline void one_by_one(Index count, const std::function<void(Index)>& body) {
  for (Index i = 0; i < count; ++i) body(i);
}

inline Index tiles(Index rows, Index tile) { return (rows + tile - 1) / tile; }

// Calls work(group, first, count) for every tile of up to `tile` of `rows` rows in every group.
template <typename Work>
void for_row_tiles(Index groups, Index rows, Index tile, const Parallel& parallel, Work work) {
  const Index per_group = tiles(rows, tile);
  parallel(groups * per_group, [&](Index unit) {
    const Index first = unit % per_group * tile;
    work(unit / per_group, first, std::min(tile, rows - first));
  });
}

// Calls use(first, products) with the inner products of all rows of `query` and the support rows from `first` on, for
// every tile of the support that has rows in [from, to). Tiles do not depend on that range, so the same rows give the
// same products to the bit.
template <typename Query, typename Support, typename Use>
void for_product_tiles(const Query& query, const Support& support, Index from, Index to, Use use) {
  Matrix products;
  for (Index first = from / kSupportTile * kSupportTile; first < to; first += kSupportTile) {
    const Index count = std::min(kSupportTile, support.rows() - first);
    products.resize(query.rows(), count);
    products.noalias() = query * support.middleRows(first, count).transpose();
    use(first, products);
  }
}

template <typename Query, typename Support, typename Use>
void for_product_tiles(const Query& query, const Support& support, Use use) {
  for_product_tiles(query, support, 0, support.rows(), use);
}

}  // namespace fssdeploy::cpu
