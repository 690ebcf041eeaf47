// Strips of channels, a block's share of a strip, and the vectors that a thread visits in it.
//
// Rows (COLUMNS false): [n, channels, inner * VEC]; a strip is one channel, its positions are the vectors of its n rows.
// Columns: [n, inner * VEC], channels last; a strip is `lanes` adjacent vectors of channels, its positions are the n rows.
// Thread t is lane t % lanes and starts at position t / lanes of the share.
//
// Ragged rows: [n, channels, row] elements, where rows begin and end inside vectors of the tensor. Each row has `inner`
// positions, the most vectors that a row can span. The neighbours' elements in them do not count and are not written.
//
// Ghost batches are such tensors one after another, each normalised separately. The strips of the first ghost batch come
// first, then those of the next. Geometry describes one ghost batch, except for Geometry::groups, which counts the strips
// in flight of all. Tensors and statistics have a leading axis of ghost batches; parameters do not.

struct Geometry {
  u32 channels;   // C
  u32 inner;      // vectors in a row
  u32 row;        // elements in a ragged row
  u32 lanes;      // a power of two up to 32; 1 for rows
  u32 strips;
  i64 positions;  // positions of a strip
  u32 share;      // positions of a block
  u32 blocks;     // blocks that share a strip
  u32 groups;     // strips in flight, which blocks work on at the same time

  // Return the number of means, which is also that of variances.
  __device__ __forceinline__ u32 statistics(bool grouped) const { return grouped ? groups / strips * channels : channels; }
};

#define GEOMETRY_ARGS \
  u32 channels, u32 inner, u32 row, u32 lanes, u32 strips, i64 positions, u32 share, u32 blocks, u32 groups
#define GEOMETRY_NAMES channels, inner, row, lanes, strips, positions, share, blocks, groups
#define GEOMETRY \
  Geometry { GEOMETRY_NAMES }

enum Batch { WHOLE, RAGGED_ROWS, GROUPS, MASKED_GROUPS };

template <class T_, int VEC_, bool COLUMNS_, Batch BATCH_ = WHOLE> struct Layout {
  typedef T_ T;
  typedef typename T::Compute A;  // the type of the arithmetic on elements
  typedef Vector<T, VEC_> V;
  static constexpr int VEC = VEC_;
  static constexpr bool COLUMNS = COLUMNS_;
  static constexpr Batch BATCH = BATCH_;
  static constexpr bool RAGGED = BATCH == RAGGED_ROWS;
  static constexpr bool GROUPED = BATCH == GROUPS || BATCH == MASKED_GROUPS;
  static constexpr bool MASKED = BATCH == MASKED_GROUPS;                          // a mask leaves elements out
  static constexpr int CHANNELS = COLUMNS ? VEC : 1;                              // channels of a thread
  static constexpr int MAX_CHANNELS = COLUMNS ? 128 / sizeof(typename T::Storage) : 1;  // channels of a strip
  static constexpr int PER_POSITION = COLUMNS ? 1 : VEC;                          // elements of a channel at a position
};

struct Cursor {
  i64 offset;  // offset in the tensor, in vectors
  u32 rest;    // vectors since the start of the row
  i64 start;   // offset of a ragged row's first element
};

