// How a block multiplies: accumulators (rows x columns) += A (rows x depth) B (depth x columns), one slab of depth at a
// time.
//
// Two kinds with one interface. Simt uses ordinary multiply-adds in float or double (precision "ieee"); TensorCore uses
// mma.sync on TF32, half or bfloat16 operands (see mma.cuh). Both read a slab from shared memory as words
//     a[word][row], b[word][column]
// where a word holds kPack neighbouring values of depth: one, or two 16-bit values. Both give each thread a product set
// of rows and columns: value (i, j) of the accumulators belongs to row(i), column(j); the threads that share their rows
// have the same row_group() and differ in column_group(), and the other way round. Endings (endings.cuh) and reductions
// are written against that, once. kRun > 0 asks that no more than kRun slabs be summed in one go: the rounding error of
// a sum grows with its length, and a sum of sums is short. column(j) ... column(j + kColumnRun - 1) are neighbours
// where kColumnRun divides j.
#pragma once
#include "mma.cuh"

namespace rawkern {

// N neighbouring words that move as one shared-memory access.
template <class Word, int N>
struct alignas(sizeof(Word) * N) Words {
  Word at[N];
};

template <class Word_, int kWords_, int kStrideA, int kStrideB>
struct alignas(16) Slab {
  Word_ a[kWords_][kStrideA];
  Word_ b[kWords_][kStrideB];
};

// Each thread multiplies kThreadM x kThreadN values. Its rows (and columns) come in runs of up to 16 bytes that a
// vector load fetches; runs of neighbouring groups are neighbours. What multiply-adds wait for is shared memory: a load
// of 16 bytes takes a warp four cycles, or two where lanes i and i ^ 1, or lanes i and i ^ 2, read the same. So a warp
// covers 4 groups of rows by 8 of columns, lanes i and i ^ 1 having the columns in common and i and i ^ 2 the rows, and
// half a warp reads 128 different bytes at most. With 8 x 8 values of float that is 8 cycles of the multiprocessor per
// warp for 64 multiply-adds, which take it 16. Operands are read one step ahead of their use.
//
// Rows of shared memory are 16 bytes longer than the block, so that 16 bytes each of 8 words can be written at once.
template <class T, int kBlockM_, int kBlockN_, int kThreadM, int kThreadN, int kWords_, int kRun_ = 0>
struct Simt {
  using Element = T;
  using Value = Accumulator<T>;
  using Word = Value;
  static constexpr int kPack = 1;
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kWords = kWords_;
  static constexpr int kRows = kThreadM, kColumns = kThreadN;
  static constexpr int kRowGroups = kBlockM / kThreadM, kColumnGroups = kBlockN / kThreadN;
  static constexpr int kThreads = kRowGroups * kColumnGroups;
  static constexpr int kMinBlocks = kThreads <= 128 && kRun_ > 0 ? 3 : 2;
  static constexpr int kRun = kRun_;
  static constexpr bool kAsync = true;  // words are elements as they are, which need not pass the registers
  static constexpr int kStages = 3;
  static constexpr bool kAhead = sizeof(T) == 4;  // twice the operands are more registers than doubles have
  static constexpr int kColumnRun = kThreadN * int(sizeof(Word)) < 16 ? kThreadN : 16 / int(sizeof(Word));
  static constexpr int kLaneRows = kRowGroups % 4 == 0 && kColumnGroups % 8 == 0 ? 4 : 1;
  static constexpr int kStripPad = kLaneRows == 4 ? 64 / int(sizeof(Word)) : 8;
  static constexpr int kPad = 16 / int(sizeof(Word));
  using Tile = Slab<Word, kWords, kBlockM + kPad, kBlockN + kPad>;

  struct Accumulators {
    Value value[kRows][kColumns];
    __device__ Value& at(int i, int j) { return value[i][j]; }
  };

  struct Operands {
    Value a[kRows], b[kColumns];
  };

  __host__ __device__ static constexpr int run_length(int count) {
    return count * int(sizeof(Word)) < 16 ? count : 16 / int(sizeof(Word));
  }
  static constexpr int kRunM = run_length(kThreadM), kRunN = kColumnRun;

