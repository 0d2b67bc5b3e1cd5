// The kernel for F32, F16 and BF16: rows become floats, lanes are weights, and each row and column have one vector of
// sums, whatever the number of columns. Columns stay as they are.

#pragma once

#include "swift-kernel.h"

#include "ggml-impl.h"
#include "simd-mappings.h"

namespace {

template <typename weight>
struct floats {
    using columns = const float * const *;

    // sums of a tile stay in registers
    static constexpr int ROWS    = 4;
    static constexpr int COLUMNS = LANES == 16 ? 6 : 2;

    static int  n_tiled(int64_t) { return 0; }
    static void prepare(const ggml_compute_params *, const ggml_tensor *, int) {}

    static columns gather(const ggml_compute_params *, const ggml_tensor * src1, const int64_t * which, int n_columns, int) {
        static thread_local std::vector<const float *> all;
        all.resize(n_columns);
        for (int c = 0; c < n_columns; c++) {
            all[c] = column_of(src1, which ? which[c] : c);
        }
        return all.data();
    }

    static void multiply(const matrix & w, int64_t begin, int64_t end, columns y, int n_columns, float * const * out) {
        static thread_local std::vector<float> unpacked;
        const int64_t                          n = (int64_t) (w.stride / sizeof(weight));
        unpacked.resize(ROWS * n);
        for (int64_t i = begin; i < end; i++) {
            const int     n_rows = (int) std::min<int64_t>(ROWS, w.n_rows - i * ROWS);
            const float * x[ROWS];
            for (int r = 0; r < ROWS; r++) {
                const auto * row = (const weight *) (w.data + (i * ROWS + std::min(r, n_rows - 1)) * w.stride);
                prefetch((const char *) (row + ROWS * n), w.stride);
                x[r] = to_floats(row, n, unpacked.data() + r * n);
            }
            for (int c = 0; c < n_columns; c += COLUMNS) {
                multiply_up_to<COLUMNS>(x, n, y + c, n_columns - c, out + c, i * ROWS, n_rows);
            }
        }
    }

private:
    static const float * to_floats(const float * row, int64_t, float *) { return row; }

    template <typename half>
    static const float * to_floats(const half * row, int64_t n, float * to) {
        int64_t k = 0;
        for (; k + LANES <= n; k += LANES) {
            store(to + k, load_halves(row + k));
        }
        for (; k < n; k++) {
            to[k] = to_float(row[k]);
        }
        return to;
    }

    static float to_float(ggml_fp16_t x) { return GGML_CPU_FP16_TO_FP32(x); }
    static float to_float(ggml_bf16_t x) { return GGML_BF16_TO_FP32(x); }

    template <int N>
    static void multiply_up_to(
            const float * const (&x)[ROWS], int64_t n, columns y, int n_columns, float * const * out, int64_t first, int n_rows) {
        if (n_columns >= N) {
            reals      sums[N][ROWS] = {};
            int64_t    k             = 0;
            const auto add_products  = [&](const auto & loaded) {
                reals some[ROWS];
                for (int r = 0; r < ROWS; r++) {
                    some[r] = loaded(x[r] + k);
                }
                for (int c = 0; c < N; c++) {
                    const reals column = loaded(y[c] + k);
                    for (int r = 0; r < ROWS; r++) {
                        sums[c][r] = multiply_add(some[r], column, sums[c][r]);
                    }
                }
            };
            for (; k + LANES <= n; k += LANES) {
                add_products([](const float * from) { return load(from); });
            }
            if (k < n) { // zeros in the lanes that are left
                add_products([&](const float * from) { return load(from, (int) (n - k)); });
            }
            for (int c = 0; c < N; c++) {
                for (int r = 0; r < n_rows; r++) {
                    out[c][first + r] = sum_of(sums[c][r]);
                }
            }
        } else if constexpr (N > 1) {
            multiply_up_to<N - 1>(x, n, y, n_columns, out, first, n_rows);
        }
    }
};

} // namespace
