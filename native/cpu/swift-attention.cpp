// Attention over the KV cache whose bits depend neither on the other tokens of a batch nor on where cells lie.
//
// For one query, a head of a token:
//
//   score[cell]  = mask[cell] + sum over the head's dimensions, in their order, of scale * query * key
//   weight[cell] = exp(score[cell] - the largest score)
//   result       = sum over the cells, in their order, of weight * value
//                  / sum over the cells, in their order, of weight
//
// Every sum is a chain of fma in 32 bits. Nothing is summed in parts that are joined later, and a cell that is
// masked is left out, so neither gaps between cells nor the cut of a prompt into batches can be seen in a result.
// llama.cpp's own kernels rescale partial sums of tiles of cells (FlashAttention), whose borders move.
//
// Queries that read the same keys are computed together, in tiles: the heads of a group, and some tokens. A block of
// cells is converted to floats once for all of them: keys transposed, with a lane for each cell; values as they
// lie, with a lane for each dimension. Then both sums are the same product of small matrices.

#include "swift-attention.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#    define SWIFT_AVX2
#endif

#ifdef SWIFT_AVX2

#    include "simd-mappings.h"
#    include "swift-lanes.h"
#    include "vec.h"

namespace {

constexpr int     BLOCK      = 32;          // cells that are converted at once
constexpr int     QUERIES    = 48;          // of a tile of a prompt, unless a group has more
constexpr int64_t MAX_SCORES = 1024 * 1024; // of a tile, in bytes: what the second cache holds beside the rest
constexpr int64_t PAD        = 16;          // floats after a row of scores: its sink, and rows would share lines of the cache

constexpr ggml_fp16_t MASKED = 0xFC00; // -infinity

// -- the product of small matrices --------------------------------------------------------------------

constexpr int COLUMNS = 2 * LANES;
#    ifdef SWIFT_AVX512
constexpr int ROWS = 12; // all sums stay in registers
#    else
constexpr int ROWS = 6;
#    endif

struct matrix {
    float * data;
    int64_t stride;