template <class L> struct Tile {
  const Geometry& g;
  u32 strip, rank;  // numbers of the strip in its ghost batch, and of the block in the strip
  u32 group;
  u32 lane, row, step;
  u32 length;   // positions of this block
  u32 count;    // positions of this thread
  u32 jump_rest;
  i64 jump;

  __device__ __forceinline__ Tile(const Geometry& g, u32 strip_of_all, u32 rank)
      : g(g), strip(L::GROUPED ? strip_of_all % g.strips : strip_of_all), rank(rank) {
    group = L::GROUPED ? strip_of_all / g.strips : 0;
    lane = threadIdx.x & (g.lanes - 1);
    row = threadIdx.x / g.lanes;
    step = THREADS / g.lanes;
    length = length_of(rank);
    count = active() && row < length ? (length - row + step - 1) / step : 0;
    jump_rest = L::COLUMNS ? 0 : step % g.inner;
    if (L::COLUMNS) jump = (i64)step * g.inner;
    else jump = (i64)(step / g.inner) * g.channels * pitch() + (L::RAGGED ? 0 : jump_rest);
  }

  // Return the distance from a row to the next: in elements for ragged rows, else in vectors.
  __device__ __forceinline__ u32 pitch() const { return L::RAGGED ? g.row : g.inner; }

  __device__ __forceinline__ u32 length_of(u32 r) const {
    const i64 left = g.positions - (i64)r * g.share;
    return left < g.share ? (u32)left : g.share;
  }
  // Return the number of elements that a channel has in the share of block r, and in all shares.
  __device__ __forceinline__ double elements_of(u32 r) const {
    const i64 begin = (i64)r * g.share;
    if (L::RAGGED) return (double)(elements_before(begin + length_of(r)) - elements_before(begin));
    return (double)length_of(r) * L::PER_POSITION;
  }
  __device__ __forceinline__ double elements() const {
    if (L::RAGGED) return (double)(g.positions / g.inner) * g.row;
    return (double)g.positions * L::PER_POSITION;
  }

  // For ragged rows, return the number of elements of the channel before a position of the strip, and the offset of its
  // element i.
  __device__ __forceinline__ i64 elements_before(i64 p) const {
    const i64 n = p / g.inner;
    const i64 passed = (p - n * g.inner) * L::VEC - first_of(row_start(n));
    return n * g.row + (passed < 0 ? 0 : passed < g.row ? passed : g.row);
  }
  __device__ __forceinline__ i64 element(i64 i) const {
    const i64 n = i / g.row;
    return row_start(n) + (i - n * g.row);
  }
  __device__ __forceinline__ i64 row_start(i64 n) const { return (n * g.channels + strip) * g.row; }
  // Return the place of an element in its vector.
  __device__ __forceinline__ u32 first_of(i64 element) const { return (u32)element % L::VEC; }

  // Tell whether this lane has channels: the last strip may be narrower than the others.
  __device__ __forceinline__ bool active() const { return !L::COLUMNS || column() < g.inner; }
  __device__ __forceinline__ u32 column() const { return strip * g.lanes + lane; }
  // Return the number of channels of a strip, and the place of this thread's first channel in it.
  __device__ __forceinline__ u32 strip_channels() const { return L::COLUMNS ? g.lanes * L::VEC : 1; }
  __device__ __forceinline__ u32 own() const { return L::COLUMNS ? lane * L::VEC : 0; }
  __device__ __forceinline__ i64 channel(u32 place) const { return (i64)strip * strip_channels() + place; }

  __device__ __forceinline__ i64 strip_of_all() const { return L::GROUPED ? (i64)group * g.strips + strip : strip; }

  // Return the index of a channel's statistics.
  __device__ __forceinline__ i64 statistic(i64 channel) const {
    return L::GROUPED ? (i64)group * g.channels + channel : channel;
  }

  // Return the offset of the vector at a position of the strip, the same in all of its blocks.
  __device__ __forceinline__ i64 in_strip(i64 position) const { return base() + in_group(position).offset; }
  // Return the offset of the ghost batch's first vector.
  __device__ __forceinline__ i64 base() const {
    return L::GROUPED ? group * g.positions * (L::COLUMNS ? g.inner : g.channels) : 0;
  }

  // Return a cursor at a position of the share.
  __device__ __forceinline__ Cursor seek(u32 position) const {
    const i64 p = (i64)rank * g.share + position;
    Cursor cursor = in_group(p);
    cursor.offset += base();
    return cursor;
  }
  __device__ __forceinline__ Cursor in_group(i64 p) const {
    if (L::COLUMNS) return {p * g.inner + column(), 0, 0};
    const i64 n = p < 0xffffffffll ? (i64)((u32)p / g.inner) : p / g.inner;
    const u32 rest = (u32)(p - n * g.inner);
    if (L::RAGGED) return in_row(row_start(n), rest);
    return {(n * g.channels + strip) * g.inner + rest, rest, 0};
  }
  // Return a cursor at a vector of a ragged row. If the row spans fewer than `inner` vectors, its last one stands in for
  // the missing ones.
  __device__ __forceinline__ Cursor in_row(i64 start, u32 rest) const {
    const u32 last = (first_of(start) + g.row - 1) / L::VEC;
    return {(i64)((u64)start / L::VEC) + (rest < last ? rest : last), rest, start};
  }

  template <bool REVERSED> __device__ __forceinline__ void advance(Cursor& c) const {
    if (L::RAGGED) {
      const i64 to_next = (i64)g.channels * g.row;
      i64 start = REVERSED ? c.start - jump : c.start + jump;
      u32 rest = REVERSED ? c.rest - jump_rest : c.rest + jump_rest;
      if (REVERSED && c.rest < jump_rest) rest += g.inner, start -= to_next;
      if (!REVERSED && rest >= g.inner) rest -= g.inner, start += to_next;
      c = in_row(start, rest);
      return;
    }
    const i64 gap = (i64)(g.channels - 1) * g.inner;  // from the end of a row to the channel's next
    if (REVERSED) {
      c.offset -= jump;
      if (!L::COLUMNS) {
        if (c.rest < jump_rest) c.rest += g.inner, c.offset -= gap;
        c.rest -= jump_rest;
      }
    } else {
      c.offset += jump;
      if (!L::COLUMNS) {
        c.rest += jump_rest;
        if (c.rest >= g.inner) c.rest -= g.inner, c.offset += gap;
      }
    }
  }
};

