// What becomes of a warpgroup's sums (warpgroup_gather.cuh): the same three endings as endings.cuh has for a block's.
//
// A warp owns 16 of a job's output channels by all its columns, and ends them chunk by chunk: 32 outputs of each
// channel, 8 values of each of a thread's two channels. It has a scheduler almost to itself, so nothing hides what it
// waits for: these 8 go through their functions together, in the registers where they were summed. The code for one or
// two chunks is written out once, for the first sums, whose place the others then take (see Chunks). A thread's values
// belong to two channels, whose bias and operands are loaded once per job. Where the columns of a job lie in the output
// is found out once, too, by all lanes together, and passed around by shuffles.
//
// A thread has two neighbouring base pixels in all phases of the pass: a run of 2, 4 or 8 outputs of a row. Where 16
// bytes of these are neighbours in memory, aligned, and exist whole or not at all (the host says so, and takes a kernel
// that stores so many), they are stored straight from the registers. Otherwise chunks pass through a piece of
// shared memory of the warp's own, from where lanes run along rows of the output: with 16 bytes each where that many
// are aligned, with two neighbours where pairs are (other even widths), else with one (odd widths, strides without such
// a pass). Where the neighbours are channels, a chunk lies there channel by channel (16-bit types are transposed by
// stmatrix), and lanes run along these: with 16 bytes where channels are aligned, so that a warp writes 32 or 64 bytes
// of each of 16 or 8 outputs at a time, else with as many as are. No warp waits for another. The sums of the columns
// beyond the tile are dropped.
//
// The minimum over channels goes another way, all sums at once in the registers, and its warps have to meet.
#pragma once
#include "chain.cuh"
#include "fast_math.cuh"
#include "moments.cuh"
#include "nan_min.cuh"
#include "opaque.cuh"
#include "store_matrices.cuh"
#include "warpgroup_gather.cuh"
#include "wide_store.cuh"

namespace rawkern {

constexpr int kWarpRows = 16;
constexpr int kReadTogether = 8;  // values that a lane reads back from shared memory at a time

// The channels of a warp: `first` over all groups, and how many of its rows exist. And which of them a lane has; what
// follows from the lane is computed per job, or it would take registers while products are summed.
struct WarpRows {
  int first, count, lane;  // count: below 1 if there are none

  __device__ WarpRows(const WarpgroupParams& p, int group_row, int first_row) {
    int row = first_row + threadIdx.x / kWarp % 4 * kWarpRows, left = p.rows - row;
    first = group_row + row;
    // Not limited from below as well: the assembler of CUDA 13.0 makes one instruction of both limits and takes a
    // predicate of it, which says something else, for the answer to count == kWarpRows.
    count = left < kWarpRows ? left : kWarpRows;
    lane = opaque(int(threadIdx.x % kWarp));
  }
  // A thread's accumulators belong to two rows, r = 0 and 1.
  __device__ int of_thread(int r) const { return lane / 4 + 8 * r; }
  __device__ bool has(int r) const { return of_thread(r) < count; }
  // The channel of that row; where it does not exist, of one that does, if any does.
  __device__ int channel(int r) const { return first + (has(r) ? of_thread(r) : 0); }
};

// The biases of a thread's two rows.
template <class T>
struct FragmentBias {
  float value[2];

  __device__ FragmentBias(const void* bias, const WarpRows& rows) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      value[r] = bias && rows.has(r) ? to_accumulator(static_cast<const T*>(bias)[rows.channel(r)]) : 0.0f;
  }
};

// A thread's part of a chunk, which is 16 rows (channels) of 32 outputs: kGroups groups of 8 base pixels, in kPhases
// phases each. Of two rows and every group a thread has two neighbouring pixels, a run of kRun outputs.
template <class Gather>
struct Fragment {
  static constexpr int kPhases = Gather::kPhases, kGroups = kWarp / 8 / kPhases, kRun = 2 * kPhases;
  static constexpr int kCount = Gather::kPixels / (8 * kGroups);  // chunks of a job

  float value[2][kGroups][kRun];

  // Chunk `chunk` of the sums, with their biases; a constant, since registers cannot be indexed. Biases are taken as
  // they come there, or they would be added to all sums first.
  __device__ void take(const float (&sum)[kPhases][Gather::kPixels / 2], int chunk, const float (&bias)[2]) {
    float own_bias[2] = {bias[0], bias[1]};
    pin(own_bias);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
#pragma unroll
        for (int k = 0; k < kRun; ++k)
          value[r][g][k] = sum[k % kPhases][(chunk * kGroups + g) * 4 + r * 2 + k / kPhases] + own_bias[r];
  }

  // Which pixel of its group, and which phase, value k of a run belongs to.
  __device__ static int pixel_of(int lane, int k) { return lane % 4 * 2 + k / kPhases; }
  __device__ static int phase_of(int k) { return k % kPhases; }
};

// The same, rounded to the element type.
template <class T, class Gather>
struct RoundedFragment {
  using Values = Fragment<Gather>;
  static constexpr int kGroups = Values::kGroups, kRun = Values::kRun;

  Two<T> pair[2][kGroups][kRun / 2];

  __device__ explicit RoundedFragment(const Values& values) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
#pragma unroll
        for (int k = 0; k < kRun; k += 2)
          pair[r][g][k / 2] = Two<T>::from(values.value[r][g][k], values.value[r][g][k + 1]);
  }

  __device__ void get(Values& values) const {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
#pragma unroll
        for (int k = 0; k < kRun; k += 2) {
          values.value[r][g][k] = pair[r][g][k / 2].first();
          values.value[r][g][k + 1] = pair[r][g][k / 2].second();
        }
  }

  // visit(offset in elements, words) for one of its runs, up to 16 bytes at a time.
  static constexpr int kEach = Two<T>::kWords, kRunWords = kRun / 2 * kEach, kWords = kRunWords < 4 ? kRunWords : 4;
  using Words = Packed<unsigned, kWords>;
  template <class Visit>
  __device__ void for_each_piece(int r, int g, Visit visit) const {
#pragma unroll
    for (int i = 0; i < kRunWords; i += kWords) {
      Words words;
#pragma unroll
      for (int k = 0; k < kWords; ++k) words.value[k] = pair[r][g][(i + k) / kEach].words[(i + k) % kEach];
      visit(i / kEach * 2, words);
    }
  }
};

