// The transposed convolution and its input gradient as one implicit GEMM that gathers its operand.
//
//     out[n, m, i] = sum over channels k and taps j of in[n, k, position(i, j)] * weight[k, m, tap(j)]
//
// A block computes kBlockM output channels (rows) of one group for kBlockN output pixels (columns) of one phase
// (axis.cuh). Depth runs over slabs of channels, and within a slab over the taps, so that the taps of a slab find their
// input in the L1 cache. Weights come packed (pack_weight.cu): [group][tap][word of channels][output channel],
// zero-padded, so their slab is a plain copy by cp.async. The input's slab is gathered: a thread owns one pixel and
// works out its position once per tap; positions outside the input and channels beyond the last give zero.
//
// Where words are the elements themselves (Math::kAsync), that too is done by cp.async, an element at a time, kStages -
// 1 slabs ahead of the multiplication. Otherwise a thread reads a few channels into registers while the previous slab
// is being multiplied, makes words of them, and two slabs of shared memory alternate. One barrier per slab either way.
// What becomes of the sums is the Ending's business (endings.cuh). Input and output may have any strides.
//
// Meant for sm_80 and later: cp.async and mma.sync. On Hopper, wgmma kernels may take this one's place.
#pragma once
#include "async_copy.cuh"
#include "axis.cuh"
#include "block_math.cuh"

namespace rawkern {

struct GatherParams {
  const void* input;
  const void* weight;   // packed words
  int64 in_strides[4];  // n, c, h, w, in elements
  int64 out_strides[4];
  int64 image_span;  // columns reserved per image if images do not share tiles (a multiple of kBlockN); else 0
  int64 tiles;       // column tiles of the largest phase
  Axis height, width;
  int batch, groups;
  int depth, depth_words;  // input channels of a group; words they are padded to in the packed weights
  int rows, rows_padded;   // output channels of a group; and as padded in the packed weights
};

// The columns of a block: which pixel of which image each one is.
struct Columns {
  AxisPhase height, width;
  int phase;  // number of the pair of phases
  int64 first, per_image, span;
  int64 in_steps[3],
      weight_steps[3];  // to the next tap of a row, to the next row of taps, to the next slab of channels

  template <class Map>
  __device__ void set(const GatherParams& p, int phase_h, int phase_w, int64 first_column) {
    AxisPhase h = Map::phase(p.height, phase_h), w = Map::phase(p.width, phase_w);
    height = h;
    width = w;
    phase = phase_h * Map::phases(p.width) + phase_w;
    first = first_column;
    per_image = int64(h.count) * w.count;
    span = p.image_span ? p.image_span : per_image;
  }

  // `words`: depth of a slab, where a word is one channel.
  __device__ void set_steps(const GatherParams& p, int words) {
    int64 in_w = width.in_tap_step * p.in_strides[3], in_h = height.in_tap_step * p.in_strides[2];
    int64 weight_w = int64(width.tap_step) * p.depth_words * p.rows_padded;
    int64 weight_h = int64(height.tap_step) * p.width.kernel * p.depth_words * p.rows_padded;
    int64 back_w = width.taps - 1, back_h = height.taps - 1;
    in_steps[0] = in_w;
    in_steps[1] = in_h - back_w * in_w;
    in_steps[2] = words * p.in_strides[1] - back_h * in_h - back_w * in_w;
    weight_steps[0] = weight_w;
    weight_steps[1] = weight_h - back_w * weight_w;
    weight_steps[2] = int64(words) * p.rows_padded - back_h * weight_h - back_w * weight_w;
  }

  // Number of the image, row and column within the phase; false if there is no such pixel.
  __device__ bool locate(const GatherParams& p, int column, int64& image, int& i, int& j) const {
    if (per_image == 0) return false;
    int64 index = first + column;
    image = index / span;
    int64 pixel = index - image * span;
    i = int(pixel / width.count);
    j = int(pixel - int64(i) * width.count);
    return image < p.batch && pixel < per_image;
  }
};

// The columns of a block and where their results go. In shared memory: it is the same for all threads, and the
// registers are the accumulators'.
template <class Math>
struct BlockColumns {
  Columns columns;
  int row_tile;                     // over all groups, of the tile at hand
  int64 out_offset[Math::kBlockN];  // of each column's pixel, channel 0; -1 where there is none

