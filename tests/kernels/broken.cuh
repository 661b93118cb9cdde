#pragma once
#include "platform.cuh"

namespace rawkern {
__device__ inline double one() { return undeclared_name; }
}  // namespace rawkern