// What exists of a job's outputs in one channel, and where. Columns are the tile's pixels of one phase, row after row.
struct TileOutputs {
  const WarpgroupParams& p;
  const TilePlace& tile;
  int image_rows, limit, last_phases;  // what exists: rows of an image; of the tile's rows, the pixels; of their last
                                       // one, the phases
  int rows_left;                       // of the tile
  int64 place;                         // of its first output

  __device__ TileOutputs(const WarpgroupParams& p, const TilePlace& tile, const Job& job, int channel)
      : p(p), tile(tile) {
    int first_h = p.phase[job.pass][0], first_w = p.phase[job.pass][1];
    // Only the last base pixel of a row or column can lack phases, perhaps all.
    image_rows = p.base_size[0] - (p.out_step[0] * (p.base_size[0] - 1) + first_h >= p.out_size[0]);
    int columns = p.base_size[1] - (p.out_step[1] * (p.base_size[1] - 1) + first_w >= p.out_size[1]) - tile.column;
    limit = columns < p.tile_columns ? columns : p.tile_columns;
    last_phases = p.out_size[1] - (p.out_step[1] * (tile.column + limit - 1) + first_w);
    int all_left = (p.batch - tile.image) * p.stack - tile.row;
    rows_left = all_left < p.tile_rows ? all_left : p.tile_rows;
    place = tile.image * p.out_strides[0] + channel * p.out_strides[1] +
            (p.out_step[0] * tile.row + first_h) * p.out_strides[2] +
            (p.out_step[1] * tile.column + first_w) * p.out_strides[3];
  }

  // How many outputs of a channel exist in a tile within one image.
  __device__ int count(int phases) const {
    int in_image = image_rows - tile.row, rows = in_image < rows_left ? in_image : rows_left;
    return rows > 0 && limit > 0 ? rows * (limit * phases - (last_phases < phases ? phases - last_phases : 0)) : 0;
  }

  // Whether the pixels of the last column have no such phase.
  __device__ bool lacks(int phase) const { return phase > 0 && phase >= last_phases; }

  __device__ int64 pixel_stride() const { return p.out_step[1] * p.out_strides[3]; }

  // Where column `column` lies. Returns how many pixels exist from there to the end of its row: any number below 1 if
  // none does.
  __device__ int locate(int column, int64& at) const {
    int row = int((column + 0.5f) * math::fast_reciprocal(float(p.pitch)));  // far from whole, see Divisor
    int column_of_row = column - row * p.pitch, image, image_row;
    tile.locate(p, row, image, image_row);
    at = place + (image - tile.image) * p.out_strides[0] + (image_row - tile.row) * (p.out_step[0] * p.out_strides[2]) +
         column_of_row * pixel_stride();
    return (row < rows_left && image_row < image_rows ? limit : 0) - column_of_row;
  }
};

// Where a job's groups of 8 neighbouring columns lie, of which there are no more than lanes: each lane finds out about
// one of them, once, and tells the others. A row of the tile is a whole number of groups.
struct GroupPlaces {
  int64 place;
  int left;

  __device__ GroupPlaces(const TileOutputs& outputs, int lane) { left = outputs.locate(8 * lane, place); }
  // As TileOutputs::locate() has it for a group's first column. All lanes of the warp call it.
  __device__ int64 place_of(int group) const { return __shfl_sync(kFullMask, place, group); }
  __device__ int left_of(int group) const { return __shfl_sync(kFullMask, left, group); }
};

// Neighbours that are stored by one instruction.
template <class T, int kCount, bool kWords = (kCount * sizeof(T) >= 4)>
struct alignas(kCount * sizeof(T)) StorePiece {
  unsigned words[kCount * sizeof(T) / 4];
  __device__ void store(T* to) const { store_words(to, words); }
};
template <class T, int kCount>
struct StorePiece<T, kCount, false> {
  T value;
  __device__ void store(T* to) const { *to = value; }
};

// A chunk in shared memory, as it lies in the output: phases interleaved. Rows are 8 values longer, so that most
// fragments are written without bank conflicts.
template <class T>
struct alignas(16) Chunk {
  T at[kWarpRows][kWarp + 8];

  template <class Gather>
  __device__ void fill(const RoundedFragment<T, Gather>& fragment, const WarpRows& rows) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int g = 0; g < Fragment<Gather>::kGroups; ++g)
        fragment.for_each_piece(r, g, [&](int k, const typename RoundedFragment<T, Gather>::Words& words) {
          T* to = &at[rows.of_thread(r)][(8 * g + Fragment<Gather>::pixel_of(rows.lane, 0)) * Gather::kPhases + k];
          *reinterpret_cast<typename RoundedFragment<T, Gather>::Words*>(to) = words;
        });
  }
};

// How a warp stores chunks in tensors of the output's shape and strides, in one of several ways, which differ in what
// neighbours one instruction stores, and how many (see Store, to which the host says how many it may). Each step takes
// long to answer, so that there are four, with other work in between: locate() a chunk, put() its values into shared
// memory, fetch() from there what the lane is to store, before the next put(), and flush() that to the tensor.
//
// Straight from the registers: a thread's run, or 16 bytes of it; not less, since a warp's store then touches eight
// rows for few bytes each (measured: 8 bytes take 10 to 15 % longer, for a whole convolution, than the way by shared
// memory).
template <class T, class Gather>
struct RunStore {
  using Rounded = RoundedFragment<T, Gather>;
  static constexpr int kVector = Rounded::kWords * 4 / sizeof(T);
  static constexpr bool kPossible = kVector * sizeof(T) >= 16, kThroughMemory = false, kFlushSoon = false;

  using Values = Fragment<Gather>;

  const WarpgroupParams& p;
  const WarpRows& rows;
  GroupPlaces groups;
  int pixel;  // this lane's first one in a group
  int64 own;  // from a group's place to the lane's

  __device__ RunStore(const WarpgroupParams& p, const WarpRows& rows, Chunk<T>&, const TileOutputs& outputs)
      : p(p), rows(rows), groups(outputs, rows.lane), pixel(Values::pixel_of(rows.lane, 0)) {
    own = rows.of_thread(0) * p.out_strides[1] + pixel * Gather::kPhases;
  }

