// Kernels that reach for a ceiling and compute nothing useful: memory traffic in its three mixes, and the arithmetic
// units fed from registers or shared memory. Used by bench/ceilings.py; machines: any from sm_80 on, WgmmaLoop sm_90a.
#include "mma.cuh"

namespace rawkern {

struct alignas(16) Vector {
  unsigned x, y, z, w;
};

// Moves `vectors` vectors of 16 bytes; a block takes kPerThread * kThreads of them.
struct Traffic {
  struct Params {
    const void* source;
    void* target;
    int64 vectors;
  };
  static constexpr int kThreads = 256, kMinBlocks = 4, kPerThread = 4;
  static __device__ int64 first() { return linear_block() * kThreads * kPerThread + threadIdx.x; }
};

struct Copy : Traffic {
  static __device__ void run(const Params& p) {
    const Vector* from = static_cast<const Vector*>(p.source);
    Vector* to = static_cast<Vector*>(p.target);
    Vector values[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (first() + i * kThreads < p.vectors) values[i] = from[first() + i * kThreads];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (first() + i * kThreads < p.vectors) to[first() + i * kThreads] = values[i];
  }
};

// Reads everything; the store is there for the compiler and never happens (the bits of floats are never all ones).
struct Read : Traffic {
  static __device__ void run(const Params& p) {
    const Vector* from = static_cast<const Vector*>(p.source);
    unsigned all = first() < p.vectors ? 0xffffffffu : 0u;
    Vector values[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (first() + i * kThreads < p.vectors) values[i] = from[first() + i * kThreads];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (first() + i * kThreads < p.vectors) all &= values[i].x & values[i].y & values[i].z & values[i].w;
    if (all == 0xffffffffu) static_cast<unsigned*>(p.target)[0] = all;
  }
};

struct Write : Traffic {
  static __device__ void run(const Params& p) {
    Vector* to = static_cast<Vector*>(p.target);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (first() + i * kThreads < p.vectors) to[first() + i * kThreads] = Vector{threadIdx.x, 1u, 2u, 3u};
  }
};

struct LoopParams {
  void* target;  // one float for each thread; written only if a sum is what no sum is
  int64 rounds;
  double seed;
};

// Multiply-adds of T in kChains independent chains: 2 * kChains operations per round and thread.
template <class T>
struct FmaLoop {
  using Params = LoopParams;
  static constexpr int kThreads = 256, kMinBlocks = 2, kChains = 16;
  static __device__ void run(const Params& p) {
    T x[kChains], factor = T(0.999) + T(threadIdx.x) * T(1e-6) * T(p.seed), term = T(0.001) * T(p.seed);
    for (int i = 0; i < kChains; ++i) x[i] = T(i + 1) * T(p.seed) + T(threadIdx.x);
#pragma unroll 1
    for (int64 round = 0; round < p.rounds; ++round) {
#pragma unroll
      for (int i = 0; i < kChains; ++i) x[i] = x[i] * factor + term;
    }
    T sum = 0;
    for (int i = 0; i < kChains; ++i) sum += x[i];
    if (sum == T(-12345)) static_cast<T*>(p.target)[0] = sum;
  }
};

// mma.sync from registers: 8 products of 16 x 8 x (8 or 16) per round and warp.
template <class Operand>
struct MmaLoop {
  using Params = LoopParams;
  static constexpr int kThreads = 256, kMinBlocks = 2;
  static __device__ unsigned operand(int i, double seed) {
    // Finite in every format, different in every lane: 0x3f.. and 0x3c.. are between 0.5 and 2 as float, bfloat16,
    // half.
    return 0x3c003c00u + ((threadIdx.x * 2654435761u + i * 40503u + unsigned(seed)) & 0x01ff01ffu);
  }
  static __device__ void run(const Params& p) {
    unsigned a[2][4], b[4][2];
    float d[8][4];
    for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = operand(i, p.seed), b[i / 2][i % 2] = operand(i + 8, p.seed);
    for (int i = 0; i < 32; ++i) d[i / 4][i % 4] = 0;
#pragma unroll 1
    for (int64 round = 0; round < p.rounds; ++round) {
#pragma unroll
      for (int i = 0; i < 8; ++i) mma_16x8<Operand>(d[i], a[i / 4], b[i % 4]);
    }
    float sum = 0;
    for (int i = 0; i < 32; ++i) sum += d[i / 4][i % 4];
    if (sum == -12345.0f) static_cast<float*>(p.target)[0] = sum;
  }
};

// wgmma with both operands in shared memory: two warpgroups, each 4 products of 64 x 256 x (8 or 16) per round.
// Operands lie in 128-byte core matrices (8 rows of 16 bytes), unswizzled, which is free of bank conflicts.
// Hopper only (sm_90a); elsewhere an empty kernel that nobody launches.
template <class Operand>
struct WgmmaLoop {
  using Params = LoopParams;
  static constexpr int kThreads = 256, kMinBlocks = 1;
  struct Shared {
    unsigned b[4][2048];    // 4 slices of 256 rows of 32 bytes
    unsigned a[2][4][512];  // for each warpgroup, 4 slices of 64 rows of 32 bytes
  };
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static __device__ unsigned long long descriptor(const void* tile) {
    unsigned long long address = static_cast<unsigned>(__cvta_generic_to_shared(tile));
    return (address >> 4) | (128ull >> 4) << 16 | (256ull >> 4) << 32;
  }
  static __device__ void multiply(float (&d)[128], unsigned long long a, unsigned long long b);
#endif
  static __device__ void run(const Params& p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    RAWKERN_SHARED(Shared, shared);
    unsigned* words = &shared.b[0][0];
    for (int i = threadIdx.x; i < int(sizeof(Shared) / 4); i += kThreads)
      words[i] = 0x3c003c00u + ((i * 2654435761u + unsigned(p.seed)) & 0x81ff81ffu);  // both signs
    asm volatile("fence.proxy.async;" ::: "memory");
    __syncthreads();
    int warpgroup = __shfl_sync(kFullMask, threadIdx.x / 128, 0);
    float d[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) d[i] = 0;
#pragma unroll 1
    for (int64 round = 0; round < p.rounds; ++round) {
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int i = 0; i < 4; ++i) multiply(d, descriptor(shared.a[warpgroup][i]), descriptor(shared.b[i]));
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 128; ++i) sum += d[i];
    if (sum == -12345.0f) static_cast<float*>(p.target)[0] = sum;
#endif
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BENCH_R8(i)                                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define BENCH_R32(i) BENCH_R8(i), BENCH_R8(i + 8), BENCH_R8(i + 16), BENCH_R8(i + 24)
#define BENCH_WGMMA(Operand, instruction, last)                                                                      \
  template <>                                                                                                        \
  __device__ inline void WgmmaLoop<Operand>::multiply(float (&d)[128], unsigned long long a, unsigned long long b) { \
    asm volatile(                                                                                                    \
        "wgmma.mma_async.sync.aligned.m64n256" instruction                                                           \
        " {"                                                                                                         \
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"         \
        "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"       \
        "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,"       \
        "%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,"     \
        "%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,"       \
        "%122,%123,%124,%125,%126,%127}, %128, %129, 1, 1, 1" last ";"                                               \
        : BENCH_R32(0), BENCH_R32(32), BENCH_R32(64), BENCH_R32(96)                                                  \
        : "l"(a), "l"(b));                                                                                           \
  }
BENCH_WGMMA(Tf32, "k8.f32.tf32.tf32", "")
BENCH_WGMMA(Half, "k16.f32.f16.f16", ", 0, 0")
BENCH_WGMMA(BFloat16, "k16.f32.bf16.bf16", ", 0, 0")
#endif

}  // namespace rawkern