  __device__ void write_out_offsets(const GatherParams& p) {
    for (int column = threadIdx.x; column < Math::kBlockN; column += Math::kThreads) {
      int64 image = 0;
      int i = 0, j = 0;
      bool exists = columns.locate(p, column, image, i, j);
      int64 h = columns.height.out_first + int64(i) * columns.height.out_step;
      int64 w = columns.width.out_first + int64(j) * columns.width.out_step;
      out_offset[column] = exists ? image * p.out_strides[0] + h * p.out_strides[2] + w * p.out_strides[3] : int64(-1);
    }
  }
};

// Where in depth the loop is: a slab of channels and a tap.
struct Depth {
  int channel = 0, tap_h = 0, tap_w = 0;

  __device__ void advance(int taps_h, int taps_w, int channels) {
    if (++tap_w < taps_w) return;
    tap_w = 0;
    if (++tap_h < taps_h) return;
    tap_h = 0;
    channel += channels;
  }
};

// The gathering side of one thread: its pixel's place in the input.
template <class Math>
struct Gatherer {
  using T = typename Math::Element;
  static constexpr int kWordStep = Math::kThreads / Math::kBlockN;
  static constexpr int kStaged = Math::kWords / kWordStep;
  static constexpr int kNowhere = -(1 << 30) - (1 << 29);  // sizes and extents of kernels are below 2^29 (geometry.py)
  static_assert(Math::kThreads % Math::kBlockN == 0 && Math::kWords % kWordStep == 0, "threads must tile the slab");

  const T* pixel;
  int position_h, position_w;  // a pixel that does not exist lies where no tap reaches the input

  __device__ Gatherer(const GatherParams& p, const Columns& columns, int group) {
    int64 image = 0;
    int i = 0, j = 0;
    bool exists = columns.locate(p, threadIdx.x % Math::kBlockN, image, i, j);
    int64 channel = int64(group) * p.depth + threadIdx.x / Math::kBlockN * Math::kPack;
    pixel = static_cast<const T*>(p.input) + (exists ? image * p.in_strides[0] : 0) + channel * p.in_strides[1];
    position_h = exists ? columns.height.in_first + i * columns.height.in_step : kNowhere;
    position_w = columns.width.in_first + j * columns.width.in_step;
  }

  // Reads this thread's words of the slab at `depth`.
  __device__ void load(typename Math::Word (&staged)[kStaged], const GatherParams& p, const Columns& columns,
                       const Depth& depth) const {
    int h = position_h + depth.tap_h * columns.height.in_tap_step,
        w = position_w + depth.tap_w * columns.width.in_tap_step;
    bool inside = unsigned(h) < unsigned(p.height.in_size) && unsigned(w) < unsigned(p.width.in_size);
    const T* source = pixel + depth.channel * p.in_strides[1] + h * p.in_strides[2] + w * p.in_strides[3];
    int left = inside ? p.depth - depth.channel - int(threadIdx.x / Math::kBlockN) * Math::kPack : 0;  // channels
#pragma unroll
    for (int word = 0; word < kStaged; ++word) {
      typename Math::Value values[Math::kPack];
#pragma unroll
      for (int i = 0; i < Math::kPack; ++i) {
        bool read = word * kWordStep * Math::kPack + i < left;
        values[i] = read ? to_accumulator(source[i * p.in_strides[1]]) : typename Math::Value(0);
      }
      staged[word] = Math::make_word(values);
      source += kWordStep * Math::kPack * p.in_strides[1];
    }
  }