  struct Pending {};
  __device__ int locate(int chunk) const { return chunk; }
  __device__ Pending fetch(int, void*) const { return Pending{}; }
  __device__ void flush(const Pending&) const {}
  __device__ void put(int chunk, void* tensor, const Rounded& fragment) const {
#pragma unroll
    for (int g = 0; g < Values::kGroups; ++g) {
      int group = chunk * Values::kGroups + g, left = groups.left_of(group) - pixel;
      T* to = static_cast<T*>(tensor) + (groups.place_of(group) + own);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // Opaque, or addresses would be computed from the tensor's anew under the condition of every store.
        to = opaque(to + r * 8 * p.out_strides[1]);
        fragment.for_each_piece(r, g, [&](int k, const typename Rounded::Words& words) {
          if (rows.has(r) && k / Gather::kPhases < left) store_words(to + k, words.value);
        });
      }
    }
  }
};

// Through shared memory, from where lanes run along rows of the chunk, kVector neighbours each. 0: wherever outputs
// lie, one by one.
template <class T, class Gather, int kVector>
struct ChunkStore {
  static constexpr bool kThroughMemory = true, kFlushSoon = false;
  static constexpr int kPhases = Gather::kPhases;
  static constexpr int kEach = kVector > 0 ? kVector : 1;

  const WarpRows& rows;
  Chunk<T>& memory;
  GroupPlaces groups;
  int missing;  // the lane stores if more pixels than these exist from its group's first one on
  int64 own;    // from a group's place to the lane's
  int64 step;   // from one of its rows to the next

  __device__ ChunkStore(const WarpgroupParams& p, const WarpRows& rows, Chunk<T>& memory, const TileOutputs& outputs)
      : rows(rows), memory(memory), groups(outputs, rows.lane), step(kEach * p.out_strides[1]) {
    int phase = column() % kPhases, pixel = column() / kPhases % 8;
    missing = pixel + outputs.lacks(phase);
    own = row() * p.out_strides[1] + phase * p.out_strides[3] + pixel * outputs.pixel_stride();
  }

  // The first of the chunk's rows that a lane stores, and its column there.
  __device__ int row() const { return rows.lane * kEach / kWarp; }
  __device__ int column() const { return rows.lane * kEach % kWarp; }

  struct Place {
    int64 at;
    bool exists;
  };
  __device__ Place locate(int chunk) const {
    int group = chunk * Fragment<Gather>::kGroups + column() / kPhases / 8;
    return Place{groups.place_of(group) + own, groups.left_of(group) > missing};
  }

  __device__ void put(const Place&, void*, const RoundedFragment<T, Gather>& fragment) const {
    memory.fill(fragment, rows);
  }

  using Piece = StorePiece<T, kEach>;
  static constexpr int kApart = sizeof(memory.at[0]) / sizeof(T), kCount = kWarpRows / kEach;
  struct Pending {
    Piece pieces[kCount];
    T* to;
    bool exists;
  };
  __device__ Pending fetch(const Place& place, void* tensor) const {
    __syncwarp();
    const Piece* from = reinterpret_cast<const Piece*>(&memory.at[row()][column()]);
    Pending pending;
#pragma unroll
    for (int i = 0; i < kCount; ++i) pending.pieces[i] = from[i * kApart];
    pending.to = static_cast<T*>(tensor) + place.at;
    pending.exists = place.exists & (rows.count == kWarpRows);
    if (place.exists & (rows.count < kWarpRows)) store_some(pending.to, from);
    __syncwarp();
    return pending;
  }
  __device__ void flush(const Pending& pending) const {
    if (!pending.exists) return;
    T* to = pending.to;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      pending.pieces[i].store(to);
      to += step;
    }
  }

  // The rows that exist, if not all do.
  __device__ void store_some(T* to, const Piece* from) const {
#pragma unroll 1
    for (int i = row(); i < rows.count; i += kEach) {
      from->store(to);
      from += kApart;
      to += step;
    }
  }
};

// A chunk in shared memory as it lies in an output whose channels are neighbours, from where a lane reads pieces of 16
// bytes: of kCount outputs of one phase, kStep pixels apart in one group of 8. So no row of the tile ends between them,
// and the lane goes from one to the next by adding. The words of a chunk, and 8 lanes' pieces, lie in different banks.
template <class T, class Gather, int kSize = sizeof(T)>
struct ChannelChunk;

// Of float, pixel by pixel, phase by phase, with 4 words more for each pixel.
template <class T, class Gather>
struct ChannelChunk<T, Gather, 4> {
  using Values = Fragment<Gather>;
  static constexpr int kPhases = Gather::kPhases, kCount = 4, kStep = 1;
  static constexpr int kPixel = kPhases * kWarpRows + 4, kApart = kStep * kPixel;
  static_assert(kWarp / kPhases * kPixel * sizeof(T) <= sizeof(Chunk<T>), "more than a warp has");

  T* at;

  // The first output of a lane, and the first channel of it that the lane has.
  __device__ static int pixel_of(int lane) { return lane / 8 / kPhases * 8 + lane / 4 % 2 * 4; }
  __device__ static int phase_of(int lane) { return lane / 8 % kPhases; }
  __device__ static int channel_of(int lane) { return lane % 4 * 4; }

  __device__ void fill(const RoundedFragment<T, Gather>& fragment, int lane) const {
    T* to = at + Values::pixel_of(lane, 0) * kPixel + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int g = 0; g < Values::kGroups; ++g)
#pragma unroll
        for (int k = 0; k < Values::kRun; ++k)
          to[(8 * g + k / kPhases) * kPixel + k % kPhases * kWarpRows + 8 * r] =
              __uint_as_float(fragment.pair[r][g][k / 2].words[k % 2]);
  }

  __device__ const T* piece(int lane) const {
    return at + pixel_of(lane) * kPixel + phase_of(lane) * kWarpRows + channel_of(lane);
  }
};

// Of 16-bit types, in two halves of 8 channels, which have 16 bytes for each output. A register of the warp is 8
// outputs of 8 channels, a lane having 2 neighbours of a run; it is stored transposed. Outputs lie in the order of
// registers.
template <class T, class Gather>
struct ChannelChunk<T, Gather, 2> {
  static constexpr int kPhases = Gather::kPhases, kCount = 2, kStep = 4;
  static constexpr int kUnit = 8, kApart = kStep * kUnit;
  static constexpr int kHalf = (kWarp + 4) * kUnit;  // 4 more, so that the halves of 4 outputs lie in different banks
  static_assert((kHalf + kWarp * kUnit) * sizeof(T) <= sizeof(Chunk<T>), "more than a warp has");