  __device__ static int row_group() {
    if (kLaneRows == 1) return threadIdx.x / kColumnGroups;
    return threadIdx.x / kWarp / (kColumnGroups / 8) * 4 + threadIdx.x % kWarp / 16 * 2 + threadIdx.x % 2;
  }
  __device__ static int column_group() {
    if (kLaneRows == 1) return threadIdx.x % kColumnGroups;
    return threadIdx.x / kWarp % (kColumnGroups / 8) * 8 + threadIdx.x % 16 / 2;
  }
  __device__ static int row_of(int group, int i) {
    return i / kRunM * (kRowGroups * kRunM) + group * kRunM + i % kRunM;
  }
  __device__ static int row(int i) { return row_of(row_group(), i); }
  __device__ static int column(int j) {
    return j / kRunN * (kColumnGroups * kRunN) + column_group() * kRunN + j % kRunN;
  }

  __device__ static Word make_word(const Value (&values)[kPack]) { return values[0]; }

  __device__ static void read(Operands& operands, const Tile& tile, int k) {
#pragma unroll
    for (int i = 0; i < kRows; i += kRunM) {
      auto run = *reinterpret_cast<const Words<Word, kRunM>*>(&tile.a[k][row(i)]);
#pragma unroll
      for (int r = 0; r < kRunM; ++r) operands.a[i + r] = run.at[r];
    }
#pragma unroll
    for (int j = 0; j < kColumns; j += kRunN) {
      auto run = *reinterpret_cast<const Words<Word, kRunN>*>(&tile.b[k][column(j)]);
#pragma unroll
      for (int r = 0; r < kRunN; ++r) operands.b[j + r] = run.at[r];
    }
  }

  __device__ static void add_products(Accumulators& sum, const Operands& operands) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum.value[i][j] += operands.a[i] * operands.b[j];
  }

  __device__ static void multiply(Accumulators& sum, const Tile& tile) {
    if constexpr (kAhead) {
      Operands operands[2];
      read(operands[0], tile, 0);
#pragma unroll
      for (int k = 0; k < kWords; ++k) {
        if (k + 1 < kWords) read(operands[(k + 1) % 2], tile, k + 1);
        add_products(sum, operands[k % 2]);
      }
    } else {
#pragma unroll 2
      for (int k = 0; k < kWords; ++k) {
        Operands operands;
        read(operands, tile, k);
        add_products(sum, operands);
      }
    }
  }
};

template <class Operand>
struct OperandWord {
  static constexpr int kPack = 2;
  __device__ static unsigned make(const float (&values)[2]) {
    return unsigned(from_accumulator<Operand>(values[0]).bits) | unsigned(from_accumulator<Operand>(values[1]).bits)
                                                                     << 16;
  }
};
template <>
struct OperandWord<Tf32> {
  static constexpr int kPack = 1;
  __device__ static unsigned make(const float (&values)[1]) { return tf32_round(values[0]); }
};

// kWarpsM x kWarpsN warps, each with a rectangle of 16 x 8 products. Rows of shared memory are 8 words longer than the
// block: then word t and row g of a fragment lie in bank 8 t + g, all 32 different.
template <class T, class Operand, int kBlockM_, int kBlockN_, int kWarpsM, int kWarpsN, int kWords_>
struct TensorCore {
  using Element = T;
  using Value = float;
  using Word = unsigned;
  static constexpr int kPack = OperandWord<Operand>::kPack;
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kWords = kWords_;
  static constexpr int kProductsM = kBlockM / kWarpsM / 16, kProductsN = kBlockN / kWarpsN / 8;
  static constexpr int kRows = 2 * kProductsM, kColumns = 2 * kProductsN;
  static constexpr int kRowGroups = kWarpsM * 8, kColumnGroups = kWarpsN * 4;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarp;
  static constexpr int kMinBlocks = 2;
  static constexpr int kRun = 0;
  static constexpr bool kAsync = false;  // words are made of elements in registers
  static constexpr int kStages = 2;
  static constexpr int kColumnRun = 2;
  static constexpr int kStripPad = 8;
  static constexpr int kPad = 8;
  using Tile = Slab<Word, kWords, kBlockM + kPad, kBlockN + kPad>;

