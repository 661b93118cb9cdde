// Transposed convolution, forward: y[n, co, ho, wo] = bias[co] + sum x[n, ci, hi, wi] w[ci, co, kh, kw]
// over all taps for which hi = (ho + padding - kh dilation) / stride is a row of the input (and likewise the columns).
//
// An implicit GEMM per phase of the stride (gather.cuh), ending in one of endings.cuh: stored through a chain of
// pointwise functions, stored with the statistics of GroupNorm, or reduced to the minimum over channels.
#include "axis.cuh"
#include "block_math.cuh"
#include "endings.cuh"
#include "gather.cuh"

namespace rawkern {

template <class Math, class Chain>
using Forward = Gather<TransposedMap, Math, Store<Math, Chain>>;

template <class Math, class Chain>
using ForwardWithMoments = Gather<TransposedMap, Math, StoreWithMoments<Math, Chain>>;

template <class Math>
using ForwardChannelMin = Gather<TransposedMap, Math, ChannelMin<Math>>;

}  // namespace rawkern