  T* at;

  // Lanes 8 n to 8 n + 7 read register n, first its outputs 0 to 3, then 4 to 7.
  __device__ static int in_run(int lane) { return lane / 8 % kPhases * 2 + lane / 2 % 2; }
  __device__ static int pixel_of(int lane) {
    return lane / 8 / kPhases * 8 + lane / 4 % 2 * 2 + in_run(lane) / kPhases;
  }
  __device__ static int phase_of(int lane) { return in_run(lane) % kPhases; }
  __device__ static int channel_of(int lane) { return lane % 2 * 8; }

  __device__ void fill(const RoundedFragment<T, Gather>& fragment, int lane) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      unsigned words[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) words[n] = fragment.pair[r][n / kPhases][n % kPhases].words[0];
      store_matrices_transposed(at + lane * kUnit + r * kHalf, words);
    }
  }

  __device__ const T* piece(int lane) const { return at + (lane / 8 * 8 + lane / 2 % 4) * kUnit + lane % 2 * kHalf; }
};

// Through shared memory, from where lanes run along channels, which are neighbours in the output, kChannels each: 16
// bytes where these are aligned, and exist whole or not at all.
template <class T, class Gather, int kChannels>
struct ChannelStore {
  using InMemory = ChannelChunk<T, Gather>;
  static constexpr int kCount = InMemory::kCount, kPiece = 16 / sizeof(T);
  // Parts of pieces, and four phases, need so many registers that the work in between should not be of values.
  static constexpr bool kThroughMemory = true, kFlushSoon = kChannels < kPiece || Gather::kPhases == 4;

  const WarpRows& rows;
  InMemory memory;
  GroupPlaces groups;
  int group, missing;  // of the chunk's groups that of the lane's outputs, and of the pixels that exist from its first
                       // one on those before the lane's
  int64 own;           // from a group's place to the lane's first output
  int64 step;          // from one of these to the next

  __device__ ChannelStore(const WarpgroupParams& p, const WarpRows& rows, Chunk<T>& memory, const TileOutputs& outputs)
      : rows(rows), memory{memory.at[0]}, groups(outputs, rows.lane) {
    int phase = InMemory::phase_of(rows.lane), channel = InMemory::channel_of(rows.lane);
    int pixel = InMemory::pixel_of(rows.lane);
    group = pixel / 8;
    missing = pixel % 8 + outputs.lacks(phase);
    if (kChannels == kPiece && channel >= rows.count) missing = p.tile_columns;
    own = channel + phase * p.out_strides[3] + pixel % 8 * outputs.pixel_stride();
    step = InMemory::kStep * outputs.pixel_stride();
  }

  struct Place {
    int64 at;
    int left;  // pixels, from the lane's first one on
  };
  __device__ Place locate(int chunk) const {
    int own_group = chunk * Fragment<Gather>::kGroups + group;
    return Place{groups.place_of(own_group) + own, groups.left_of(own_group) - missing};
  }

  // kChannels of each of a lane's outputs.
  struct Parts {
    StorePiece<T, kChannels> part[kCount];

    __device__ void load(const T* from) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        part[i] = *reinterpret_cast<const StorePiece<T, kChannels>*>(from + i * InMemory::kApart);
    }

    // `left` pixels exist, from the first output's on; outputs are `step` apart.
    __device__ void store(T* to, int64 step, int left) const {
      to = opaque(to);  // or addresses would be computed from the tensor's anew under the condition of every store
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i * InMemory::kStep < left) part[i].store(to);
        to = opaque(to + step);
      }
    }
  };

  __device__ void put(const Place&, void*, const RoundedFragment<T, Gather>& fragment) const {
    memory.fill(fragment, rows.lane);
  }

  struct Pending {
    Parts whole;
    T* to;
    int left;
  };
  __device__ Pending fetch(const Place& place, void* tensor) const {
    Pending pending;
    __syncwarp();
    if constexpr (kChannels == kPiece) {
      pending.whole.load(memory.piece(rows.lane));
      pending.to = static_cast<T*>(tensor) + place.at;
      pending.left = place.left;
    } else {
      store_divided(static_cast<T*>(tensor), place.at, place.left);
    }
    __syncwarp();
    return pending;
  }
  __device__ void flush(const Pending& pending) const {
    if constexpr (kChannels == kPiece) pending.whole.store(pending.to, step, pending.left);
  }

  // The pieces of the warp in parts of kChannels, neighbouring parts by neighbouring lanes, so that what one
  // instruction stores of an output lies together. A part's place comes from the lane that has the piece.
  __device__ void store_divided(T* tensor, int64 own_place, int own_left) const {
    // Single channels fewer at a time, or a place for each would take more registers than there are.
    constexpr int kMost = kReadTogether / kCount / (kChannels == 1 ? 2 : 1);
    constexpr int kParts = kPiece / kChannels, kAtOnce = kParts < kMost ? kParts : kMost;
    unsigned own = unsigned(opaque(rows.lane)) % kWarp, channel = own % kParts * kChannels;
#pragma unroll
    for (int first = 0; first < kParts; first += kAtOnce) {
      Parts parts[kAtOnce];
      int64 place[kAtOnce];
      int left[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        unsigned lane = (first + n) * (kWarp / kParts) + own / kParts;
        parts[n].load(memory.piece(lane) + channel);
        place[n] = __shfl_sync(kFullMask, own_place, lane) + channel;
        left[n] = __shfl_sync(kFullMask, own_left, lane);
        if (InMemory::channel_of(lane) + channel >= rows.count) left[n] = 0;
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) parts[n].store(tensor + place[n], step, left[n]);
    }
  }
};

template <bool kFirst, class First, class Second>
struct Select {
  using type = First;
};
template <class First, class Second>
struct Select<false, First, Second> {
  using type = Second;
};

// How to store kVector neighbours in memory, aligned, that all exist or none of them: outputs of a row, 1 or 2, or 16
// bytes of them; or below 0, channels. Where runs are too short the 16 bytes are of a row that several threads have.
template <class T, class Gather, int kVector>
struct Store {
  using Run = RunStore<T, Gather>;
  using Row = ChunkStore<T, Gather, (kVector > 1 ? kVector : 0)>;
  static_assert(kVector <= 2 || kVector == 16 / int(sizeof(T)), "neither single outputs, nor pairs, nor 16 bytes");
  using Outputs = typename Select<(kVector > 2) && Run::kPossible, Run, Row>::type;
  using Channels = ChannelStore<T, Gather, (kVector < 0 ? -kVector : 1)>;
  using type = typename Select<(kVector < 0), Channels, Outputs>::type;
};

