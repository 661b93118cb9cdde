// Four matrices of eight rows of eight 16-bit values each, transposed on their way from the registers of a warp to
// shared memory (stmatrix, sm_90 and later); load_matrices.cuh is the way back. Lane 8 j + r gives the address of row r
// of matrix j, a multiple of 16. Word j of lane t has value t / 4 of rows 2 (t % 4) and, in the upper half, the row
// after that, of matrix j. Eight rows are written at a time: those of a matrix should lie in different banks.
#pragma once
#include "platform.cuh"

namespace rawkern {

#if RAWKERN_GPU

__device__ inline void store_matrices_transposed(void* row, const unsigned (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

#else

inline void store_matrices_transposed(void* row, const unsigned (&words)[4]) {
  int lane = threadIdx.x % kWarp;
  for (int j = 0; j < 4; ++j)
    for (int odd = 0; odd < 2; ++odd) {
      void* to = __shfl_sync(kFullMask, row, 8 * j + lane % 4 * 2 + odd);
      static_cast<unsigned short*>(to)[lane / 4] = (unsigned short)(words[j] >> 16 * odd);
    }
}

#endif

}  // namespace rawkern
