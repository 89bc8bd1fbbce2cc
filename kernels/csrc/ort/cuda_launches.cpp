#include "cuda_launches.h"

#include <limits>
#include <optional>

#include "cuda_memory.h"

namespace fssdeploy {
namespace {

constexpr std::size_t kFloatBytes = 4;
constexpr std::size_t kIndexBytes = 4;

std::int64_t cdiv(std::int64_t total, std::int64_t part) { return (total + part - 1) / part; }

const KernelRecord& record(const Launcher& launcher, const std::string& name) {
  const KernelRecord* kernel = launcher.kernels.find(name);
  if (kernel == nullptr) throw DriverError("no kernel " + name + " was shipped");
  return *kernel;
}

std::int64_t constant(const KernelRecord& kernel, const char* name) {
  const auto found = kernel.constants.find(name);
  if (found == kernel.constants.end()) throw DriverError(kernel.name + " has no constant " + name);
  return std::stoll(found->second);
}

void require_multiple(const KernelRecord& kernel, const char* what, std::int64_t value, std::int64_t of) {
  if (value % of != 0) {
    throw DriverError(kernel.name + ": " + std::to_string(value) + " " + what + " are no multiple of " +
                      std::to_string(of) + "; run this network without the library");
  }
}

// Kernels compute places in tensors with 32 bits.
void require_int32(const KernelRecord& kernel, std::int64_t elements) {
  if (elements > std::numeric_limits<std::int32_t>::max()) {
    throw DriverError(kernel.name + ": a tensor of " + std::to_string(elements) + " elements is too large");
  }
}

// The best of every tile, (groups, tiles, rows), and its reduction to (groups, rows).
class TileMaxima {
 public:
  TileMaxima(const Launcher& launcher, const KernelRecord& kernel, std::int64_t groups, std::int64_t tiles,
             std::int64_t rows)
      : groups_(groups), tiles_(tiles), rows_(rows) {
    require_int32(kernel, groups * tiles * rows);
    values = launcher.scratch(groups * tiles * rows * kFloatBytes);
    indices = launcher.scratch(groups * tiles * rows * kIndexBytes);
  }

  void reduce(const Launcher& launcher, const Maxima& maxima) const {
    launcher.kernels.launch("best_of_tiles", launcher.stream,
                            {values, indices, groups_, tiles_, rows_, maxima.values, maxima.indices});
  }

  const void* values;
  const void* indices;

 private:
  std::int64_t groups_, tiles_, rows_;
};

const KernelRecord& kernel_of_pair(const Launcher& launcher, const std::string& name, const char* step,
                                   const Pair& sizes) {
  const KernelRecord& kernel = record(launcher, name);
  require_multiple(kernel, "channels", sizes.channels, constant(kernel, step));
  require_int32(kernel, sizes.query_rows * sizes.channels);
  require_int32(kernel, sizes.shots * sizes.support_rows * sizes.channels);
  return kernel;
}

}  // namespace

void masked_max(const Launcher& launcher, const Pair& sizes, std::int64_t masks, bool exclude, const void* query,
                const void* support, const void* weights, const Maxima& maxima) {
  const KernelRecord& kernel = kernel_of_pair(launcher, "masked_max_" + launcher.type, "BLOCK_C", sizes);
  const std::int64_t groups = sizes.shots * masks, tiles = cdiv(sizes.support_rows, constant(kernel, "BLOCK_S"));
  const std::int64_t padded = tiles * constant(kernel, "BLOCK_S");
  if (padded != sizes.support_rows) {  // the kernel reads whole tiles of weights
    const std::size_t bytes = launcher.type == "fp32" ? 4 : 2;
    void* copy = launcher.scratch(groups * padded * bytes);
    copy_padded(launcher.stream, copy, padded * bytes, weights, sizes.support_rows * bytes, groups);
    weights = copy;
  }
  const TileMaxima best(launcher, kernel, groups, tiles, sizes.query_rows);
  launcher.kernels.launch(kernel.name, launcher.stream,
                          {query, support, weights, sizes.shots, masks, sizes.query_rows, sizes.support_rows,
                           sizes.channels, std::int64_t{exclude}, best.values, best.indices});
  best.reduce(launcher, maxima);
}

void mutual_argmax(const Launcher& launcher, const Pair& sizes, const void* query, const void* support,
                   const Maxima& rows, const Maxima& columns) {
  const KernelRecord& kernel = kernel_of_pair(launcher, "mutual_argmax_" + launcher.type, "BLOCK_C", sizes);
  const std::int64_t row_tiles = cdiv(sizes.query_rows, constant(kernel, "BLOCK_Q"));
  const std::int64_t column_tiles = cdiv(sizes.support_rows, constant(kernel, "BLOCK_S"));
  const TileMaxima of_rows(launcher, kernel, sizes.shots, column_tiles, sizes.query_rows);
  const TileMaxima of_columns(launcher, kernel, sizes.shots, row_tiles, sizes.support_rows);
  launcher.kernels.launch(kernel.name, launcher.stream,
                          {query, support, sizes.shots, sizes.query_rows, sizes.support_rows, sizes.channels,
                           of_rows.values, of_rows.indices, of_columns.values, of_columns.indices});
  of_rows.reduce(launcher, rows);
  of_columns.reduce(launcher, columns);
}

void correlation_projection(const Launcher& launcher, const Pair& sizes, std::int64_t outputs, const void* query,
                            const void* support, const void* projection, void* output) {
  // The widest kernel that the projection fills.
  std::optional<std::int64_t> widest;
  for (const std::int64_t width : {64, 128, 256, 512}) {
    const auto name = "correlation_projection_w" + std::to_string(width) + "_" + launcher.type;
    if (outputs % width == 0 && launcher.kernels.find(name) != nullptr) widest = width;
  }
  if (!widest) {
    throw DriverError("correlation_projection: no kernel for " + std::to_string(outputs) + " projected channels in " +
                      launcher.type + "; run this network without the library");
  }
  const auto name = "correlation_projection_w" + std::to_string(*widest) + "_" + launcher.type;
  const KernelRecord& kernel = kernel_of_pair(launcher, name, "STEP", sizes);
  require_int32(kernel, sizes.shots * sizes.support_rows * outputs);
  require_int32(kernel, sizes.shots * (sizes.query_rows + constant(kernel, "ROWS")) * outputs);
  launcher.kernels.launch(kernel.name, launcher.stream,
                          {query, support, projection, output, sizes.shots, sizes.query_rows, sizes.support_rows,
                           sizes.channels, outputs});
}

}  // namespace fssdeploy