// A chain of functions with the operands of a thread's two rows.
template <class T, class Chain>
struct FragmentChain {
  using Operands = typename Chain::template Operands<T>;
  Operands operands[2];

  __device__ FragmentChain(const Operands& numbers, const typename Chain::Params& params, const WarpRows& rows) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      operands[r] = numbers;
      operands[r].load_tensors(params, rows.channel(r));
    }
  }

  // Row by row: what both compute on the way together would take more registers than there are.
  template <class Gather>
  __device__ void apply(Fragment<Gather>& values) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int g = 0; g < Fragment<Gather>::kGroups; ++g) pin(values.value[r][g]);
#pragma unroll
      for (int g = 0; g < Fragment<Gather>::kGroups; ++g)
#pragma unroll
        for (int k = 0; k < Fragment<Gather>::kRun; ++k)
          values.value[r][g][k] = Chain::template value<T>(values.value[r][g][k], operands[r]);
#pragma unroll
      for (int g = 0; g < Fragment<Gather>::kGroups; ++g) pin(values.value[r][g]);
    }
  }
};

// A job's chunks, in order: for_each(visit, done) calls visit(i, first, values) for chunk i, kTogether times in a
// round, and done() at the round's end.
//
// No instruction can index registers. Branches to the code that takes chunk i cost a warp that is alone on its
// scheduler some 130 cycles a chunk; code for each chunk does not fit into the nearest instruction cache, and takes
// twice as long. So the first kTogether chunks are taken, over and over, and others moved to their place: half of all
// once, a quarter of all twice, and so on. It uses up the sums.
//
// kSelect: what is moved in one round or another, the assembler merges into selections. That is more instructions than
// branches to what is moved, but fewer registers, and with functions of values in the round it was 9 % faster; branches
// were 1 to 4 % faster without, and with moments.
template <class T, class Gather, int kTogether, bool kSelect>
struct Chunks {
  using Values = Fragment<Gather>;
  using Sums = float[Gather::kPhases][Gather::kPixels / 2];
  static constexpr int kSums = Values::kGroups * 4;  // of a chunk, in each phase

  Sums& sum;
  FragmentBias<T> bias;

  __device__ Chunks(Sums& sum, const void* bias, const WarpRows& rows) : sum(sum), bias(bias, rows) {}

  template <class Visit, class Done>
  __device__ __forceinline__ void for_each(Visit visit, Done done) const {
#pragma unroll 1
    for (int i = 0; i < Values::kCount; i += kTogether) {
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        Values values;
        take(k, values);
        visit(i + k, k == 0, values);
      }
      if constexpr (kSelect)
        select(i + kTogether);
      else
        bring(i + kTogether);
      done();
    }
  }

  // Brings chunk `next`, a multiple of kTogether, to the first place, with as many after it as come before others are
  // moved.
  template <int kSize = kTogether>
  __device__ __forceinline__ void bring(int next) const {
    if constexpr (kSize < Values::kCount) {
      if (next % (2 * kSize) != kSize) return bring<2 * kSize>(next);
      move<kSize, 2 * kSize>();
      __syncwarp();  // keeps it a branch: moves under a condition would take their time in every round
    }
  }

  // The same, with all after it of its half.
  __device__ __forceinline__ void select(int next) const {
    constexpr int kHalf = Values::kCount / 2;
    if (next % kHalf)
      move<kTogether, kHalf>();
    else
      move<kHalf, Values::kCount>();
  }

  // The sums of chunks kFrom to kTo to the place of the first ones.
  template <int kFrom, int kTo>
  __device__ __forceinline__ void move() const {
#pragma unroll
    for (int phase = 0; phase < Gather::kPhases; ++phase)
#pragma unroll
      for (int j = kFrom * kSums; j < kTo * kSums; ++j) sum[phase][j - kFrom * kSums] = sum[phase][j];
  }

  // Chunk i, when it is its turn. visit() may take it once more, if its values would need too many registers while
  // others pass through them.
  __device__ __forceinline__ void take(int i, Values& values) const { values.take(sum, i % kTogether, bias.value); }
};

// output = chain(sum + bias), and if kSave, saved = sum + bias, which the backward pass will need. Same strides for
// both; kVector: see Store.
template <class T, class Chain, int kVector, bool kSave>
struct WarpgroupStore {
  static constexpr bool kAllRows = false;
  struct Params {
    void* output;
    void* saved;
    const void* bias;
    typename Chain::Params chain;
  };
  template <class Gather>
  struct Storage {
    Chunk<T> chunks[Gather::kConsumerWarps];
  };

  const Params& params;
  const WarpgroupParams& gather;
  typename Chain::template Operands<T> numbers;

  __device__ WarpgroupStore(const Params& params, const WarpgroupParams& gather) : params(params), gather(gather) {
    numbers.load_numbers(params.chain);
  }

  template <class Gather>
  __device__ __forceinline__ void consume(Storage<Gather>& storage, float (&sum)[Gather::kPhases][Gather::kPixels / 2],
                                          const TilePlace& tile, const Job& job, int group_row, int first_row) {
    WarpRows rows(gather, group_row, first_row);
    if (rows.count <= 0) return;
    using Rounded = RoundedFragment<T, Gather>;
    using Tensors = typename Store<T, Gather, kVector>::type;
    FragmentChain<T, Chain> chain(numbers, params.chain, rows);
    TileOutputs outputs(gather, tile, job, rows.first);
    Tensors tensors(gather, rows, storage.chunks[threadIdx.x / kWarp], outputs);
    Chunks<T, Gather, 2, true> chunks(sum, params.bias, rows);
    typename Tensors::Pending pending;
    auto flush = [&] { tensors.flush(pending); };
    auto visit = [&](int i, bool first, Fragment<Gather>& values) {
      auto place = tensors.locate(i);
      if (kSave) {
        if (!first) flush();
        tensors.put(place, params.saved, Rounded(values));
        tensors.flush(tensors.fetch(place, params.saved));
        if (Tensors::kThroughMemory) chunks.take(i, values);
      }
      chain.apply(values);
      if (!kSave && !first) flush();
      tensors.put(place, params.output, Rounded(values));
      pending = tensors.fetch(place, params.output);
    };
    chunks.for_each(visit, flush);
  }
};

