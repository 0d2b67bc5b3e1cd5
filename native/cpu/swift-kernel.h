// What the kernels share. A kernel has
//
//   n_tiled(n)                             how many of n columns are multiplied by tiles of AMX
//   prepare(params, src1, n_tiled)         whatever is done to the columns once, by all threads together
//   gather(params, src1, which, n, n_tiled)  some of the columns, or all, as multiply() wants them
//   ROWS                                   how many rows make a group
//   multiply(w, begin, end, y, n, out)     groups of rows with n columns

#pragma once

#include "swift-lanes.h"

#include "ggml.h"

#include <algorithm>
#include <vector>

namespace {

constexpr size_t BYTES_AT_ONCE = 512 * 1024; // of rows for some columns: what stays in the second cache

struct matrix {
    const char * data;
    int64_t      n_rows;
    size_t       stride; // bytes from row to row

    // Nothing is read beyond the last row: what is missing is zeros.
    rows rows_from(int64_t first, int n) const {
        const char *  begin  = data + first * stride;
        const int64_t n_left = n_rows - first;
        if (n_left >= n) {
            return { begin, stride, nullptr };
        }
        static thread_local std::vector<char> copy;
        copy.assign(n * stride, 0);
        std::copy_n(begin, n_left * stride, copy.data());
        return { copy.data(), stride, nullptr };
    }
};

// Column c of a tensor: [..., ne[1], ne[2]]
inline const float * column_of(const ggml_tensor * src1, int64_t c) {
    return (const float *) ((const char *) src1->data + c % src1->ne[1] * src1->nb[1] + c / src1->ne[1] * src1->nb[2]);
}

} // namespace