// The elements of a vector that count. If all do, this needs no register.
template <class L, Batch BATCH = L::BATCH> struct Selected {
  __device__ __forceinline__ bool operator[](int) const { return true; }
};
// In ragged rows: a bit for each element, set if it belongs to the row.
template <class L> struct Selected<L, RAGGED_ROWS> {
  static constexpr u32 ALL = (1u << L::VEC) - 1;
  u32 bits;
  __device__ __forceinline__ bool operator[](int j) const { return bits >> j & 1u; }
};
template <class L> struct Selected<L, MASKED_GROUPS> {
  typedef Vector<Flag, L::COLUMNS ? 1 : L::VEC> Flags;
  Flags flags;
  __device__ __forceinline__ bool operator[](int j) const { return flags[L::COLUMNS ? 0 : j]; }
  // Return the number of elements of each channel that count.
  __device__ __forceinline__ u32 count() const {
    u32 n = 0;
#pragma unroll
    for (int j = 0; j < L::PER_POSITION; ++j) n += flags[j];
    return n;
  }
};

// Return the elements of a vector that belong to its row; all of them unless rows are ragged.
template <class L> DEVICE Selected<L> of_its_row(const Tile<L>& tile, const Cursor& cursor) {
  Selected<L> selected;
  if constexpr (L::RAGGED) {
    const u32 first = tile.first_of(cursor.start), before = cursor.rest * L::VEC, end = first + tile.g.row;
    const u32 count = end <= before ? 0 : end - before < L::VEC ? end - before : L::VEC;
    selected.bits = ((1u << count) - 1) & (cursor.rest ? Selected<L>::ALL : Selected<L>::ALL << first);
  }
  return selected;
}

// The last arguments of kernels for ghost batches; kernels for whole batches do not have them.
template <class L> struct Selection {
  const u8* valid = nullptr;  // [groups, positions * PER_POSITION] if MASKED
  double* counts = nullptr;   // [groups]: the number of elements that each channel has in a ghost batch

  // Return the elements that count at a position of the share.
  __device__ __forceinline__ Selected<L> at(const Tile<L>& tile, u32 position) const {
    Selected<L> selected;
    if constexpr (L::MASKED) {
      typedef typename Selected<L>::Flags Flags;
      const i64 in_strip = (i64)tile.rank * tile.g.share + position;
      selected.flags = load_shared_by_blocks((const Flags*)valid + (tile.group * tile.g.positions + in_strip));
    }
    return selected;
  }
  // Return the elements that count of this thread's vector i, which is at the cursor.
  __device__ __forceinline__ Selected<L> of(const Tile<L>& tile, u32 i, const Cursor& cursor) const {
    if constexpr (L::RAGGED) return of_its_row(tile, cursor);
    else return at(tile, tile.row + i * tile.step);
  }
};