// output = sum + bias, and for every channel and tile the moments of chain(output), as rounded to the element type:
// moments[(image * channels + channel) * slots + slot]. Tiles do not straddle images (`stack` is a multiple of
// `tile_rows`). Four lanes share a channel; they sum deviations and their squares in one pass, around a mean of a few
// of its values, so that a large mean costs no digits.
template <class T, class Chain, int kVector>
struct WarpgroupStoreWithMoments {
  static constexpr bool kAllRows = false;
  struct Params {
    void* output;
    const void* bias;
    Moments* moments;
    int64 slots;
    typename Chain::Params chain;
  };
  template <class Gather>
  struct Storage {
    Chunk<T> chunks[Gather::kConsumerWarps];
  };

  // Over the four lanes of a row.
  template <class Value>
  __device__ static Value row_sum(Value value) {
    value += __shfl_xor_sync(kFullMask, value, 1);
    return value + __shfl_xor_sync(kFullMask, value, 2);
  }

  // Of what exists in a thread's two rows.
  template <class Gather>
  struct Deviations {
    using Values = Fragment<Gather>;

    const GroupPlaces& groups;
    int pixel;  // the lane's first one in a group
    bool lacks[Gather::kPhases];
    float origin[2], total[2] = {}, squares[2] = {};

    __device__ Deviations(const GroupPlaces& groups, const TileOutputs& outputs, const WarpRows& rows)
        : groups(groups), pixel(Values::pixel_of(rows.lane, 0)) {
#pragma unroll
      for (int phase = 0; phase < Gather::kPhases; ++phase) lacks[phase] = outputs.lacks(phase);
    }

    __device__ void add(const Values& values, int chunk) {
#pragma unroll
      for (int g = 0; g < Values::kGroups; ++g) {
        int left = groups.left_of(chunk * Values::kGroups + g) - pixel;
#pragma unroll
        for (int k = 0; k < Values::kRun; ++k) {
          bool exists = k / Gather::kPhases < left - lacks[Values::phase_of(k)];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float deviation = exists ? values.value[r][g][k] - origin[r] : 0.0f;
            total[r] += deviation;
            squares[r] += deviation * deviation;
          }
        }
      }
    }

    // To the mean of four values of the first chunk; any number would do that is no further from the values than they
    // are from each other. The first lane's value exists, or nothing of the job does.
    __device__ void set_origin(const Values& values) {
      bool exists = pixel < groups.left_of(0);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float own = values.value[r][0][0], first = __shfl_sync(kFullMask, own, int(threadIdx.x % kWarp) & ~3);
        origin[r] = row_sum(0.25f * (exists ? own : first));
      }
    }

    // Of a lane's row r, in all lanes of that row; `count` values exist. One row, since division of doubles is slow.
    __device__ Moments moments(int r, int count) const {
      float sums[2] = {row_sum(total[0]), row_sum(total[1])}, all[2] = {row_sum(squares[0]), row_sum(squares[1])};
      double sum = r ? sums[1] : sums[0], mean = sum / count, m2 = (r ? all[1] : all[0]) - sum * mean;
      return count ? Moments{double(count), (r ? origin[1] : origin[0]) + mean, m2 < 0 ? 0 : m2} : Moments{0, 0, 0};
    }
  };

  const Params& params;
  const WarpgroupParams& gather;
  typename Chain::template Operands<T> numbers;

  __device__ WarpgroupStoreWithMoments(const Params& params, const WarpgroupParams& gather)
      : params(params), gather(gather) {
    numbers.load_numbers(params.chain);
  }

  template <class Gather>
  __device__ __forceinline__ void consume(Storage<Gather>& storage, float (&sum)[Gather::kPhases][Gather::kPixels / 2],
                                          const TilePlace& tile, const Job& job, int group_row, int first_row) {
    WarpRows rows(gather, group_row, first_row);
    if (rows.count <= 0) return;
    using Rounded = RoundedFragment<T, Gather>;
    using Tensor = typename Store<T, Gather, kVector>::type;
    TileOutputs outputs(gather, tile, job, rows.first);
    Tensor tensor(gather, rows, storage.chunks[threadIdx.x / kWarp], outputs);
    Chunks<T, Gather, 1, Tensor::kFlushSoon> chunks(sum, params.bias, rows);
    FragmentChain<T, Chain> chain(numbers, params.chain, rows);
    Deviations<Gather> deviations(tensor.groups, outputs, rows);
    auto visit = [&](int i, bool, Fragment<Gather>& values) {
      auto place = tensor.locate(i);
      tensor.put(place, params.output, Rounded(values));
      if (Tensor::kFlushSoon) {
        tensor.flush(tensor.fetch(place, params.output));
        chunks.take(i, values);
      }
      Rounded(values).get(values);
      chain.apply(values);
      if (opaque(i) == 0) deviations.set_origin(values);  // or the first round would be written out apart
      deviations.add(values, i);
      if (!Tensor::kFlushSoon) tensor.flush(tensor.fetch(place, params.output));
    };
    chunks.for_each(visit, [] {});
    // Worked out anew, not kept in registers meanwhile.
    write(deviations, Gather::place(gather, opaque(job.tile)), job, rows);
  }

  template <class Gather>
  __device__ void write(const Deviations<Gather>& deviations, const TilePlace& tile, const Job& job,
                        const WarpRows& rows) const {
    int count = TileOutputs(gather, tile, job, 0).count(Gather::kPhases), r = rows.lane % 2;
    Moments own = deviations.moments(r, count);
    int tiles_per_image = gather.stack / gather.tile_rows;
    int64 slot = tile.row_tile % tiles_per_image * gather.column_tiles + tile.column_tile;
    int64 row = int64(tile.image) * gather.groups * gather.rows + rows.channel(r);
    if (rows.lane % 4 < 2 && rows.has(r)) params.moments[row * params.slots + slot * gather.passes + job.pass] = own;
  }
};

