#include "affinity.h"

#include "check.h"

using namespace check;
namespace cpu = fssdeploy::cpu;

static void unit_rows(Index rows, Index channels) {
  Floats values = normal(rows * channels), unit(values.size(), kPoison);
  std::fill_n(values.begin(), channels, 0.0f);  // a row of zeros stays one
  Doubles expected;
  for (Index i = 0; i < rows; ++i) {
    const float* row = values.data() + i * channels;
    const double norm = std::max(std::sqrt(dot(row, row, channels)), 1e-12);
    for (Index c = 0; c < channels; ++c) expected.push_back(row[c] / norm);
  }
  cpu::unit_rows(cpu::View(values.data(), rows, channels), 1e-12f, cpu::MutableView(unit.data(), rows, channels));
  close("unit_rows", unit, expected);
}

static void masked_max(Index rows, Index columns, Index shots, Index masks, Index channels, float zeros, bool exclude) {
  const Floats query = normal(rows * channels), support = normal(shots * columns * channels);
  const Floats weight = weights(shots * masks * columns, zeros);
  Floats values(shots * masks * rows, kPoison);
  Indices indices(values.size(), kNoIndex), places;
  Doubles best;
  for (Index group = 0; group < shots * masks; ++group)
    for (Index i = 0; i < rows; ++i) {
      double value = -kInfinite;
      std::int64_t place = -1;
      for (Index j = 0; j < columns; ++j) {
        const double w = weight[group * columns + j];
        if (exclude && w == 0) continue;
        const float* other = support.data() + (group / masks * columns + j) * channels;
        const double product = w * dot(query.data() + i * channels, other, channels);
        if (product > value) value = product, place = j;
      }
      best.push_back(value), places.push_back(place);
    }
  cpu::masked_max(cpu::View(query.data(), rows, channels), support.data(), weight.data(), shots, masks, columns,
                  exclude, values.data(), indices.data(), backwards);
  close("masked_max values", values, best);
  equal("masked_max indices", indices, places);
}

static void mutual_argmax(Index rows, Index columns, Index shots, Index channels) {
  const Floats query = normal(rows * channels), support = normal(shots * columns * channels);
  Floats row_values(shots * rows, kPoison), column_values(shots * columns, kPoison);
  Indices row_indices(row_values.size(), kNoIndex), column_indices(column_values.size(), kNoIndex);
  Doubles row_best(row_values.size(), -kInfinite), column_best(column_values.size(), -kInfinite);
  Indices row_places(row_values.size()), column_places(column_values.size());
  for (Index k = 0; k < shots; ++k)
    for (Index i = 0; i < rows; ++i)
      for (Index j = 0; j < columns; ++j) {
        const Index row = k * rows + i, column = k * columns + j;
        const double product = dot(query.data() + i * channels, support.data() + column * channels, channels);
        if (product > row_best[row]) row_best[row] = product, row_places[row] = j;
        if (product > column_best[column]) column_best[column] = product, column_places[column] = i;
      }
  cpu::mutual_argmax(cpu::View(query.data(), rows, channels), support.data(), shots, columns, row_values.data(),
                     row_indices.data(), column_values.data(), column_indices.data(), backwards);
  close("row values", row_values, row_best);
  equal("row indices", row_indices, row_places);
  close("column values", column_values, column_best);
  equal("column indices", column_indices, column_places);
}

// All products are equal, over several tiles: the smallest index that counts wins.
static void ties() {
  const Index rows = 2 * cpu::kQueryTile + 1, columns = 2 * cpu::kSupportTile + 3;
  const Floats query(rows * 4, 0.5f), support(columns * 4, 0.5f);
  Floats weight(columns, 1.0f), values(rows);
  Indices indices(rows, kNoIndex);
  const cpu::View queries(query.data(), rows, 4);
  for (const bool exclude : {false, true}) {
    cpu::masked_max(queries, support.data(), weight.data(), 1, 1, columns, exclude, values.data(), indices.data());
    equal("tied", indices, Indices(rows, 0));
  }
  std::fill_n(weight.begin(), cpu::kSupportTile + 2, 0.0f);
  cpu::masked_max(queries, support.data(), weight.data(), 1, 1, columns, true, values.data(), indices.data());
  equal("tied after a tile that is left out", indices, Indices(rows, cpu::kSupportTile + 2));
  Floats column_values(columns);
  Indices column_indices(columns, kNoIndex);
  cpu::mutual_argmax(queries, support.data(), 1, columns, values.data(), indices.data(), column_values.data(),
                     column_indices.data(), backwards);
  equal("tied rows", indices, Indices(rows, 0));
  equal("tied columns", column_indices, Indices(columns, 0));
}

int main() {
  unit_rows(1, 1);
  unit_rows(131, 67);
  for (const bool exclude : {false, true}) {
    masked_max(1, 1, 1, 1, 1, 0, exclude);
    masked_max(137, 311, 2, 3, 29, 0.5f, exclude);
    masked_max(131, 257, 1, 2, 64, 0, exclude);
    masked_max(5, 13, 5, 2, 7, 1, exclude);  // empty masks
  }
  mutual_argmax(1, 1, 1, 1);
  mutual_argmax(269, 311, 2, 29);
  mutual_argmax(7, 3, 5, 64);
  ties();
}
