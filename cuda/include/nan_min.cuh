// Which numbers are the minimum that math::smaller found, NaN included: by their bits.
#pragma once
#include "platform.cuh"

namespace rawkern {

// Of NaN: what all instructions of a GPU return.
constexpr unsigned kNanBits = 0x7fffffff;

// The bits of what an instruction returned: those of equal numbers are equal, but for zeros of different signs, and so
// are those of NaN. The compiler does not see that they are the number's: where it does, it takes sums whose bits are
// asked for in the end for integers from the beginning, and converts them around every matrix product.
__device__ inline unsigned bits_of_result(float value) {
#if RAWKERN_GPU
  unsigned bits;
  asm("mov.b32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#else
  return value != value ? kNanBits : __float_as_uint(value);
#endif
}

// A set of numbers from 0 to 22 that begins empty, as the digits of a number between 2^23 and 2^24: an element is added
// by a floating-point addition, for which there are twice as many units as for operations on bits.
struct FloatSet {
  float number = 8388608.0f;

  // Adds `element`, which is not among them yet, if a == b. The compiler would not make one conditional instruction of
  // it.
  __device__ void add_if_equal(int element, unsigned a, unsigned b) {
    float digit = float(1 << element);
#if RAWKERN_GPU
    asm("{\n"
        ".reg .pred equal;\n"
        "setp.eq.u32 equal, %1, %2;\n"
        "@equal add.f32 %0, %0, %3;\n"
        "}\n"
        : "+f"(number)
        : "r"(a), "r"(b), "f"(digit));
#else
    if (a == b) number += digit;
#endif
  }
  __device__ unsigned bits() const { return __float_as_uint(number) & 0x7fffff; }
};

}  // namespace rawkern