// values[pixel] = minimum over all channels of sum + bias, index[pixel] = the channel it came from; out strides
// describe one pixel plane per image. As torch.min: the first of equal values, NaN before everything.
//
// Values come first, without their channels, which would triple the instructions. A lane has the smaller one of its two
// rows, for all columns. Eight lanes have the same columns: by exchanging half of them, then a quarter, then an eighth,
// each comes to have the minimum of every eighth one over all rows of the warp. The consumer's four warps meet, and
// each thread compares its own columns' minimum in this unit with that of the units before, which it keeps in
// registers. Where it is smaller, its channel is wanted: all threads look for every column's very minimum among their
// sums and note where they find it. The lowest such row of the first warp that has the minimum is the answer, which is
// read when the four warps meet for the next unit, or, after the last unit, once more.
template <class T>
struct WarpgroupChannelMin {
  static constexpr bool kAllRows = true;
  struct Params {
    float* values;
    int* index;
    const void* bias;
  };

  // Columns in shared memory. 32 pixels, 8 a + 2 b + c, lie in the order 8 b + 2 a + c, so that the 8 of them that a
  // thread has sums of are neighbours. Phases are shifted to other banks, for those who read neighbours in the output.
  template <class Gather>
  struct alignas(16) Columns {
    float at[Gather::kPhases][Gather::kPixels + 4];
  };
  // Where a warp found the minima: for each 32 pixels, b and lane / 4, the set of (2 a + c) + 8 r.
  template <class Gather>
  struct alignas(16) Finds {
    static constexpr int kBlocks = Gather::kPixels / 32;
    unsigned short at[Gather::kPhases][kBlocks][4][8];
  };
  template <class Gather>
  struct Storage {
    Columns<Gather> of_warp[Gather::kConsumerWarps], of_unit[Gather::kConsumers];  // minima
    Finds<Gather> finds[Gather::kConsumerWarps];
  };

  // A thread's own columns: threads are neighbours in the output, where phases are interleaved. Where there are fewer
  // columns than threads, two threads have the same, and write the same.
  template <class Gather>
  struct Own {
    static constexpr int kColumns = Gather::kPhases * Gather::kPixels;
    static constexpr int kCount = kColumns < kWarpgroup ? 1 : kColumns / kWarpgroup;
    int phase, pixel;  // of the first one; the others are a multiple of 32 pixels apart

    __device__ Own() {
      int column = threadIdx.x % (kColumns < kWarpgroup ? kColumns : kWarpgroup);
      phase = column % Gather::kPhases;
      pixel = column / Gather::kPhases;
    }
    __device__ int pixel_of(int i) const { return pixel + i * (kWarpgroup / Gather::kPhases); }
    __device__ int a() const { return pixel / 8 % 4; }
    __device__ int b() const { return pixel / 2 % 4; }
    __device__ int c() const { return pixel % 2; }
    __device__ float& in(Columns<Gather>& columns, int i) const {
      return columns.at[phase][pixel_of(i) / 32 * 32 + b() * 8 + a() * 2 + c()];
    }
    // What the lanes of a warp found, and the lowest row among it.
    __device__ const Unit& in(const Finds<Gather>& finds, int i) const {
      return *reinterpret_cast<const Unit*>(finds.at[phase][pixel_of(i) / 32][b()]);
    }
    __device__ int row(const Unit& finds) const {
      unsigned found = 0;  // bit 16 (lane % 2) + 8 r + lane / 2 * 2
#pragma unroll
      for (int i = 0; i < 4; ++i) found |= (finds.words[i] >> (a() * 2 + c()) & 0x01010101) << 2 * i;
      return __ffs(found | found >> 15) - 1;
    }
  };

  const Params& params;
  const WarpgroupParams& gather;
  int group_row = 0, first_row = 0;  // of the next unit: jobs are all of a tile's units, in order, for each pass
  T bias[2];                         // of a thread's two rows in the next unit, loaded while the one before ends
  float best[2];                     // of a thread's own columns, in the units so far
  int channel[2];

  __device__ WarpgroupChannelMin(const Params& params, const WarpgroupParams& gather)
      : params(params), gather(gather), best{}, channel{} {
    load_bias(WarpRows(gather, group_row, first_row));
  }

  template <class Gather>
  __device__ void consume(Storage<Gather>& storage, float (&sum)[Gather::kPhases][Gather::kPixels / 2],
                          const TilePlace&, const Job& job, int, int) {
    WarpRows rows(gather, group_row, first_row);
    int warp = threadIdx.x / kWarp, first_channel = group_row + first_row;
    Columns<Gather>*of_warps = &storage.of_warp[warp / 4 * 4], &of_unit = storage.of_unit[warp / 4];
    Finds<Gather>* finds = &storage.finds[warp / 4 * 4];
    bool last = job.unit == gather.units * gather.groups - 1;
    Own<Gather> own;
    add_bias<Gather>(sum, rows);
    next_rows<Gather>(last);
    store_minima<Gather>(of_warps[warp % 4], sum, rows.lane);
    named_barrier(1 + job.consumer, kWarpgroup);
    float minima[Own<Gather>::kCount][4];
    Unit before[Own<Gather>::kCount];
    load_minima(minima, own, of_warps);
    load_finds(before, own, finds);
    store_minima_of_unit(of_unit, own, minima);
    named_barrier(1 + job.consumer, kWarpgroup);
    take_channels(own, before);
    compare<Own<Gather>::kCount>(minima, job, first_channel);
    find<Gather>(finds[warp % 4], of_unit, sum, rows.lane);
    if (last) write(own, finds, job);
  }

