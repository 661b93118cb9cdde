// Copies of boxes of a tensor from global to shared memory by Hopper's copy engine (TMA): one thread's instruction
// brings a box of up to five axes, with zeros for what lies outside of the tensor, and completes on an Mbarrier.
//
// What the engine has to know of the tensor is in a TensorMap. A warp makes it from a TensorParams, which the host
// fills in, and puts it into global memory; a kernel launched later calls acquire_tensor_map() before it copies. So no
// call of the driver's is needed, and the map is made anew with every launch. (PTX ISA, "tensormap.replace"; a map may
// be begun from zeros.) Float may be rounded to TF32 on its way, to nearest, ties to even.
//
// Where a box begins along the first axis must be a multiple of 16 bytes from the tensor's beginning, before it or
// after: measured on an H200, where anything else is an illegal instruction.
//
// In shared memory the box is dense, its first axis fastest; the destination is aligned to 128 bytes. With a swizzle
// the first axis has 128 bytes, and 16-byte unit u of what lies at address a is found at unit u ^ (a / 128 % 8), as
// wgmma.cuh has it; then the destination is aligned to 1024 bytes.
#pragma once
#include "mbarrier.cuh"
#include "mma.cuh"

namespace rawkern {

constexpr int kTensorAxes = 5;

// Axes from the one along which elements are neighbours.
struct TensorParams {
  const void* tensor;              // aligned to 16 bytes; null for no map at all
  int64 strides[kTensorAxes - 1];  // of the other axes, in bytes, multiples of 16
  int size[kTensorAxes];
  int box[kTensorAxes];   // at most 256 each; the first one a multiple of 16 bytes
  int step[kTensorAxes];  // a box takes every step-th element of its extent, the first axis all; at most 8
  int swizzle;            // whether boxes are swizzled
};

#if RAWKERN_GPU

struct alignas(128) TensorMap {
  unsigned words[32];
};

template <int kAxis = 0>
__device__ inline void set_tensor_axes(unsigned map, const TensorParams& p) {
  asm volatile("tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%0], %1, %2;" ::"r"(map), "n"(kAxis),
               "r"(p.box[kAxis])
               : "memory");
  asm volatile("tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], %1, %2;" ::"r"(map), "n"(kAxis),
               "r"(p.size[kAxis])
               : "memory");
  asm volatile("tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [%0], %1, %2;" ::"r"(map), "n"(kAxis),
               "r"(p.step[kAxis])
               : "memory");
  if constexpr (kAxis + 1 < kTensorAxes) {
    asm volatile("tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%0], %1, %2;" ::"r"(map), "n"(kAxis),
                 "l"(p.strides[kAxis])
                 : "memory");
    set_tensor_axes<kAxis + 1>(map, p);
  }
}

// To be called by all lanes of a warp. T: the tensor's element type, float or one of 16 bits; kRound: float is rounded
// to TF32.
template <class T, bool kRound = true>
__device__ inline void make_tensor_map(TensorMap* to, TensorMap& shared, const TensorParams& p) {
  constexpr int kElement = sizeof(T) == 2 ? 1 : kRound ? 11 : 2;  // TF32; else 16 or 32 bits, whatever they mean
  unsigned map = shared_address(&shared);
  shared.words[threadIdx.x % kWarp] = 0;
  to->words[threadIdx.x % kWarp] = 0;  // initcheck takes the copy below for a reader of what it writes
  __syncwarp();
  if (threadIdx.x % kWarp == 0) {
    asm volatile("tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%0], %1;" ::"r"(map), "l"(p.tensor)
                 : "memory");
    asm volatile("tensormap.replace.tile.rank.shared::cta.b1024.b32 [%0], %1;" ::"r"(map), "n"(kTensorAxes - 1)
                 : "memory");
    set_tensor_axes(map, p);
    asm volatile("tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [%0], %1;" ::"r"(map), "n"(kElement)
                 : "memory");
    asm volatile("tensormap.replace.tile.interleave_layout.shared::cta.b1024.b32 [%0], 0;" ::"r"(map) : "memory");
    if (p.swizzle)
      asm volatile("tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [%0], 3;" ::"r"(map) : "memory");
    else
      asm volatile("tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [%0], 0;" ::"r"(map) : "memory");
    asm volatile("tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [%0], 0;" ::"r"(map) : "memory");
  }
  __syncwarp();
  asm volatile(
      "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%0], [%1], 128;" ::"l"(
          to),
      "r"(map)
      : "memory");
}

__device__ inline void acquire_tensor_map(const TensorMap* map) {
  asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}

// Begins to copy the box whose first element is at these coordinates, which may lie outside of the tensor.
__device__ inline void tensor_copy(void* destination, const TensorMap* map, const int (&at)[kTensorAxes],
                                   Mbarrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, "
      "%6}], [%7];" ::"r"(shared_address(destination)),
      "l"(map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]), "r"(shared_address(&barrier))
      : "memory");
}

