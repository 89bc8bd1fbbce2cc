// Copies on a CUDA stream, by functions of libcuda that are found at run time.
#pragma once

#include <cstddef>

namespace fssdeploy {

// Copies rows of `row_bytes` to rows of `padded_bytes`, the rest of which becomes zero. A copy a row: for few rows.
// Throws DriverError.
void copy_padded(void* stream, void* to, std::size_t padded_bytes, const void* from, std::size_t row_bytes,
                 std::size_t rows);

}  // namespace fssdeploy
