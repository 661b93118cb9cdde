// Input gradient of the transposed convolution for few channels per group: an ordinary convolution of grad_output,
//     gx[n, ci, hi, wi] = sum gy[n, co, hi stride - padding + kh dilation, ...] w[ci, co, kh, kw].
//
// By direct.cuh, for any sizes, or by direct_tile.cuh or direct_walk.cuh, compiled for one kernel size and stride, with
// the channels' roles exchanged.
#include "direct.cuh"
#include "direct_tile.cuh"
#include "direct_walk.cuh"

namespace rawkern {

template <class T, int kRows, int kPixels>
using DirectInputGradient = Direct<ConvolutionMap, T, kRows, kPixels, DirectStore<T, Chain<0, 0>>>;

// Height and Width are ConvolutionAxis<kernel, stride, dilation>.
template <class T, class Height, class Width, class Shape>
using DirectTileInputGradient = DirectTile<T, Height, Width, Shape, DirectStore<T, Chain<0, 0>>>;

template <class T, class Height, class Width, class Shape>
using DirectWalkInputGradient = DirectWalk<T, Height, Width, Shape, WalkStore<T, Chain<0, 0>, Shape::kColumns>>;

}  // namespace rawkern
