// Transposed convolution, forward, for few channels per group:
//     y[n, co, ho, wo] = bias[co] + sum x[n, ci, hi, wi] w[ci, co, kh, kw]
// over all taps for which hi = (ho + padding - kh dilation) / stride is a row of the input (and likewise the columns).
//
// By direct.cuh, for any sizes, or by direct_tile.cuh or, where a channel comes from one, direct_walk.cuh, compiled for
// one kernel size and stride; ending in one of direct_endings.cuh.
#include "direct.cuh"
#include "direct_tile.cuh"
#include "direct_walk.cuh"

namespace rawkern {

template <class T, int kRows, int kPixels, class Chain>
using DirectForward = Direct<TransposedMap, T, kRows, kPixels, DirectStore<T, Chain>>;

template <class T, int kRows, int kPixels, class Chain>
using DirectForwardWithMoments = Direct<TransposedMap, T, kRows, kPixels, DirectStoreWithMoments<T, Chain>>;

template <class T, int kRows, int kPixels>
using DirectForwardChannelMin = Direct<TransposedMap, T, kRows, kPixels, DirectChannelMin<T, kPixels>>;

// Height and Width are TransposedAxis<kernel, stride, dilation>.
template <class T, class Height, class Width, class Shape, class Chain>
using DirectTileForward = DirectTile<T, Height, Width, Shape, DirectStore<T, Chain>>;

template <class T, class Height, class Width, class Shape, class Chain>
using DirectTileForwardWithMoments = DirectTile<T, Height, Width, Shape, DirectStoreWithMoments<T, Chain>>;

template <class T, class Height, class Width, class Shape, class Chain>
using DirectWalkForward = DirectWalk<T, Height, Width, Shape, WalkStore<T, Chain, Shape::kColumns>>;

template <class T, class Height, class Width, class Shape, class Chain>
using DirectWalkForwardWithMoments =
    DirectWalk<T, Height, Width, Shape, WalkStoreWithMoments<T, Chain, Shape::kColumns>>;

}  // namespace rawkern
