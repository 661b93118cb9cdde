// Stores of several words by one instruction. A struct of that alignment says the same, but where its values and its
// address come from different branches the compiler stores them word by word all the same.
#pragma once
#include "platform.cuh"

namespace rawkern {

// 1, 2 or 4 words to global memory, aligned to their size.
template <int kWords>
__device__ inline void store_words(void* to, const unsigned (&words)[kWords]) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4, "stores are of 4, 8 or 16 bytes");
#if RAWKERN_GPU
  uint64 address = __cvta_generic_to_global(to);
  if constexpr (kWords == 4)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
  else if constexpr (kWords == 2)
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]) : "memory");
  else
    asm volatile("st.global.b32 [%0], %1;" ::"l"(address), "r"(words[0]) : "memory");
#else
  for (int i = 0; i < kWords; ++i) static_cast<unsigned*>(to)[i] = words[i];
#endif
}

}  // namespace rawkern
