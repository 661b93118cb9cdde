// Matrix products of one warpgroup (four warps) on Hopper's tensor cores: D += A B, with A 64 x k, B k x N, D in float.
//
// Both operands lie in shared memory, K-major with 128-byte swizzle: one row of 128 bytes per row of A (or column of
// B), that is 32 TF32 values or 64 values of a 16-bit type along k, rows one after the other; the 16-byte unit u of the
// row at address a is found at unit u ^ (a / 128 % 8). The buffer is aligned to 1024 bytes. One instruction takes 32
// bytes of k: 8 TF32 or 16 16-bit values. An operand may begin at any row and at any multiple of 32 bytes within it, by
// moving the descriptor: that the first row need not be a multiple of 8 is not in the PTX ISA, which has the
// base-offset field for it; measured on an H200, the swizzle follows the address's bits and the field must stay 0.
//
// The product is asynchronous: wgmma_fence() before the first one that uses registers written by ordinary code,
// wgmma_commit() closes a group, wgmma_wait<n>() waits until at most n groups are under way. With w the warp within the
// warpgroup, g = lane / 4 and t = lane % 4, a thread's d[4 j + 2 r + i] is (row 16 w + 8 r + g, column 8 j + 2 t + i).
// (PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".) Operands are rounded to TF32, or
// split, when they are staged, by OperandRow::store() or the copy engine (tensor_copy.cuh); the unit ignores the 13 low
// bits. sm_90a only.
#pragma once
#include "mma.cuh"
#include "opaque.cuh"

namespace rawkern {

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kSwizzledRow = 128;  // bytes

// Where the 16-byte unit `unit` of row `row` lies in a buffer of such rows, in bytes.
__host__ __device__ constexpr int swizzled(int row, int unit) { return row * kSwizzledRow + ((unit ^ (row & 7)) << 4); }

struct alignas(16) Unit {
  unsigned words[4];
};
__device__ inline Unit& unit_at(unsigned char* buffer, int row, int unit) {
  return *reinterpret_cast<Unit*>(buffer + swizzled(row, unit));
}
// A unit of an operand: four values, which are rounded unless they are already, or eight of a 16-bit type.
template <bool kRounded>
__device__ inline Unit operand_unit(const float (&values)[4]) {
  Unit unit;
#pragma unroll
  for (int i = 0; i < 4; ++i) unit.words[i] = kRounded ? __float_as_uint(values[i]) : tf32_operand(values[i]);
  return unit;
}
template <bool kRounded, class T>
__device__ inline Unit operand_unit(const T (&values)[8]) {
  Unit unit;
#pragma unroll
  for (int i = 0; i < 4; ++i) unit.words[i] = unsigned(values[2 * i].bits) | unsigned(values[2 * i + 1].bits) << 16;
  return unit;
}

// What one row of 128 bytes of an operand holds of values of type T: kChannels of them, in kUnits units. kSplit: floats
// in two parts (split_tf32), the low ones kLow bytes after the high ones.
template <class T, bool kSplit>
struct OperandRow {
  static_assert(!kSplit || sizeof(T) == 4, "16-bit values are not split");
  static constexpr int kUnits = kSwizzledRow / 16 / (kSplit ? 2 : 1), kUnitValues = 16 / sizeof(T);
  static constexpr int kChannels = kUnits * kUnitValues, kLow = kSwizzledRow / 2;