  __device__ static void store(typename Math::Tile& tile, const typename Math::Word (&staged)[kStaged]) {
#pragma unroll
    for (int word = 0; word < kStaged; ++word)
      tile.b[threadIdx.x / Math::kBlockN + word * kWordStep][threadIdx.x % Math::kBlockN] = staged[word];
  }
};

// Starts copying the weights' slab: kWords rows of kBlockM words.
template <class Math>
__device__ inline void copy_weights(typename Math::Tile& tile, const typename Math::Word* source, int row_stride) {
  constexpr int kPerCopy = 16 / sizeof(typename Math::Word), kPerRow = Math::kBlockM / kPerCopy;
  for (int i = threadIdx.x; i < Math::kWords * kPerRow; i += Math::kThreads) {
    int word = i / kPerRow, row = i % kPerRow * kPerCopy;
    async_copy_16(&tile.a[word][row], source + int64(word) * row_stride + row);
  }
}

// Adds products to `total`, by way of sums over Math::kRun slabs where that is asked for.
template <class Math, bool kInRuns = (Math::kRun > 0)>
struct RunningSum {
  typename Math::Accumulators& total;
  __device__ RunningSum(typename Math::Accumulators& total) : total(total) {}
  __device__ void multiply(const typename Math::Tile& tile) { Math::multiply(total, tile); }
  __device__ void finish() {}
};
template <class Math>
struct RunningSum<Math, true> {
  typename Math::Accumulators& total;
  typename Math::Accumulators run;
  int slabs = 0;
  __device__ RunningSum(typename Math::Accumulators& total) : total(total) { clear<Math>(run); }
  __device__ void multiply(const typename Math::Tile& tile) {
    Math::multiply(run, tile);
    if (++slabs == Math::kRun) finish();
  }
  __device__ void finish() {
    add<Math>(total, run);
    clear<Math>(run);
    slabs = 0;
  }
};

// The sums of one block by way of the registers. `columns` has taps.
template <class Math>
__device__ void gather_through_registers(typename Math::Accumulators& total, typename Math::Tile (&tiles)[2],
                                         const GatherParams& p, const Columns& columns, int group, int row) {
  using Word = typename Math::Word;
  Gatherer<Math> gatherer(p, columns, group);
  int64 taps_before = int64(group) * p.height.kernel * p.width.kernel;
  const Word* weight = static_cast<const Word*>(p.weight) + taps_before * p.depth_words * p.rows_padded + row;
  auto weights_at = [&](const Depth& depth) {
    int tap_h = columns.height.tap_first + depth.tap_h * columns.height.tap_step;
    int tap_w = columns.width.tap_first + depth.tap_w * columns.width.tap_step;
    int64 word = int64(tap_h * p.width.kernel + tap_w) * p.depth_words + depth.channel / Math::kPack;
    return weight + word * p.rows_padded;
  };
  Depth depth;
  Word staged[Gatherer<Math>::kStaged];
  copy_weights<Math>(tiles[0], weights_at(depth), p.rows_padded);
  gatherer.load(staged, p, columns, depth);
  gatherer.store(tiles[0], staged);
  async_wait_all();
  __syncthreads();
  RunningSum<Math> sum(total);
  for (int now = 0;; now ^= 1) {
    depth.advance(columns.height.taps, columns.width.taps, Math::kWords * Math::kPack);
    bool more = depth.channel < p.depth_words * Math::kPack;
    if (more) {
      copy_weights<Math>(tiles[now ^ 1], weights_at(depth), p.rows_padded);
      gatherer.load(staged, p, columns, depth);
    }
    sum.multiply(tiles[now]);
    if (!more) break;
    gatherer.store(tiles[now ^ 1], staged);
    async_wait_all();
    __syncthreads();
  }
  sum.finish();
  __syncthreads();
}

// One thread's side of copying slabs past the registers: its pixel's channels and its part of the weights. It goes from
// slab to slab by adding up steps, which lie in shared memory.
template <class Math>
struct SlabCopier {
  using T = typename Math::Element;
  static constexpr int kWordStep = Gatherer<Math>::kWordStep, kStaged = Gatherer<Math>::kStaged;
  static constexpr int kPerCopy = 16 / int(sizeof(T)), kPerRow = Math::kBlockM / kPerCopy;
  static constexpr int kWeightStep = Math::kThreads / kPerRow;
  static_assert(Math::kPack == 1 && sizeof(T) == sizeof(typename Math::Word) && Math::kThreads % kPerRow == 0, "");

