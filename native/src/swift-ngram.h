// Drafts the tokens that followed an earlier occurrence of the end of the text, found by a suffix automaton.
// The same algorithm as swift_gguf/drafting/ngram.py, which cites it.

#pragma once

#include "swift-offer.h"

#include <array>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

// All substrings of a growing text, and the tokens that follow them. All substrings of a state end at the same places
// of the text. The link of a state leads to the state of the next shorter suffix that also ends at other places.
class swift_suffixes {
public:
    struct match {
        int32_t state  = 0;
        int32_t length = 0; // latest tokens that match
    };
    static constexpr int32_t N_LATEST = 3;

    swift_suffixes() { add({}, 0); }

    void append(int32_t token);

    // the longest end of the text that also occurs earlier
    match repeated_end() const;

    // the longest match that ends with `token`, given the longest match before it
    match step(match from, int32_t token) const;

    // tokens that follow a state, the latest first; -1 after the last one
    const std::array<int32_t, N_LATEST> & latest(int32_t state) const { return states[state].latest; }

private:
    struct edges {
        std::vector<std::pair<int32_t, int32_t>>              few;  // token, state
        std::shared_ptr<std::unordered_map<int32_t, int32_t>> many; // in place of few, where there are many

        int32_t find(int32_t token) const; // -1: none
        void    set(int32_t token, int32_t to);
    };
    struct state {
        edges                         next;
        std::array<int32_t, N_LATEST> latest = { -1, -1, -1 };
        int32_t                       link   = -1;
        int32_t                       length = 0; // of its longest substring
    };

    int32_t     add(const state & like, int32_t length);
    int32_t     longest(int32_t at, int32_t token);
    static void make_latest(state & at, int32_t token);

    std::vector<state> states;
    int32_t            whole = 0; // the state of the whole text
};

// The source "ngram": the first offer after a match of L tokens has a confidence of L / (L + 1), each further one half
// of the remaining confidence.
class swift_ngram {
public:
    // Sets the text that is continued. If it starts with the last one, only the new tokens are indexed.
    void follow(const int32_t * text, size_t n_text);

    // what followed the longest matching end of the text and `path`
    void offers(const std::vector<int32_t> & path, std::vector<swift_offer> & found) const;

private:
    std::vector<int32_t> text;
    swift_suffixes       index;
};