  // Stores the values of unit `unit` of row `row`. kRounded: those that are not split are rounded already.
  template <bool kRounded = false>
  __device__ static void store(unsigned char* buffer, int row, int unit, const T (&values)[kUnitValues]) {
    if constexpr (kSplit) {
      Unit high, low;
      split_tf32(values, high.words, low.words);
      unit_at(buffer, row, unit) = high;
      unit_at(buffer, row, unit + kUnits) = low;
    } else {
      unit_at(buffer, row, unit) = operand_unit<kRounded>(values);
    }
  }
};

#if RAWKERN_GPU

// The descriptor of an operand that begins at `start`. Its upper word is a constant and stays one when it is advanced,
// since nothing is carried out of an address in shared memory: instructions that compute it would delay the product.
__device__ inline uint64 descriptor_of(unsigned low) {
  constexpr uint64 kGroupStride = 8 * kSwizzledRow >> 4, kSwizzle128 = 1;
  return low | kGroupStride << 32 | kSwizzle128 << 62;
}
__device__ inline uint64 matrix_descriptor(const void* start) {
  return descriptor_of(shared_address(start) >> 4 | 1u << 16);
}
__device__ inline uint64 advance_descriptor(uint64 descriptor, int bytes) {
  return descriptor_of(unsigned(descriptor) + (bytes >> 4));
}
// Makes the compiler compute a descriptor here, not where it is used.
__device__ inline uint64 computed_descriptor(uint64 descriptor) {
  return descriptor_of(unsigned(opaque(int(descriptor))));
}

__device__ inline uint64 uniform_descriptor(uint64 descriptor) {
  return descriptor_of(__shfl_sync(kFullMask, unsigned(descriptor), 0));
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kGroups>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}
// Keeps the compiler from moving accesses to accumulators across this place.
template <int kCount>
__device__ inline void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <class Operand, int kColumns>
struct Wgmma;

// clang-format off
#define RAWKERN_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define RAWKERN_D24(i) RAWKERN_D8(i), RAWKERN_D8(i + 8), RAWKERN_D8(i + 16)
#define RAWKERN_D32(i) RAWKERN_D24(i), RAWKERN_D8(i + 24)
#define RAWKERN_D48(i) RAWKERN_D24(i), RAWKERN_D24(i + 24)
#define RAWKERN_D64(i) RAWKERN_D32(i), RAWKERN_D32(i + 32)
#define RAWKERN_D96(i) RAWKERN_D48(i), RAWKERN_D48(i + 48)
#define RAWKERN_D128(i) RAWKERN_D64(i), RAWKERN_D64(i + 64)
#define RAWKERN_LIST_24 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23"
#define RAWKERN_LIST_32 RAWKERN_LIST_24 ", " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define RAWKERN_LIST_48 RAWKERN_LIST_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define RAWKERN_LIST_64 RAWKERN_LIST_48 ", " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define RAWKERN_LIST_96 RAWKERN_LIST_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define RAWKERN_LIST_128 RAWKERN_LIST_96 ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define RAWKERN_WGMMA(Operand, columns, registers, a, b, add, types, transposes) \
  template <> \
  struct Wgmma<Operand, columns> { \
    template <bool kAdd> \
    __device__ static void run(float (&d)[registers], uint64 left, uint64 right) { \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #add ", 0; " \
                   "wgmma.mma_async.sync.aligned.m64n" #columns types " {" RAWKERN_LIST_##registers "}, " \
                   "%" #a ", %" #b ", p, 1, 1" transposes "; }" \
                   : RAWKERN_D##registers(0) \
                   : "l"(left), "l"(right), "n"(int(kAdd))); \
    } \
  };
#define RAWKERN_WGMMAS(columns, registers, a, b, add) \
  RAWKERN_WGMMA(Tf32, columns, registers, a, b, add, "k8.f32.tf32.tf32", "") \
  RAWKERN_WGMMA(Half, columns, registers, a, b, add, "k16.f32.f16.f16", ", 0, 0") \
  RAWKERN_WGMMA(BFloat16, columns, registers, a, b, add, "k16.f32.bf16.bf16", ", 0, 0")