  const T* source;  // of this thread's first word
  const T* weight;
  int position_h, position_w, tap_h = 0, tap_w = 0, channel = 0;

  __device__ SlabCopier(const GatherParams& p, const Columns& columns, int group, int row) {
    Gatherer<Math> gatherer(p, columns, group);
    position_h = gatherer.position_h;
    position_w = gatherer.position_w;
    source = gatherer.pixel + position_h * p.in_strides[2] + position_w * p.in_strides[3];
    int64 tap = (int64(group) * p.height.kernel + columns.height.tap_first) * p.width.kernel + columns.width.tap_first;
    weight = static_cast<const T*>(p.weight) + (tap * p.depth_words + threadIdx.x / kPerRow) * p.rows_padded + row +
             threadIdx.x % kPerRow * kPerCopy;
  }

  // Starts copying the slab at hand, if there is one, and goes on to the next. Closes a group of copies in any case.
  __device__ void copy(typename Math::Tile& tile, const GatherParams& p, const Columns& columns) {
    if (channel < p.depth_words) {
      copy_weights(tile, p.rows_padded);
      int h = position_h + tap_h * columns.height.in_tap_step, w = position_w + tap_w * columns.width.in_tap_step;
      bool inside = unsigned(h) < unsigned(p.height.in_size) && unsigned(w) < unsigned(p.width.in_size);
      int left = p.depth - channel;
      if (left >= Math::kWords)
        copy_input(tile, p.in_strides[1], [&](int) { return inside; });
      else
        copy_input(tile, p.in_strides[1], [&](int word) { return inside && word < left; });
      advance(columns);
    }
    async_commit();
  }

  __device__ void copy_weights(typename Math::Tile& tile, int row_stride) const {
    const T* from = weight;
#pragma unroll
    for (int word = 0; word < Math::kWords; word += kWeightStep) {
      int own = word + int(threadIdx.x) / kPerRow;
      if (Math::kWords % kWeightStep == 0 || own < Math::kWords)
        async_copy_16(&tile.a[own][threadIdx.x % kPerRow * kPerCopy], from);
      from += int64(kWeightStep) * row_stride;
    }
  }

  template <class Exists>
  __device__ void copy_input(typename Math::Tile& tile, int64 stride, Exists exists) const {
    const T* from = source;
    int first = threadIdx.x / Math::kBlockN;
#pragma unroll
    for (int word = 0; word < kStaged; ++word) {
      int own = first + word * kWordStep;
      async_copy_or_zero(&tile.b[own][threadIdx.x % Math::kBlockN], from, exists(own));
      from += kWordStep * stride;
    }
  }

  __device__ void advance(const Columns& columns) {
    int turn = 0;
    if (++tap_w == columns.width.taps) {
      tap_w = 0;
      turn = 1;
      if (++tap_h == columns.height.taps) {
        tap_h = 0;
        turn = 2;
        channel += Math::kWords;
      }
    }
    source += columns.in_steps[turn];
    weight += columns.weight_steps[turn];
  }
};

// The sums of one block by asynchronous copies. `columns` has taps. kStages - 1 slabs are under way while one is
// multiplied; the barrier that makes a slab visible also says that the one before it has been read by all.
template <class Math>
__device__ void gather_asynchronously(typename Math::Accumulators& total, typename Math::Tile (&tiles)[Math::kStages],
                                      const GatherParams& p, const Columns& columns, int group, int row) {
  constexpr int kStages = Math::kStages;
  SlabCopier<Math> copier(p, columns, group, row);
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) copier.copy(tiles[stage], p, columns);
  int64 slabs = int64(columns.height.taps) * columns.width.taps * (p.depth_words / Math::kWords);
  RunningSum<Math> sum(total);
  int now = 0, next = kStages - 1;
#pragma unroll 1
  for (int64 slab = 0; slab < slabs; ++slab) {
    async_wait<kStages - 2>();
    __syncthreads();
    copier.copy(tiles[next], p, columns);
    sum.multiply(tiles[now]);
    next = now;
    now = now + 1 == kStages ? 0 : now + 1;
  }
  sum.finish();
  __syncthreads();
}

