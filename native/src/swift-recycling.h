// Drafts the target's likeliest tokens from the last time that it saw the same token or pair of tokens.
// The same table as swift_gguf/drafting/recycling.py, which cites it.

#pragma once

#include "swift-offer.h"

#include <cstddef>
#include <list>
#include <unordered_map>
#include <vector>

// Holds at most MAX_ROWS rows; the least recently learned are dropped.
class swift_recycling {
public:
    static constexpr size_t  MAX_ROWS = 4096;
    static constexpr int32_t N_OFFERS = 4;
    static constexpr int32_t NONE     = -1; // in place of the first token of a pair: the row of a single token

    struct row {
        int32_t              previous, token;
        std::vector<int32_t> successors; // likeliest first
        std::vector<double>  probabilities;
    };

    // `end`: the last tokens of the text and the path; two of them count
    void offers(const std::vector<int32_t> & end, std::vector<swift_offer> & found) const;

    // the target's successors of `token`, which follows `previous` (NONE: nothing)
    void learn(int32_t previous, int32_t token, const int32_t * successors, const float * probabilities, int32_t n);

    void put(row added);

    const std::list<row> & rows() const { return by_age; } // the latest learned last

private:
    const row * find(int32_t previous, int32_t token) const;

    std::list<row>                                         by_age;
    std::unordered_map<uint64_t, std::list<row>::iterator> by_context;
};
