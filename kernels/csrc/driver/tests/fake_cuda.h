// What the fake libcuda answers, and what it was asked: shared between it and the test.
#pragma once

#include <string>
#include <vector>

struct Launch {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared;
  void* stream;
  std::vector<std::vector<unsigned char>> parameters;
};

struct FakeCuda {
  int capability = 80;
  void* context = this;
  std::string failing;               // name of the function that answers with an error
  std::vector<std::size_t> sizes;    // bytes of each parameter of the next launch
  std::vector<std::string> images;   // contents that were loaded
  std::vector<std::string> entries;  // kernels that were looked up
  std::vector<int> shared_limits;
  std::vector<Launch> launches;
};
