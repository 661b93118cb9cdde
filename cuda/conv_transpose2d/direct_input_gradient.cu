// Input gradient of the transposed convolution for few channels per group: an ordinary convolution of grad_output,
//     gx[n, ci, hi, wi] = sum gy[n, co, hi stride - padding + kh dilation, ...] w[ci, co, kh, kw].
//
// By direct.cuh, for any sizes, or direct_tile.cuh, compiled for one, with the channels' roles exchanged.
#include "direct.cuh"
#include "direct_tile.cuh"

namespace rawkern {

template <class T, int kRows, int kPixels>
using DirectInputGradient = Direct<ConvolutionMap, T, kRows, kPixels, DirectStore<T, Chain<0, 0>>>;

// Height and Width are ConvolutionAxis<kernel, stride, dilation>.
template <class T, class Height, class Width, class Shape>
using DirectTileInputGradient = DirectTile<T, Height, Width, Shape, DirectStore<T, Chain<0, 0>>>;

}  // namespace rawkern