RAWKERN_WGMMAS(48, 24, 24, 25, 26)
RAWKERN_WGMMAS(64, 32, 32, 33, 34)
RAWKERN_WGMMAS(96, 48, 48, 49, 50)
RAWKERN_WGMMAS(128, 64, 64, 65, 66)
RAWKERN_WGMMAS(192, 96, 96, 97, 98)
RAWKERN_WGMMAS(256, 128, 128, 129, 130)
#undef RAWKERN_WGMMAS
#undef RAWKERN_WGMMA
#undef RAWKERN_LIST_24
#undef RAWKERN_LIST_32
#undef RAWKERN_LIST_48
#undef RAWKERN_LIST_64
#undef RAWKERN_LIST_96
#undef RAWKERN_LIST_128
#undef RAWKERN_D8
#undef RAWKERN_D24
#undef RAWKERN_D32
#undef RAWKERN_D48
#undef RAWKERN_D64
#undef RAWKERN_D96
#undef RAWKERN_D128
// clang-format on

// Without kAdd, D = A B.
template <class Operand, bool kAdd = true, int kRegisters>
__device__ inline void wgmma(float (&d)[kRegisters], uint64 left, uint64 right) {
  Wgmma<Operand, 2 * kRegisters>::template run<kAdd>(d, left, right);
}

#else

// A descriptor is the address itself.
inline uint64 matrix_descriptor(const void* start) { return uint64(uintptr_t(start)); }
inline uint64 advance_descriptor(uint64 descriptor, int bytes) { return descriptor + uint64(int64(bytes)); }
inline uint64 computed_descriptor(uint64 descriptor) { return descriptor; }
inline uint64 uniform_descriptor(uint64 descriptor) { return descriptor; }
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int kGroups>
inline void wgmma_wait() {}
template <int kCount>
inline void pin(float (&)[kCount]) {}

namespace emulator {

// 32 bytes of k of a row, as floats, from where the swizzle put them.
template <class Operand>
inline void read_row(float (&values)[8 * WordValues<Operand>::kCount], uint64 start, int row) {
  using Values = WordValues<Operand>;
  for (int word = 0; word < 8; ++word) {
    uint64 address = start + uint64(row) * kSwizzledRow + word * 4;
    address ^= (address >> 7 & 7) << 4;
    unsigned bits = *reinterpret_cast<const unsigned*>(uintptr_t(address));
    for (int i = 0; i < Values::kCount; ++i) values[word * Values::kCount + i] = Values::get(bits, i);
  }
}

// The last lane of a warp to arrive computes the warp's 16 rows, into all lanes' registers.
template <class Operand, bool kAdd, int kRegisters>
inline void wgmma(float (&d)[kRegisters], uint64 left, uint64 right, Place place) {
  constexpr int kDepth = 8 * WordValues<Operand>::kCount, kColumns = 2 * kRegisters;
  Warp& warp = this_warp();
  unsigned char (*slots)[kSlotBytes] = warp.slot[warp.generation & 1];
  float* own = d;
  memcpy(slots[lane_id()], &own, sizeof own);
  int first_row = block->current / kWarpSize % 4 * 16;
  warp_barrier(place, [=] {
    float a[16][kDepth], column[kDepth], b[kDepth][kColumns], sum[kColumns];
    for (int row = 0; row < 16; ++row) read_row<Operand>(a[row], left, first_row + row);
    for (int n = 0; n < kColumns; ++n) {
      read_row<Operand>(column, right, n);
      for (int k = 0; k < kDepth; ++k) b[k][n] = column[k];
    }
    for (int row = 0; row < 16; ++row) {
      for (float& value : sum) value = 0;
      for (int k = 0; k < kDepth; ++k)
        for (int n = 0; n < kColumns; ++n) sum[n] += a[row][k] * b[k][n];
      for (int n = 0; n < kColumns; ++n) {
        float* to;
        memcpy(&to, slots[row % 8 * 4 + n % 8 / 2], sizeof to);
        float& value = to[n / 8 * 4 + row / 8 * 2 + n % 2];
        value = (kAdd ? value : 0) + sum[n];
      }
    }
  });
}

}  // namespace emulator

template <class Operand, bool kAdd = true, int kRegisters>
inline void wgmma(float (&d)[kRegisters], uint64 left, uint64 right) {
  emulator::wgmma<Operand, kAdd>(d, left, right, RAWKERN_PLACE);
}

#endif

}  // namespace rawkern
