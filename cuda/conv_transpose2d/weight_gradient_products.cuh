// How a warpgroup multiplies two swizzled tiles of shared memory (wgmma.cuh): sum (64 x columns) += left right^T, both
// with rows of 128 bytes of depth.
//
// Three kinds with one interface. WarpProducts uses mma.sync (sm_80 and later): its four warps take 32 rows and half of
// the columns each; the swizzle spreads a fragment's words over all banks. WarpgroupProducts uses wgmma (sm_90a), whose
// products are asynchronous: those of one step may be under way until the end of the next. SplitWarpgroupProducts does
// the same with floats in two parts (split_tf32): behind a tile of high parts lies one of as many rows of low ones. A
// step's low * high + high * low + high * high are summed from zero, the small products first, because the tensor cores
// cut what they add towards zero; the next step adds them to the total in registers. multiply() does the halves kFirst
// to kLast of a step's products, end_step() is called after them. Accumulators come in pairs of neighbouring columns:
// pair i lies in row(i), column(i) and the next.
#pragma once
#include "block_math.cuh"
#include "mbarrier.cuh"
#include "wgmma.cuh"

namespace rawkern {

template <class T, int kColumns_>
struct WarpProducts {
  using Element = T;
  using Operand = typename OperandOf<T>::type;
  static constexpr bool kAsynchronous = false, kSplit = false;
  static constexpr int kStages = 2;  // of gy's tiles
  static constexpr int kColumns = kColumns_, kPairs = kColumns / 4, kProducts = kColumns / 16, kHalves = 1;

  struct Accumulators {
    float value[2][kProducts][4];
    __device__ float& at(int pair, int i) { return value[pair / 2 % 2][pair / 4][pair % 2 * 2 + i]; }
  };

  __device__ static int first_row() { return threadIdx.x / kWarp % 4 / 2 * 32 + threadIdx.x % kWarp / 4; }
  __device__ static int first_column() { return threadIdx.x / kWarp % 2 * (kColumns / 2); }
  __device__ static int row(int pair) { return first_row() + pair % 4 * 8; }
  __device__ static int column(int pair) { return first_column() + pair / 4 * 8 + threadIdx.x % 4 * 2; }

  __device__ static void publish() {}
  __device__ static void end_step() {}
  __device__ static void finish(Accumulators&) {}

  // The unit's word t of the fragment's row; `row` is that of the lane, whose place within eight rows is the swizzle.
  __device__ static unsigned word(const unsigned char* tile, int row, int unit) {
    return *reinterpret_cast<const unsigned*>(tile + swizzled(row, unit) + threadIdx.x % 4 * 4);
  }

  // All products, of which there are no halves; kRows: of the buffer that the left tile lies in.
  template <int kRows, int kFirst, int kLast>
  __device__ static void multiply(Accumulators& sum, const unsigned char* left, const unsigned char* right,
                                  bool active) {
    if (!active) return;
    int own_row = first_row(), own_column = first_column() + threadIdx.x % kWarp / 4;
#pragma unroll 1  // unrolled, the next fragments take registers that there are not
    for (int unit = 0; unit < 8; unit += 2) {
      unsigned a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = word(left, own_row + m * 16 + i % 2 * 8, unit + i / 2);
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
        unsigned b[2] = {word(right, own_column + n * 8, unit), word(right, own_column + n * 8, unit + 1)};
#pragma unroll
        for (int m = 0; m < 2; ++m) mma_16x8<Operand>(sum.value[m][n], a[m], b);
      }
    }
  }
};

// How a warpgroup's accumulators lie in the registers of its threads.
template <int kColumns_>
struct WarpgroupAccumulators {
  static constexpr bool kAsynchronous = true;
  static constexpr int kStages = 3;
  static constexpr int kColumns = kColumns_, kPairs = kColumns / 4, kHalves = 2;

  __device__ static int row(int pair) { return threadIdx.x / kWarp % 4 * 16 + pair % 2 * 8 + threadIdx.x % kWarp / 4; }
  __device__ static int column(int pair) { return pair / 2 * 8 + threadIdx.x % 4 * 2; }

  // Makes what this thread stored visible to the tensor cores, at the barrier that follows.
  __device__ static void publish() { fence_async_proxy(); }
};

template <class T, int kColumns_>
struct WarpgroupProducts : WarpgroupAccumulators<kColumns_> {
  using Element = T;
  using Operand = typename OperandOf<T>::type;
  static constexpr bool kSplit = false;

  struct Accumulators {
    float value[kColumns_ / 2];
    __device__ float& at(int pair, int i) { return value[pair * 2 + i]; }
  };

  __device__ static void end_step() { wgmma_wait<1>(); }
  __device__ static void finish(Accumulators& sum) {
    wgmma_wait<0>();
    pin(sum.value);
  }

  // Products are committed where they are issued: the assembler closes a group at the end of a basic block by itself,
  // and end_step() would count it.
  template <int kRows, int kFirst, int kLast>
  __device__ static void multiply(Accumulators& sum, const unsigned char* left, const unsigned char* right,
                                  bool active) {
    if (active) {
      uint64 a = matrix_descriptor(left), b = matrix_descriptor(right);
      wgmma_fence();
#pragma unroll
      for (int bytes = kFirst * kSwizzledRow / 2; bytes < kLast * kSwizzledRow / 2; bytes += 32)
        wgmma<Operand>(sum.value, advance_descriptor(a, bytes), advance_descriptor(b, bytes));
      wgmma_commit();
    } else {
      wgmma_wait<0>();  // no group of this call's, by which end_step() could count
    }
  }
};

template <int kColumns_>
struct SplitWarpgroupProducts : WarpgroupAccumulators<kColumns_> {
  using Element = float;
  static constexpr bool kSplit = true;

  struct Accumulators {
    float total[kColumns_ / 2], run[kColumns_ / 2];
    bool pending = false;  // whether there is a run that is not in the total
    __device__ float& at(int pair, int i) { return total[pair * 2 + i]; }
  };

  __device__ static void end_step() {}
  __device__ static void finish(Accumulators& sum) {
    wgmma_wait<0>();
    pin(sum.run);
    if (!sum.pending) return;
#pragma unroll
    for (int i = 0; i < kColumns_ / 2; ++i) sum.total[i] += sum.run[i];
  }

  template <int kRows, int kFirst, int kLast>
  __device__ static void multiply(Accumulators& sum, const unsigned char* left, const unsigned char* right,
                                  bool active) {
    constexpr int kLow[3][2] = {{kRows * kSwizzledRow, 0}, {0, kColumns_ * kSwizzledRow}, {0, 0}};
    constexpr int kUnits = kSwizzledRow / 32;
    if (kFirst == 0) finish(sum);
    sum.pending = active;
    if (!active) return;
    uint64 a = matrix_descriptor(left), b = matrix_descriptor(right);
    wgmma_fence();
#pragma unroll
    for (int i = kFirst * 3 * kUnits / 2; i < kLast * 3 * kUnits / 2; ++i) {
      int product = i / kUnits, bytes = i % kUnits * 32;
      uint64 rows = advance_descriptor(a, kLow[product][0] + bytes);
      uint64 columns = advance_descriptor(b, kLow[product][1] + bytes);
      if (i == 0)
        wgmma<Tf32, false>(sum.run, rows, columns);
      else
        wgmma<Tf32>(sum.run, rows, columns);
    }
    wgmma_commit();
  }
};

}  // namespace rawkern
