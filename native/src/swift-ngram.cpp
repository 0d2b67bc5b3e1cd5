#include "swift-ngram.h"

#include <algorithm>

static const size_t  FEW       = 8; // edges that are searched one by one
static const int32_t REFRESHED = 8; // states in which a token that follows again becomes the latest

int32_t swift_suffixes::edges::find(int32_t token) const {
    if (many) {
        const auto found = many->find(token);
        return found == many->end() ? -1 : found->second;
    }
    for (const auto & edge : few) {
        if (edge.first == token) {
            return edge.second;
        }
    }
    return -1;
}

void swift_suffixes::edges::set(int32_t token, int32_t to) {
    if (many) {
        (*many)[token] = to;
        return;
    }
    for (auto & edge : few) {
        if (edge.first == token) {
            edge.second = to;
            return;
        }
    }
    few.emplace_back(token, to);
    if (few.size() > FEW) {
        many = std::make_shared<std::unordered_map<int32_t, int32_t>>(few.begin(), few.end());
        few.clear();
    }
}

// A token that comes back after it fell out of the list enters it anew, so a list this short loses nothing.
void swift_suffixes::make_latest(state & at, int32_t token) {
    auto place = std::find(at.latest.begin(), at.latest.end() - 1, token);
    std::move_backward(at.latest.begin(), place, place + 1);
    at.latest[0] = token;
}

int32_t swift_suffixes::add(const state & like, int32_t length) {
    states.push_back(like);
    state & added = states.back();
    if (added.next.many) { // the copy grows on its own
        added.next.many = std::make_shared<std::unordered_map<int32_t, int32_t>>(*added.next.many);
    }
    added.link   = -1;
    added.length = length;
    return (int32_t) states.size() - 1;
}

swift_suffixes::match swift_suffixes::repeated_end() const {
    const int32_t link = states[whole].link;
    return link < 0 ? match {} : match { link, states[link].length };
}

void swift_suffixes::append(int32_t token) {
    const int32_t added = add({}, states[whole].length + 1);
    int32_t       at    = whole;
    while (at >= 0 && states[at].next.find(token) < 0) {
        states[at].next.set(token, added);
        make_latest(states[at], token);
        at = states[at].link;
    }
    if (at < 0) {
        states[added].link = 0;
    } else {
        int32_t refreshed = at;
        for (int32_t i = 0; i < REFRESHED && refreshed >= 0; ++i) {
            make_latest(states[refreshed], token);
            refreshed = states[refreshed].link;
        }
        states[added].link = longest(at, token);
    }
    whole = added;
}

// The state whose longest substring is the longest substring of `at` and `token`. If there is none, it is split off
// from the state that has longer substrings, too.
int32_t swift_suffixes::longest(int32_t at, int32_t token) {
    const int32_t longer = states[at].next.find(token);
    const int32_t length = states[at].length + 1;
    if (states[longer].length == length) {
        return longer;
    }
    const state   like  = states[longer];
    const int32_t split = add(like, length);
    states[split].link  = like.link;
    states[longer].link = split;
    while (at >= 0 && states[at].next.find(token) == longer) {
        states[at].next.set(token, split);
        at = states[at].link;
    }
    return split;
}

swift_suffixes::match swift_suffixes::step(match from, int32_t token) const {
    int32_t next = states[from.state].next.find(token);
    while (next < 0) {
        if (from.state == 0) {
            return {};
        }
        from.state  = states[from.state].link;
        from.length = states[from.state].length;
        next        = states[from.state].next.find(token);
    }
    // a match must have a continuation in the text, so the end of the text alone does not count
    return states[next].latest[0] >= 0 ? match { next, from.length + 1 } : repeated_end();
}

void swift_ngram::follow(const int32_t * tokens, size_t n_tokens) {
    if (n_tokens < text.size() || !std::equal(text.begin(), text.end(), tokens)) {
        text.clear();
        index = swift_suffixes();
    }
    for (size_t i = text.size(); i < n_tokens; ++i) {
        index.append(tokens[i]);
        text.push_back(tokens[i]);
    }
}

void swift_ngram::offers(const std::vector<int32_t> & path, std::vector<swift_offer> & found) const {
    swift_suffixes::match match = index.repeated_end();
    for (const int32_t token : path) {
        match = index.step(match, token);
    }
    if (match.length < 1) {
        return;
    }
    const double length     = match.length;
    double       confidence = length / (length + 1), left = 1 / (length + 1);
    for (const int32_t token : index.latest(match.state)) {
        if (token < 0) {
            break;
        }
        found.push_back({ token, confidence, SWIFT_SOURCE_NGRAM });
        confidence = left = left / 2;
    }
}