// The sums of one block, for the rows that begin at `row` of `group`. All threads of the block call it together.
template <class Math>
__device__ void gather_multiply(typename Math::Accumulators& total, typename Math::Tile (&tiles)[Math::kStages],
                                const GatherParams& p, const Columns& columns, int group, int row) {
  if (columns.height.taps == 0 || columns.width.taps == 0) return;
  if constexpr (Math::kAsync)
    gather_asynchronously<Math>(total, tiles, p, columns, group, row);
  else
    gather_through_registers<Math>(total, tiles, p, columns, group, row);
}

// What a block works on, from its number: row tiles run fastest, so that blocks that share their input run together,
// then groups, then phases, so that the phases that share output rows do, then column tiles.
struct BlockPlace {
  int row_tile, group, phase_h, phase_w;
  int64 tile;

  __device__ BlockPlace(int64 block, int row_tiles, int groups, int phases_h, int phases_w) {
    row_tile = int(block % row_tiles);
    block /= row_tiles;
    group = int(block % groups);
    block /= groups;
    phase_w = int(block % phases_w);
    block /= phases_w;
    phase_h = int(block % phases_h);
    tile = block / phases_h;
  }
};

template <class Map, class Math, class Ending>
struct Gather {
  static constexpr int kThreads = Math::kThreads;
  static constexpr int kMinBlocks = Math::kMinBlocks;

  struct Params {
    GatherParams gather;
    typename Ending::Params ending;
  };

  struct Storage {
    typename Ending::Kept kept;
    union {
      typename Math::Tile tiles[Math::kStages];
      typename Ending::Storage ending;
    };
    BlockColumns<Math> block;
  };

  __device__ static void run(const Params& params) {
    RAWKERN_SHARED(Storage, shared);
    const GatherParams& p = params.gather;
    int all_row_tiles = p.rows_padded / Math::kBlockM;
    int row_tiles = Ending::kAllRows ? 1 : all_row_tiles, groups = Ending::kAllRows ? 1 : p.groups;
    BlockPlace place(linear_block(), row_tiles, groups, Map::phases(p.height), Map::phases(p.width));
    if (place.tile >= p.tiles) return;
    const Columns& columns = shared.block.columns;
    if (threadIdx.x == 0) {
      shared.block.columns.template set<Map>(p, place.phase_h, place.phase_w, place.tile * Math::kBlockN);
      if (Math::kAsync) shared.block.columns.set_steps(p, Math::kWords);
      shared.block.row_tile = Ending::kAllRows ? 0 : place.group * all_row_tiles + place.row_tile;
    }
    __syncthreads();
    shared.block.write_out_offsets(p);

    Ending ending(params.ending, p, shared.kept);
    for (bool done = false; !done;) {
      __syncthreads();
      int tile = shared.block.row_tile, group = tile / all_row_tiles, row = tile % all_row_tiles * Math::kBlockM;
      typename Math::Accumulators sum;
      clear<Math>(sum);
      gather_multiply<Math>(sum, shared.tiles, p, columns, group, row);
      // Read again: what waits in shared memory takes no register from the multiplication.
      __syncthreads();
      tile = shared.block.row_tile, group = tile / all_row_tiles, row = tile % all_row_tiles * Math::kBlockM;
      ending.consume(shared.ending, shared.block, sum, group * p.rows + row, p.rows - row);
      done = !Ending::kAllRows || tile + 1 == p.groups * all_row_tiles;
      if (threadIdx.x == 0) shared.block.row_tile = tile + 1;
    }
    ending.finish(shared.ending, shared.block);
  }
};

}  // namespace rawkern
