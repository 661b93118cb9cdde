// Does not compile: the header it includes has a mistake in line 5, this file none.
#include "broken.cuh"

namespace rawkern {

struct Broken {
  struct Params {
    double* output;
  };
  static constexpr int kThreads = 32;
  static constexpr int kMinBlocks = 1;

  __device__ static void run(const Params& p) { p.output[threadIdx.x] = one(); }
};

}  // namespace rawkern
