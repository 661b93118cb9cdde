// Input gradient of the transposed convolution: an ordinary convolution of grad_output with the same weights,
//     gx[n, ci, hi, wi] = sum gy[n, co, hi stride - padding + kh dilation, ...] w[ci, co, kh, kw].
//
// The same implicit GEMM as the forward pass (gather.cuh) with one phase, the channels' roles exchanged and no
// epilogue.
#include "axis.cuh"
#include "block_math.cuh"
#include "endings.cuh"
#include "gather.cuh"

namespace rawkern {

template <class Math>
using InputGradient = Gather<ConvolutionMap, Math, Store<Math, Chain<0, 0>>>;

}  // namespace rawkern