    float * row(int64_t i) const { return data + i * stride; }
    matrix  at(int64_t i, int64_t k) const { return { data + i * stride + k, stride }; }
};

// sums[N][COLUMNS] += a[N][n] * b[n][COLUMNS], in the order of n
template <int N>
void add_product(matrix a, matrix b, int n, matrix sums) {
    reals each[N][2];
    for (int i = 0; i < N; i++) {
        each[i][0] = load(sums.row(i));
        each[i][1] = load(sums.row(i) + LANES);
    }
    for (int k = 0; k < n; k++) {
        const reals left = load(b.row(k)), right = load(b.row(k) + LANES);
        for (int i = 0; i < N; i++) {
            const reals factor = everywhere(a.row(i)[k]);
            each[i][0]         = multiply_add(factor, left, each[i][0]);
            each[i][1]         = multiply_add(factor, right, each[i][1]);
        }
    }
    for (int i = 0; i < N; i++) {
        store(sums.row(i), each[i][0]);
        store(sums.row(i) + LANES, each[i][1]);
    }
}

// add_product for the rows left, of which it does N at most
template <int N>
void add_up_to(matrix a, matrix b, int n, matrix sums, int n_rows) {
    if (n_rows >= N) {
        add_product<N>(a, b, n, sums);
    } else if constexpr (N > 1) {
        add_up_to<N - 1>(a, b, n, sums, n_rows);
    }
}

// sums[n_rows][n_columns] += a[n_rows][n] * b[n][n_columns]; n_columns: a multiple of COLUMNS
void add_products(matrix a, matrix b, int n, matrix sums, int n_rows, int n_columns) {
    for (int c = 0; c < n_columns; c += COLUMNS) {
        for (int i = 0; i < n_rows; i += ROWS) {
            add_up_to<ROWS>(a.at(i, 0), b.at(0, c), n, sums.at(i, c), n_rows - i);
        }
    }
}

// -- what is computed ---------------------------------------------------------------------------------

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct shape {
    int64_t n_tokens, n_cells;
    int64_t n_groups, n_heads; // heads of queries that share keys and values, of each group
    int64_t n_sequences;
    int64_t key, value; // dimensions of a head
    int64_t value_room; // of whole vectors

    explicit shape(const ggml_tensor * dst) :
        n_tokens(dst->src[0]->ne[1]),
        n_cells(dst->src[1]->ne[1]),
        n_groups(dst->src[1]->ne[2]),
        n_heads(dst->src[0]->ne[2] / n_groups),
        n_sequences(dst->src[0]->ne[3]),
        key(dst->src[1]->ne[0]),
        value(dst->src[2]->ne[0]),
        value_room(round_up(value, 32)) {}

    int64_t n_blocks() const { return (n_cells + BLOCK - 1) / BLOCK; }
    int64_t score_stride() const { return n_blocks() * BLOCK + PAD; }

    // Tokens of a tile: few enough for a tile for each thread.
    int64_t tile_tokens(int n_threads) const {
        const int64_t most    = std::min<int64_t>(QUERIES, MAX_SCORES / (score_stride() * (int64_t) sizeof(float)));
        const int64_t n_tiles = std::max<int64_t>(1, n_threads / (n_groups * n_sequences));
        return std::clamp<int64_t>(most / n_heads, 1, std::max<int64_t>(1, n_tokens / n_tiles));
    }
    int64_t n_tiles(int n_threads) const {
        return (n_tokens + tile_tokens(n_threads) - 1) / tile_tokens(n_threads) * n_groups * n_sequences;
    }

    // Where a thread computes, in floats: of a tile's queries, of one block, and the scores of all cells
    int64_t queries_size(int64_t n) const { return n * (key + value_room + 1) + LANES; }
    int64_t block_size() const { return std::max(key, value_room) * BLOCK + BLOCK * std::max(key, value); }
    int64_t scores_size(int64_t n) const { return round_up(n, LANES) * score_stride(); }
    int64_t size(int n_threads) const {
        const int64_t n = tile_tokens(n_threads) * n_heads;
        return round_up(queries_size(n) + block_size() + scores_size(n) + n_blocks() / (int64_t) sizeof(float) + 1, 64);
    }
};

enum class block_kind : uint8_t {
    masked, // for all tokens: left out
    open,   // for all tokens
    mixed,
};

class tile {
public:
    // number: counts tokens, then groups, then sequences
    // own: work space of this thread; home: that of the thread which has the tile's scores
    tile(const ggml_tensor * dst, const shape & is, int64_t number, int n_threads, float * own, float * home) :
        dst(dst), is(is) {
        const int64_t each = is.tile_tokens(n_threads), n_of_tokens = (is.n_tokens + each - 1) / each;
        const int64_t room = each * is.n_heads;

        first_token = number % n_of_tokens * each;
        n_tokens    = std::min(each, is.n_tokens - first_token);
        group       = number / n_of_tokens % is.n_groups;
        sequence    = number / n_of_tokens / is.n_groups;
        n_queries   = (int) (n_tokens * is.n_heads);

        queries = { own, is.key };
        results = { queries.row(room), is.value_room };
        totals  = results.row(room);
        block   = own + is.queries_size(room);
        rows_   = block + std::max(is.key, is.value_room) * BLOCK;
        scores  = { home + is.queries_size(room) + is.block_size(), is.score_stride() };
        kinds   = (block_kind *) (own + is.queries_size(room) + is.block_size() + is.scores_size(room));
        find_kinds();
    }

    int number_of_queries() const { return n_queries; }

    void compute_scores(int64_t begin, int64_t end);  // of these blocks
    void compute_weights(int begin, int end);         // of these queries
    void compute_results(int64_t begin, int64_t end); // in these dimensions, of multiples of COLUMNS