  struct Accumulators {
    float value[kProductsM][kProductsN][4];
    __device__ float& at(int i, int j) { return value[i / 2][j / 2][i % 2 * 2 + j % 2]; }
  };

  __device__ static int lane_row() { return threadIdx.x % kWarp / 4; }
  __device__ static int lane_column() { return threadIdx.x % 4; }
  __device__ static int warp_m() { return threadIdx.x / kWarp / kWarpsN; }
  __device__ static int warp_n() { return threadIdx.x / kWarp % kWarpsN; }
  __device__ static int row_group() { return warp_m() * 8 + lane_row(); }
  __device__ static int column_group() { return warp_n() * 4 + lane_column(); }
  __device__ static int row_of(int group, int i) {
    return (group / 8 * kProductsM + i / 2) * 16 + i % 2 * 8 + group % 8;
  }
  __device__ static int row(int i) { return row_of(row_group(), i); }
  __device__ static int column(int j) { return (warp_n() * kProductsN + j / 2) * 8 + lane_column() * 2 + j % 2; }

  __device__ static Word make_word(const float (&values)[kPack]) { return OperandWord<Operand>::make(values); }

  __device__ static void multiply(Accumulators& sum, const Tile& tile) {
    int g = lane_row(), t = lane_column();
#pragma unroll 1  // unrolled, the next fragments take registers that sm_80 does not have
    for (int k = 0; k < kWords; k += 8) {
      unsigned a[kProductsM][4], b[kProductsN][2];
#pragma unroll
      for (int m = 0; m < kProductsM; ++m) {
        int row = (warp_m() * kProductsM + m) * 16 + g;
        a[m][0] = tile.a[k + t][row];
        a[m][1] = tile.a[k + t][row + 8];
        a[m][2] = tile.a[k + t + 4][row];
        a[m][3] = tile.a[k + t + 4][row + 8];
      }
#pragma unroll
      for (int n = 0; n < kProductsN; ++n) {
        int column = (warp_n() * kProductsN + n) * 8 + g;
        b[n][0] = tile.b[k + t][column];
        b[n][1] = tile.b[k + t + 4][column];
      }
#pragma unroll
      for (int m = 0; m < kProductsM; ++m)
#pragma unroll
        for (int n = 0; n < kProductsN; ++n) mma_16x8<Operand>(sum.value[m][n], a[m], b[n]);
    }
  }
};

template <class Math>
__device__ inline void clear(typename Math::Accumulators& sum) {
#pragma unroll
  for (int i = 0; i < Math::kRows; ++i)
#pragma unroll
    for (int j = 0; j < Math::kColumns; ++j) sum.at(i, j) = 0;
}

template <class Math>
__device__ inline void add(typename Math::Accumulators& total, typename Math::Accumulators& sum) {
#pragma unroll
  for (int i = 0; i < Math::kRows; ++i)
#pragma unroll
    for (int j = 0; j < Math::kColumns; ++j) total.at(i, j) += sum.at(i, j);
}

// A strip of accumulators in shared memory: row i of every row group, all columns of the block. Rows are kStripPad
// values longer than the block, which keeps both kinds' writes free of bank conflicts.
template <class Math>
struct alignas(16) Strip {
  typename Math::Value at[Math::kRowGroups][Math::kBlockN + Math::kStripPad];

  // Writes the strip's values; the loop over strips may stay rolled although registers are indexed by constants.
  __device__ void fill(typename Math::Accumulators& sum, int i) {
    constexpr int kRun = Math::kColumnRun;
#pragma unroll
    for (int k = 0; k < Math::kRows; ++k) {
      if (k != i) continue;
#pragma unroll
      for (int j = 0; j < Math::kColumns; j += kRun) {
        Words<typename Math::Value, kRun> run;
#pragma unroll
        for (int r = 0; r < kRun; ++r) run.at[r] = sum.at(k, j + r);
        *reinterpret_cast<Words<typename Math::Value, kRun>*>(&at[Math::row_group()][Math::column(j)]) = run;
      }
    }
  }
};

}  // namespace rawkern
