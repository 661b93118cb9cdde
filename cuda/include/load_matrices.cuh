// Four matrices of eight rows of eight 16-bit values each, transposed on their way from shared memory to the registers
// of a warp (ldmatrix, sm_75 and later). Lane 8 j + r gives the address of row r of matrix j, a multiple of 16. Then
// result j of lane t holds value t / 4 of rows 2 (t % 4) and, in the upper half, 2 (t % 4) + 1 of matrix j. Eight rows
// are read at a time: those of a matrix should lie in different banks.
#pragma once
#include "platform.cuh"

namespace rawkern {

#if RAWKERN_GPU

__device__ inline void load_matrices_transposed(unsigned (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

#else

inline void load_matrices_transposed(unsigned (&words)[4], const void* row) {
  int lane = threadIdx.x % kWarp;
  for (int j = 0; j < 4; ++j) {
    words[j] = 0;
    for (int odd = 0; odd < 2; ++odd) {
      const void* from = __shfl_sync(kFullMask, row, 8 * j + lane % 4 * 2 + odd);
      words[j] |= unsigned(static_cast<const unsigned short*>(from)[lane / 4]) << 16 * odd;
    }
  }
}

#endif

}  // namespace rawkern