    void prepare_queries();

private:
    const ggml_tensor * dst;
    const shape &       is;
    int64_t             first_token, n_tokens, group, sequence;
    int                 n_queries; // token by token, the heads of the group beside each other

    matrix       queries; // [query][dimension], scaled
    matrix       results; // [query][dimension]
    float *      totals;  // of each query: the sum of its weights
    float *      block;   // keys [dimension][BLOCK], or values [BLOCK][dimension]
    float *      rows_;   // keys or values of types other than F16, as floats [BLOCK][dimension]
    matrix       scores;  // [query][cell], then weights
    block_kind * kinds;   // of each block

    float parameter(int i) const { return ((const float *) dst->op_params)[i]; }
    int   head_of(int query) const { return (int) (group * is.n_heads + query % is.n_heads); }

    const ggml_fp16_t * mask_of(int64_t token) const {
        const ggml_tensor * mask = dst->src[3];
        return mask ? (const ggml_fp16_t *) ((const char *) mask->data + (first_token + token) * mask->nb[1] +
                                             sequence % mask->ne[3] * mask->nb[3])
                    : nullptr;
    }
    const char * cell(const ggml_tensor * x, int64_t i) const {
        return (const char *) x->data + i * x->nb[1] + group * x->nb[2] + sequence / (is.n_sequences / x->ne[3]) * x->nb[3];
    }
    int n_cells_of(int64_t b) const { return (int) std::min<int64_t>(BLOCK, is.n_cells - b * BLOCK); }