#else

struct TensorMap {
  TensorParams params;
  int bytes;  // of an element
  bool round;
};

template <class T, bool kRound = true>
inline void make_tensor_map(TensorMap* to, TensorMap&, const TensorParams& p) {
  if (threadIdx.x % kWarp == 0) *to = TensorMap{p, int(sizeof(T)), kRound && sizeof(T) == 4};
}
inline void acquire_tensor_map(const TensorMap*) {}

namespace emulator {

inline void check_tensor_map(const TensorMap& map, Place place) {
  const TensorParams& p = map.params;
  bool valid = uintptr_t(p.tensor) % 16 == 0 && p.box[0] * map.bytes % 16 == 0 && p.step[0] == 1;
  for (int64 stride : p.strides) valid = valid && stride % 16 == 0 && stride >= 0;
  for (int axis = 0; axis < kTensorAxes; ++axis)
    valid = valid && p.size[axis] > 0 && p.box[axis] > 0 && p.box[axis] <= 256 && p.step[axis] > 0 && p.step[axis] <= 8;
  if (p.swizzle) valid = valid && p.box[0] * map.bytes <= 128;
  if (!valid) fail("a tensor map that the copy engine does not take", place);
}

inline void tensor_copy(void* destination, const TensorMap* map, const int (&at)[kTensorAxes], Mbarrier& barrier,
                        Place place) {
  const TensorParams& p = map->params;
  check_tensor_map(*map, place);
  if (at[0] * map->bytes % 16) fail("a box does not begin at a multiple of 16 bytes", place);
  if (uintptr_t(destination) % (p.swizzle ? 1024 : 128)) fail("a box's destination is not aligned", place);
  int count[kTensorAxes], boxes = 1;
  for (int axis = 0; axis < kTensorAxes; ++axis) {
    count[axis] = (p.box[axis] + p.step[axis] - 1) / p.step[axis];
    boxes *= count[axis];
  }
  uintptr_t to = uintptr_t(destination);
  for (int index = 0; index < boxes; ++index, to += map->bytes) {
    bool inside = true;
    const char* from = static_cast<const char*>(p.tensor);
    for (int axis = 0, rest = index; axis < kTensorAxes; rest /= count[axis++]) {
      int64 coordinate = at[axis] + rest % count[axis] * p.step[axis];
      inside = inside && coordinate >= 0 && coordinate < p.size[axis];
      from += coordinate * (axis ? p.strides[axis - 1] : map->bytes);
    }
    unsigned value = 0;
    for (int byte = 0; inside && byte < map->bytes; ++byte)
      value |= unsigned(static_cast<unsigned char>(from[byte])) << 8 * byte;
    if (map->round) value = tf32_round(__uint_as_float(value));
    uintptr_t place_of = p.swizzle ? to ^ (to / 128 % 8 << 4) : to;
    for (int byte = 0; byte < map->bytes; ++byte)
      reinterpret_cast<unsigned char*>(place_of)[byte] = static_cast<unsigned char>(value >> 8 * byte);
  }
  barrier.bytes -= boxes * map->bytes;
  complete_if_done(barrier);
}

}  // namespace emulator

#define tensor_copy(...) ::rawkern::emulator::tensor_copy(__VA_ARGS__, RAWKERN_PLACE)

#endif

}  // namespace rawkern
