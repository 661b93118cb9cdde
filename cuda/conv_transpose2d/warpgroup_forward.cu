// Transposed convolution, forward, on Hopper's tensor cores (see forward.cu for what is computed): warpgroup_gather.cuh
// with one of the endings of warpgroup_endings.cuh. Its input gradient is the same kernel, with the identity for a
// chain and other steps: an ordinary convolution is a gather as well.
#include "warpgroup_endings.cuh"
#include "warpgroup_gather.cuh"

namespace rawkern {

template <class T, bool kSplit, int kPhases, int kPixels, int kStageBytes, class Chain, int kVector, bool kSave>
using WarpgroupForward =
    WarpgroupGather<T, kSplit, kPhases, kPixels, kStageBytes, WarpgroupStore<T, Chain, kVector, kSave>>;

template <class T, bool kSplit, int kPhases, int kPixels, int kStageBytes, class Chain, int kVector>
using WarpgroupForwardWithMoments =
    WarpgroupGather<T, kSplit, kPhases, kPixels, kStageBytes, WarpgroupStoreWithMoments<T, Chain, kVector>>;

template <class T, bool kSplit, int kPhases, int kPixels, int kStageBytes>
using WarpgroupForwardChannelMin = WarpgroupGather<T, kSplit, kPhases, kPixels, kStageBytes, WarpgroupChannelMin<T>>;

}  // namespace rawkern
