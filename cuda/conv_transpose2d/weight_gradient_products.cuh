// How a warpgroup multiplies two swizzled tiles of shared memory (wgmma.cuh): sum (64 x columns) += left right^T, both
// with rows of 128 bytes of depth.
//
// Two kinds with one interface. WarpProducts uses mma.sync (sm_80 and later): its four warps take 32 rows and half of
// the columns each; the swizzle spreads a fragment's words over all banks. WarpgroupProducts uses wgmma (sm_90a), whose
// products are asynchronous: those of one call of multiply() may be under way until the next but one call of
// await_previous(). Accumulators come in pairs of neighbouring columns: pair i lies in row(i), column(i) and the next.
#pragma once
#include "block_math.cuh"
#include "mbarrier.cuh"
#include "wgmma.cuh"

namespace rawkern {

template <class T, int kColumns_>
struct WarpProducts {
  using Element = T;
  using Operand = typename OperandOf<T>::type;
  static constexpr bool kAsynchronous = false;
  static constexpr int kColumns = kColumns_, kPairs = kColumns / 4, kProducts = kColumns / 16;

  struct Accumulators {
    float value[2][kProducts][4];
    __device__ float& at(int pair, int i) { return value[pair / 2 % 2][pair / 4][pair % 2 * 2 + i]; }
  };

  __device__ static int first_row() { return threadIdx.x / kWarp % 4 / 2 * 32 + threadIdx.x % kWarp / 4; }
  __device__ static int first_column() { return threadIdx.x / kWarp % 2 * (kColumns / 2); }
  __device__ static int row(int pair) { return first_row() + pair % 4 * 8; }
  __device__ static int column(int pair) { return first_column() + pair / 4 * 8 + threadIdx.x % 4 * 2; }

  __device__ static void publish() {}
  __device__ static void await_previous() {}
  __device__ static void finish(Accumulators&) {}

  // The unit's word t of the fragment's row; `row` is that of the lane, whose place within eight rows is the swizzle.
  __device__ static unsigned word(const unsigned char* tile, int row, int unit) {
    return *reinterpret_cast<const unsigned*>(tile + swizzled(row, unit) + threadIdx.x % 4 * 4);
  }

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

template <class T, int kColumns_>
struct WarpgroupProducts {
  using Element = T;
  using Operand = typename OperandOf<T>::type;
  static constexpr bool kAsynchronous = true;
  static constexpr int kColumns = kColumns_, kPairs = kColumns / 4;

  struct Accumulators {
    float value[2 * kPairs];
    __device__ float& at(int pair, int i) { return value[pair * 2 + i]; }
  };

  __device__ static int row(int pair) { return threadIdx.x / kWarp % 4 * 16 + pair % 2 * 8 + threadIdx.x % kWarp / 4; }
  __device__ static int column(int pair) { return pair / 2 * 8 + threadIdx.x % 4 * 2; }

  // Makes what this thread stored visible to the tensor cores, at the barrier that follows.
  __device__ static void publish() { fence_async_proxy(); }
  __device__ static void await_previous() { wgmma_wait<1>(); }
  __device__ static void finish(Accumulators& sum) {
    wgmma_wait<0>();
    pin(sum.value);
  }

  // Products are committed where they are issued: the assembler closes a group at the end of a basic block by itself,
  // and await_previous() would count it.
  __device__ static void multiply(Accumulators& sum, const unsigned char* left, const unsigned char* right,
                                  bool active) {
    if (active) {
      uint64 a = matrix_descriptor(left), b = matrix_descriptor(right);
      wgmma_fence();
#pragma unroll
      for (int bytes = 0; bytes < kSwizzledRow; bytes += 32)
        wgmma<Operand>(sum.value, advance_descriptor(a, bytes), advance_descriptor(b, bytes));
      wgmma_commit();
    } else {
      wgmma_wait<0>();  // no group of this call's, by which await_previous() could count
    }
  }
};

}  // namespace rawkern