  template <class Gather>
  __device__ void next_rows(bool last) {
    first_row += Gather::kRows;
    bool next_group = first_row == gather.units * Gather::kRows;
    first_row = next_group ? 0 : first_row;
    group_row = last ? 0 : next_group ? group_row + gather.rows : group_row;
    load_bias(WarpRows(gather, group_row, first_row));
  }
  __device__ void load_bias(const WarpRows& rows) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bias[r] = T{};
      if (params.bias && rows.has(r)) bias[r] = static_cast<const T*>(params.bias)[rows.channel(r)];
    }
  }

  // Rows that do not exist become infinite: should that be the minimum, then a row that exists comes before them. The
  // bias is never minus zero, and so neither is a sum: minima are found by their bits.
  template <class Gather>
  __device__ void add_bias(float (&sum)[Gather::kPhases][Gather::kPixels / 2], const WarpRows& rows) const {
    float add[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) add[r] = rows.has(r) ? to_accumulator(bias[r]) + 0.0f : __uint_as_float(0x7f800000);
    if (rows.count < kWarpRows) {  // where an input is infinite, their sums are no numbers
#pragma unroll
      for (int phase = 0; phase < Gather::kPhases; ++phase)
#pragma unroll
        for (int i = 0; i < Gather::kPixels / 2; ++i) sum[phase][i] = rows.has(i / 2 % 2) ? sum[phase][i] : 0.0f;
    }
#pragma unroll
    for (int phase = 0; phase < Gather::kPhases; ++phase)
#pragma unroll
      for (int i = 0; i < Gather::kPixels / 2; ++i) sum[phase][i] += add[i / 2 % 2];
  }

  // Of the eight lanes that have the same columns, the one with rows g and g + 8 stores the g-th of every eight.
  template <class Gather>
  __device__ static void store_minima(Columns<Gather>& columns,
                                      const float (&sum)[Gather::kPhases][Gather::kPixels / 2], int lane) {
#pragma unroll
    for (int phase = 0; phase < Gather::kPhases; ++phase)
#pragma unroll
      for (int block = 0; block < Gather::kPixels / 32; ++block) {
        float smallest[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float* two_rows = &sum[phase][block * 16 + i / 2 * 4 + i % 2];
          smallest[i] = math::smaller(two_rows[0], two_rows[2]);
        }
#pragma unroll
        for (int half = 4; half > 0; half /= 2) {
          bool upper = lane & 4 * half;
#pragma unroll
          for (int i = 0; i < half; ++i) {
            float keep = upper ? smallest[i + half] : smallest[i], give = upper ? smallest[i] : smallest[i + half];
            smallest[i] = math::smaller(keep, __shfl_xor_sync(kFullMask, give, 4 * half));
          }
        }
        columns.at[phase][block * 32 + lane % 4 * 8 + lane / 4] = smallest[0];
      }
  }

  __device__ static float smallest_of_warps(const float (&minima)[4]) {
    return math::smaller(math::smaller(minima[0], minima[1]), math::smaller(minima[2], minima[3]));
  }
  template <class Gather>
  __device__ static void load_minima(float (&minima)[Own<Gather>::kCount][4], const Own<Gather>& own,
                                     Columns<Gather>* of_warps) {
#pragma unroll
    for (int i = 0; i < Own<Gather>::kCount; ++i)
#pragma unroll
      for (int warp = 0; warp < 4; ++warp) minima[i][warp] = own.in(of_warps[warp], i);
  }
  template <class Gather>
  __device__ static void store_minima_of_unit(Columns<Gather>& of_unit, const Own<Gather>& own,
                                              const float (&minima)[Own<Gather>::kCount][4]) {
#pragma unroll
    for (int i = 0; i < Own<Gather>::kCount; ++i) own.in(of_unit, i) = smallest_of_warps(minima[i]);
  }

  // While a channel is wanted, `channel` has the first one of the unit and the warp that has the minimum.
  __device__ static int wanted(int first_channel, int warp) { return ~(first_channel << 2 | warp); }

  template <class Gather>
  __device__ void load_finds(Unit (&found)[Own<Gather>::kCount], const Own<Gather>& own,
                             const Finds<Gather>* finds) const {
#pragma unroll
    for (int i = 0; i < Own<Gather>::kCount; ++i) found[i] = own.in(finds[~channel[i] & 3], i);
  }
  template <class Gather>
  __device__ void take_channels(const Own<Gather>& own, const Unit (&found)[Own<Gather>::kCount]) {
#pragma unroll
    for (int i = 0; i < Own<Gather>::kCount; ++i) {
      int wanted = ~channel[i], answer = (wanted >> 2) + (wanted & 3) * kWarpRows + own.row(found[i]);
      channel[i] = wanted < 0 ? channel[i] : answer;
    }
  }

  template <int kCount>
  __device__ void compare(const float (&minima)[kCount][4], const Job& job, int first_channel) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float unit = smallest_of_warps(minima[i]);
      int first = 3;  // warp that has it
#pragma unroll
      for (int warp = 2; warp >= 0; --warp)
        first = bits_of_result(minima[i][warp]) == bits_of_result(unit) ? warp : first;
      bool better = (job.unit == 0) | (unit < best[i]) | ((unit != unit) & (best[i] == best[i]));
      best[i] = better ? unit : best[i];
      channel[i] = better ? wanted(first_channel, first) : channel[i];
    }
  }

  // The next block's minima are on their way while one's are looked for.
  template <class Gather>
  __device__ static void find(Finds<Gather>& finds, const Columns<Gather>& minima,
                              const float (&sum)[Gather::kPhases][Gather::kPixels / 2], int lane) {
    constexpr int kBlocks = Finds<Gather>::kBlocks, kCount = Gather::kPhases * kBlocks;
    Unit units[2][2];
    auto load = [&](int block) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        units[block % 2][half] =
            *reinterpret_cast<const Unit*>(&minima.at[block / kBlocks][block % kBlocks * 32 + lane % 4 * 8 + half * 4]);
    };
    load(0);
#pragma unroll
    for (int block = 0; block < kCount; ++block) {
      if (block + 1 < kCount) load(block + 1);
      const float* sums = &sum[block / kBlocks][block % kBlocks * 16];
      FloatSet found;
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          found.add_if_equal(i + 8 * r, units[block % 2][i / 4].words[i % 4],
                             bits_of_result(sums[i / 2 * 4 + 2 * r + i % 2]));
      finds.at[block / kBlocks][block % kBlocks][lane % 4][lane / 4] = (unsigned short)(found.bits());
    }
  }

  template <class Gather>
  __device__ void write(const Own<Gather>& own, const Finds<Gather>* finds, const Job& job) {
    TilePlace tile = Gather::place(gather, opaque(job.tile));
    TileOutputs outputs(gather, tile, job, 0);
    int64 place[Own<Gather>::kCount];
#pragma unroll
    for (int i = 0; i < Own<Gather>::kCount; ++i) {
      int left = outputs.locate(own.pixel_of(i), place[i]) - outputs.lacks(own.phase);
      place[i] = left > 0 ? place[i] + own.phase * gather.out_strides[3] : -1;
    }
    named_barrier(1 + job.consumer, kWarpgroup);
    Unit found[Own<Gather>::kCount];
    load_finds(found, own, finds);
    take_channels(own, found);
#pragma unroll
    for (int i = 0; i < Own<Gather>::kCount; ++i) {
      if (place[i] < 0) continue;
      params.values[place[i]] = best[i];
      params.index[place[i]] = channel[i];
    }
  }
};

}  // namespace rawkern