    void  find_kinds();
    float slope_of(int head) const;
    void  load_keys(int64_t b);
    void  load_values(int64_t b, int64_t begin, int64_t end);
    void  add_mask(int64_t b);
    void  add_up_weights();
    void  add_open_cells(int64_t b, int64_t begin, int64_t end);
};

void tile::find_kinds() {
    for (int64_t b = 0; b < is.n_blocks(); b++) {
        int64_t n_masked = 0;
        for (int64_t t = 0; t < n_tokens && mask_of(0); t++) {
            const ggml_fp16_t * mask = mask_of(t) + b * BLOCK;
            n_masked += std::count(mask, mask + n_cells_of(b), MASKED);
        }
        kinds[b] = n_masked == 0 ? block_kind::open : n_masked == n_tokens * n_cells_of(b) ? block_kind::masked
                                                                                           : block_kind::mixed;
    }
}

void tile::prepare_queries() {
    const ggml_tensor * q       = dst->src[0];
    const float         softcap = parameter(2);
    const float         scale   = softcap == 0.0f ? parameter(0) : parameter(0) / softcap;
    for (int i = 0; i < n_queries; i++) {
        const float * x = (const float *) ((const char *) q->data + (first_token + i / is.n_heads) * q->nb[1] +
                                           head_of(i) * q->nb[2] + sequence * q->nb[3]);
        std::transform(x, x + is.key, queries.row(i), [&](float each) { return each * scale; });
    }
}

// What the mask of a head is multiplied with: ALiBi, as ggml has it
float tile::slope_of(int head) const {
    const float max_bias = parameter(1);
    if (max_bias <= 0.0f) {
        return 1.0f;
    }
    const uint32_t n_log2 = 1u << (uint32_t) std::floor(std::log2(dst->src[0]->ne[2]));
    return (uint32_t) head < n_log2 ? std::pow(std::pow(2.0f, -max_bias / n_log2), (float) (head + 1)) : std::pow(std::pow(2.0f, -max_bias / 2.0f / n_log2), (float) (2 * (head - n_log2) + 1));
}

// N rows of floats, transposed
void transpose_floats(const rows & x, int64_t n, float * to) {
    for (int64_t d = 0; d < n; d += 4) {
        ints words[4];
        load_words(x, (int) (d * sizeof(float)), words);
        for (int i = 0; i < 4; i++) {
            store(to + (d + i) * BLOCK, as_reals(words[i]));
        }
    }
}

void transpose_halves(const rows & x, int64_t n, float * to) {
    for (int64_t d = 0; d < n; d += 8) {
        ints words[4];
        load_words(x, (int) (d * sizeof(ggml_fp16_t)), words);
        for (int i = 0; i < 4; i++) {
            store(to + (d + 2 * i) * BLOCK, low_halves(words[i]));
            store(to + (d + 2 * i + 1) * BLOCK, high_halves(words[i]));
        }
    }
}

void to_floats(ggml_type type, const void * x, float * to, int64_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(to, x, n * sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(x, to, n);
    }
}

void tile::load_keys(int64_t b) {
    const ggml_tensor * k = dst->src[1];
    const int           n = n_cells_of(b);
    if (k->type == GGML_TYPE_F16 && n == BLOCK) {
        const size_t size = is.key * sizeof(ggml_fp16_t);
        for (int i = 0; i < BLOCK && b + 1 < is.n_blocks(); i++) {
            prefetch(cell(k, b * BLOCK + i) + BLOCK * k->nb[1], size);
        }
        for (int i = 0; i < BLOCK; i += LANES) {
            transpose_halves({ cell(k, b * BLOCK + i), k->nb[1] }, is.key, block + i);
        }
        return;
    }
    for (int i = 0; i < n; i++) {
        to_floats(k->type, cell(k, b * BLOCK + i), rows_ + i * is.key, is.key);
    }
    std::fill(rows_ + n * is.key, rows_ + BLOCK * is.key, 0.0f);
    for (int i = 0; i < BLOCK; i += LANES) {
        transpose_floats({ (const char *) (rows_ + i * is.key), is.key * sizeof(float) }, is.key, block + i);
    }
}

void tile::compute_scores(int64_t begin, int64_t end) {
    const float softcap = parameter(2);
    for (int64_t b = begin; b < end; b++) {
        if (kinds[b] == block_kind::masked) {
            continue;
        }
        load_keys(b);
        const matrix here = scores.at(0, b * BLOCK);
        for (int i = 0; i < n_queries; i++) {
            std::fill_n(here.row(i), BLOCK, 0.0f);
        }
        add_products(queries, { block, BLOCK }, (int) is.key, here, n_queries, BLOCK);
        if (softcap != 0.0f) {
            for (int i = 0; i < n_queries; i++) {
                std::transform(here.row(i), here.row(i) + BLOCK, here.row(i), [&](float x) { return softcap * std::tanh(x); });
            }
        }
        add_mask(b);
    }
}

void tile::add_mask(int64_t b) {
    const int n = n_cells_of(b);
    for (int i = 0; i < n_queries; i++) {
        float * row = scores.at(i, b * BLOCK).data;
        if (const ggml_fp16_t * mask = mask_of(i / is.n_heads)) {
            const reals             slope       = everywhere(slope_of(head_of(i)));
            alignas(64) ggml_fp16_t some[BLOCK] = {};
            memcpy(some, mask + b * BLOCK, n * sizeof(ggml_fp16_t));
            for (int c = 0; c < BLOCK; c += LANES) {
                const reals values = load_halves(some + c);
                const reals sum    = add(load(row + c), multiply(slope, values));
                store(row + c, where_equal(values, everywhere(-INFINITY), values, sum)); // a masked cell may hold anything
            }
        }
        std::fill(row + n, row + BLOCK, -INFINITY);
    }
}

void tile::compute_weights(int begin, int end) {
    const ggml_tensor * sinks = dst->src[4];
    for (int i = begin; i < end; i++) {
        reals most = everywhere(-INFINITY);
        for (int64_t b = 0; b < is.n_blocks(); b++) {
            for (int c = 0; c < BLOCK && kinds[b] != block_kind::masked; c += LANES) {
                most = maximum(most, load(scores.at(i, b * BLOCK + c).data));
            }
        }
        const float sink    = sinks ? ((const float *) sinks->data)[head_of(i)] : -INFINITY;
        const float found   = std::max(largest_of(most), sink);
        const float largest = found == -INFINITY ? 0.0f : found; // no cell: all weights are 0
        for (int64_t b = 0; b < is.n_blocks(); b++) {
            float * row = scores.at(i, b * BLOCK).data;
            for (int c = 0; c < BLOCK && kinds[b] != block_kind::masked; c += LANES) {
                store(row + c, ggml_v_expf(subtract(load(row + c), everywhere(largest))));
            }
        }
        *scores.at(i, is.n_blocks() * BLOCK).data = sinks ? std::exp(sink - largest) : 0.0f;
    }
}

void tile::add_up_weights() {
    for (int i = 0; i < n_queries; i += LANES) { // a lane for each query
        reals total = everywhere(0.0f);
        for (int64_t b = 0; b < is.n_blocks(); b++) {
            for (int c = 0; c < BLOCK && kinds[b] != block_kind::masked; c += 4) {
                ints words[4];
                load_words({ (const char *) scores.at(i, b * BLOCK + c).data, scores.stride * sizeof(float) }, 0, words);
                for (const ints & each : words) {
                    total = add(total, as_reals(each));
                }
            }
        }
        store(totals + i, total);
    }
    for (int i = 0; i < n_queries; i++) {
        totals[i] += *scores.at(i, is.n_blocks() * BLOCK).data; // the sink's
    }
}

void tile::load_values(int64_t b, int64_t begin, int64_t end) {
    const ggml_tensor * v = dst->src[2];
    for (int i = 0; i < n_cells_of(b); i++) {
        const char * x  = cell(v, b * BLOCK + i);
        float *      to = block + i * is.value_room;
        if (v->type == GGML_TYPE_F16) {
            if (b + 1 < is.n_blocks()) {
                prefetch(x + BLOCK * v->nb[1] + begin * sizeof(ggml_fp16_t), (end - begin) * sizeof(ggml_fp16_t));
            }
            for (int64_t d = begin; d < std::min(end, is.value); d += LANES) {
                store(to + d, load_halves((const ggml_fp16_t *) x + d));
            }
        } else { // whole rows: blocks of quantised types cannot be cut everywhere
            to_floats(v->type, x, to, is.value);
        }
    }
}

void tile::compute_results(int64_t begin, int64_t end) {
    add_up_weights();
    for (int i = 0; i < n_queries; i++) {
        std::fill(results.row(i) + begin, results.row(i) + end, 0.0f);
    }
    for (int64_t b = 0; b < is.n_blocks(); b++) {
        if (kinds[b] == block_kind::masked) {
            continue;
        }
        load_values(b, begin, end);
        if (kinds[b] == block_kind::open && n_cells_of(b) == BLOCK) {
            add_products(
                    scores.at(0, b * BLOCK), { block + begin, is.value_room }, BLOCK, results.at(0, begin), n_queries, (int) (end - begin));
        } else {
            add_open_cells(b, begin, end);
        }
    }
    const int64_t n = std::min(end, is.value) - begin;
    for (int i = 0; i < n_queries; i++) {
        const int64_t place  = sequence * dst->ne[2] * dst->ne[1] + head_of(i) + (first_token + i / is.n_heads) * dst->ne[1];
        float *       out    = (float *) ((char *) dst->data + place * dst->nb[1]) + begin;
        const float   factor = totals[i] == 0.0f ? 0.0f : 1.0f / totals[i]; // all cells may be masked
        std::transform(results.row(i) + begin, results.row(i) + begin + n, out, [&](float x) { return x * factor; });
    }
}

// For each token the cells that it may read, in runs. The others are not multiplied by 0: they may hold anything.
void tile::add_open_cells(int64_t b, int64_t begin, int64_t end) {
    const int n = n_cells_of(b);
    for (int64_t t = 0; t < n_tokens; t++) {
        const ggml_fp16_t * mask    = mask_of(t) ? mask_of(t) + b * BLOCK : nullptr;
        const auto          is_open = [&](int c) { return !mask || mask[c] != MASKED; };
        const int64_t       first   = t * is.n_heads;
        for (int c = 0; c < n; c++) {
            const int start = c;
            while (c < n && is_open(c)) {
                c++;
            }
            if (c > start) {
                add_products(
                        scores.at(first, b * BLOCK + start), { block + start * is.value_room + begin, is.value_room }, c - start,
                        results.at(first, begin), (int) is.n_heads, (int) (end - begin));
            }
        }
    }
}

// -- threads ------------------------------------------------------------------------------------------

// Each tile by one thread
void compute_apart(const ggml_compute_params * params, const ggml_tensor * dst, const shape & is, float * own) {
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    const int64_t n_tiles = is.n_tiles(params->nth);
    for (int64_t i = params->ith; i < n_tiles; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        tile some(dst, is, i, params->nth, own, own);
        some.prepare_queries();
        some.compute_scores(0, is.n_blocks());
        some.compute_weights(0, some.number_of_queries());
        some.compute_results(0, is.value_room);
    }
}

// All tiles by all threads: a token of a model with fewer groups of heads than there are threads
void compute_together(const ggml_compute_params * params, const ggml_tensor * dst, const shape & is, float * own) {
    const auto share = [&](int64_t n) { // of this thread
        return std::pair(n * params->ith / params->nth, n * (params->ith + 1) / params->nth);
    };
    const auto for_tiles = [&](auto && step) {
        for (int64_t i = 0; i < is.n_tiles(params->nth); i++) {
            tile some(dst, is, i, params->nth, own, (float *) params->wdata + i * is.size(params->nth));
            step(some);
        }
    };
    for_tiles([&](tile & some) {
        const auto [begin, end] = share(is.n_blocks());
        some.prepare_queries();
        some.compute_scores(begin, end);
    });
    ggml_barrier(params->threadpool);
    for_tiles([&](tile & some) {
        const auto [begin, end] = share(some.number_of_queries());
        some.compute_weights((int) begin, (int) end);
    });
    ggml_barrier(params->threadpool);
    for_tiles([&](tile & some) {
        const auto [begin, end] = share(is.value_room / COLUMNS);
        some.compute_results(begin * COLUMNS, end * COLUMNS);
    });
}

bool has_kernel(const ggml_tensor * dst) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3];
    const auto         to_float = [](ggml_type type) { return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float; };
    return q->type == GGML_TYPE_F32 && k->ne[0] % 8 == 0 && v->ne[0] % 16 == 0 && k->ne[2] == v->ne[2] && k->ne[3] == v->ne[3] &&
            to_float(k->type) && to_float(v->type) && (!mask || mask->ne[2] == 1) && q->ne[1] > 0;
}

} // namespace

bool swift_attention(const ggml_compute_params * params, ggml_tensor * dst) {
    if (!params->use_ref || !has_kernel(dst)) {
        return false;
    }
    const shape is(dst);
    float *     own = (float *) params->wdata + params->ith * is.size(params->nth);
    if (is.n_tiles(params->nth) < params->nth) {
        compute_together(params, dst, is, own);
    } else {
        compute_apart(params, dst, is, own);
    }
    return true;
}

bool swift_has_kernels(void) {
    return true;
}

size_t swift_attention_work_size(const ggml_tensor * dst, int n_threads) {
    return has_kernel(dst) ? shape(dst).size(n_threads) * n_threads * sizeof(float) : 0;
}

#else // SWIFT_AVX2

bool swift_attention(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

bool swift_has_kernels(void) {
    return false;
}

size_t swift_attention_work_size(const ggml_tensor *, int) {
    return 0;
}

#endif // SWIFT_AVX2
