// Repacks weights for warpgroup_gather.cuh, in the order in which its blocks read them: for each unit of 64
// output channels, each pass, each slab of input channels and each step (tap) of the pass one tile of 64 rows of 128
// bytes, swizzled as wgmma.cuh says, rounded to the operand format or split, padded with zeros.
//
// Where the copy engine stages the input, the first block also makes the map by which it does.
//
// One thread per 16 bytes; writes are coalesced, reads follow the weights' own strides. The weights are small (and stay
// in the L2 cache for the kernel that follows), so this is a few microseconds. Meant for sm_90a, runs anywhere.
#include "warpgroup_tile.cuh"
#include "wgmma.cuh"

namespace rawkern {

template <class T, bool kSplit>
struct WarpgroupPackWeight {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 2;
  static constexpr int kRows = 64;
  using Row = OperandRow<T, kSplit>;
  static constexpr int kUnit = Row::kUnitValues;

  struct Params {
    const void* weight;
    void* packed;
    int64 group_stride, depth_stride, row_stride, tap_strides[2];
    int64 count;  // of units
    int depth, rows, units_per_group, slabs, passes, kernel_w;
    short pass_step[kMaxPhases + 1];  // first step of each pass
    short tap[kMaxSteps];             // of each step: kh * kernel_w + kw
    TensorMap* map;
    TensorParams input;  // what the map is of
  };

  __device__ static void run(const Params& p) {
    int64 index = linear_block() * kThreads + threadIdx.x;
    if (p.map && index < kWarp) {
      RAWKERN_SHARED(TensorMap, map);
      make_tensor_map<T, !kSplit>(p.map, map, p.input);
    }
    if (index >= p.count) return;
    int unit = int(index % Row::kUnits), row = int(index / Row::kUnits % kRows);
    int64 tile = index / (Row::kUnits * kRows);
    int steps = p.pass_step[p.passes], per_unit = steps * p.slabs;
    int64 block = tile / per_unit;
    int within = int(tile - block * per_unit), pass = 0;
    while (within >= p.pass_step[pass + 1] * p.slabs) ++pass;
    within -= p.pass_step[pass] * p.slabs;
    int pass_steps = p.pass_step[pass + 1] - p.pass_step[pass];
    int slab = within / pass_steps, tap = p.tap[p.pass_step[pass] + within % pass_steps];
    int channel = slab * Row::kChannels + unit * kUnit, out = int(block % p.units_per_group) * kRows + row;
    const T* source = static_cast<const T*>(p.weight) + block / p.units_per_group * p.group_stride +
                      out * p.row_stride + tap / p.kernel_w * p.tap_strides[0] + tap % p.kernel_w * p.tap_strides[1];
    T values[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i)
      values[i] = out < p.rows && channel + i < p.depth ? source[(channel + i) * p.depth_stride] : T{};
    unsigned char* to = static_cast<unsigned char*>(p.packed) + tile * (kRows * kSwizzledRow);
    Row::store(to, row, unit, values);
  }
};

}  // namespace rawkern
