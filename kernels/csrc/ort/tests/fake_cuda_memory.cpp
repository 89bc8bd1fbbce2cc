// The driver's fake libcuda with the functions that this library needs on top; they work on ordinary memory.
#include <cstdint>
#include <cstring>

#include "fake_cuda.cpp"

EXPORTED int cuMemsetD8Async(std::uint64_t to, unsigned char value, std::size_t bytes, void*) {
  std::memset(reinterpret_cast<void*>(to), value, bytes);
  return answer("cuMemsetD8Async");
}

EXPORTED int cuMemcpyDtoDAsync_v2(std::uint64_t to, std::uint64_t from, std::size_t bytes, void*) {
  std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
  return answer("cuMemcpyDtoDAsync_v2");
}
