#include "swift-recycling.h"

static uint64_t key_of(int32_t previous, int32_t token) {
    return (uint64_t) (uint32_t) previous << 32 | (uint32_t) token;
}

const swift_recycling::row * swift_recycling::find(int32_t previous, int32_t token) const {
    const auto found = by_context.find(key_of(previous, token));
    return found == by_context.end() ? nullptr : &*found->second;
}

void swift_recycling::offers(const std::vector<int32_t> & end, std::vector<swift_offer> & found) const {
    if (end.empty()) {
        return;
    }
    const int32_t token = end.back();
    const row *   known = end.size() > 1 ? find(end[end.size() - 2], token) : nullptr;
    double        share = 1.0;
    if (known == nullptr) {
        known = find(NONE, token);
        share = 0.5; // one token is a weaker context
    }
    for (size_t i = 0; known != nullptr && i < known->successors.size(); ++i) {
        found.push_back({ known->successors[i], known->probabilities[i] * share, SWIFT_SOURCE_RECYCLING });
    }
}

void swift_recycling::learn(int32_t previous, int32_t token, const int32_t * successors, const float * probabilities, int32_t n) {
    row added = { NONE, token, {}, {} };
    for (int32_t i = 0; i < n && i < N_OFFERS; ++i) {
        added.successors.push_back(successors[i]);
        added.probabilities.push_back(probabilities[i]);
    }
    if (added.successors.empty()) {
        return;
    }
    put(added);
    if (previous != NONE) {
        added.previous = previous;
        put(std::move(added));
    }
}

void swift_recycling::put(row added) {
    const uint64_t key   = key_of(added.previous, added.token);
    const auto     known = by_context.find(key);
    if (known != by_context.end()) {
        by_age.erase(known->second);
    }
    by_age.push_back(std::move(added));
    by_context[key] = std::prev(by_age.end());
    if (by_age.size() > MAX_ROWS) {
        by_context.erase(key_of(by_age.front().previous, by_age.front().token));
        by_age.pop_front();
    }
}