// Write a vector; of a ragged row only its own elements, because blocks of other channels write the others.
template <class L> DEVICE void store(typename L::V* to, const typename L::V& v, const Selected<L>& selected) {
  if constexpr (L::RAGGED) {
    if (selected.bits != Selected<L>::ALL) {
#pragma unroll
      for (int j = 0; j < L::VEC; ++j)
        if (selected[j]) to->at[j] = v.at[j];
      return;
    }
  }
  store_once(to, v);
}

// Issue N loads, then use their results. No load is conditional, so that all are under way at the same time.
template <int N, bool REVERSED, class L, class Load, class Use>
DEVICE void batch(const Tile<L>& tile, Cursor& cursor, u32 first, Load load, Use use) {
  decltype(load(0u, cursor)) loaded[N];
  i64 offset[N];
#pragma unroll
  for (int u = 0; u < N; ++u) {
    offset[u] = cursor.offset;
    loaded[u] = load(REVERSED ? first - u : first + u, cursor);
    tile.template advance<REVERSED>(cursor);
  }
#pragma unroll
  for (int u = 0; u < N; ++u) use(loaded[u], offset[u]);
}

// Call use(load(i, cursor), offset) for this thread's vectors i in [begin, end), in batches of UNROLL loads; the last few
// in a batch of half the size and one of size 1.
template <int UNROLL, bool REVERSED, class L, class Load, class Use>
DEVICE void each(const Tile<L>& tile, u32 begin, u32 end, Load load, Use use) {
  if (begin >= end) return;
  Cursor cursor = tile.seek(tile.row + (REVERSED ? end - 1 : begin) * tile.step);
  u32 done = begin;
  const auto next = [&] { return REVERSED ? begin + end - 1 - done : done; };
  if constexpr (UNROLL == 1) {
    for (; done < end; ++done) batch<1, REVERSED>(tile, cursor, next(), load, use);
  } else {
#pragma unroll 1
    for (; end - done >= UNROLL; done += UNROLL) batch<UNROLL, REVERSED>(tile, cursor, next(), load, use);
    if constexpr (UNROLL > 2) {
      constexpr int HALF = (UNROLL + 1) / 2;
      if (end - done >= HALF) batch<HALF, REVERSED>(tile, cursor, next(), load, use), done += HALF;
    }
    if (done < end) batch<1, REVERSED>(tile, cursor, next(), load, use);
  }
}

// Sources of a sweep: shared memory, from which each thread reads what it copied itself, or global memory.
template <class V> struct Staged {
  V* slots;
  __device__ __forceinline__ V get(u32 i, i64) const { return slots[i * THREADS + threadIdx.x]; }
  __device__ __forceinline__ void copy(u32 i, const V* from) const { copy_async(slots + i * THREADS + threadIdx.x, from); }
};

template <class V> struct Streamed {
  const V* tensor;
  __device__ __forceinline__ V get(u32, i64 offset) const { return tensor[offset]; }
};

template <class V> struct StreamedOnce {
  const V* tensor;
  __device__ __forceinline__ V get(u32, i64 offset) const { return load_once(tensor + offset); }
};

// Copy a thread's vectors in four parts, so that work on the first part can start early.
template <class L, class Copy> DEVICE void copy_in_quarters(const Tile<L>& tile, Copy copy) {
  const u32 quarter = (tile.count + 3) / 4;
  for (u32 part = 0; part < 4; ++part) {
    const u32 end = (part + 1) * quarter;
    each<1, false>(
        tile, part * quarter, end < tile.count ? end : tile.count,
        [&](u32 i, const Cursor& at) { return copy(i, at.offset), 0; }, [](int, i64) {});
    commit_copies();
  }
}

// Call use(begin, end) for each of the four parts, as soon as it has arrived.
template <class L, class Use> DEVICE void as_quarters_arrive(const Tile<L>& tile, Use use) {
  const u32 quarter = (tile.count + 3) / 4;
#pragma unroll 1
  for (u32 part = 0; part < 4; ++part) {
    if (part == 0) wait_copies<3>();
    else if (part == 1) wait_copies<2>();
    else if (part == 2) wait_copies<1>();
    else wait_copies<0>();
    const u32 end = (part + 1) * quarter;
    use(part * quarter, end < tile.count ? end : tile.count);
  }
}
