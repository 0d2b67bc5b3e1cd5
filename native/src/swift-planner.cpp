#include "swift-planner.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

static const int32_t LATELY   = 64;   // cycles without a draft after which drafts count as off
static const double  ENOUGH   = 64.0; // judged tokens after which an acceptance rate is known within about .06
static const int32_t NEW_TEXT = 200;  // answers differ: between two, counts decay as by so many tokens

void swift_planner::set_layer_skip(drafting_pass pass, swift_subnetwork_ptr found) {
    run        = std::move(pass);
    subnetwork = std::move(found);
}

void swift_planner::begin(int32_t seq_id) {
    calibration.passed(NEW_TEXT);
    const bool is_known = subnetwork && calibration.evidence(SWIFT_SOURCE_LAYER_SKIP) >= ENOUGH;
    sequence & of       = sequences[seq_id];
    of.guard.begin(is_known && economy.pays(SWIFT_SOURCE_LAYER_SKIP, 1.0, 0.0, draft_pass_ms(), 0));
    of.is_open = false;
}

// Offers of lookups after the text and the chain, which cost no time.
std::vector<swift_offer> swift_planner::look_up(sequence & of) {
    std::vector<swift_offer> offers;
    of.ngram.offers(of.chain, offers);
    std::vector<int32_t> end = of.end;
    end.insert(end.end(), of.chain.begin(), of.chain.end());
    recycling.offers(end, offers);
    return offers;
}

// Offers after the chain, of lookups and of a pass if it saves time. The best one may become the next token.
void swift_planner::extend(request & of, size_t i, std::vector<candidate> & heap) {
    sequence &               at     = sequences[of.seq_id];
    std::vector<swift_offer> offers = look_up(at);

    const auto value = [&](const swift_offer & offer) { return economy.joint(1.0, offer); };
    if (subnetwork && !is_broken) {
        double covered = 0.0;
        for (const swift_offer & offer : offers) {
            covered = std::max(covered, value(offer));
        }
        const int32_t n = (int32_t) at.chain.size() + 1, n_missing = n - at.n_decoded;
        const double  ms     = n_missing * draft_pass_ms();
        const bool    within = economy.affordable(n, at.credit_ms - ms) == n;
        if (within && economy.pays(SWIFT_SOURCE_LAYER_SKIP, at.joint, covered, ms, n_nodes)) {
            at.credit_ms -= ms;
            at.expected_ms += ms;
            swift_offer   offer;
            const int32_t code = run(of.seq_id, at.chain, n_missing, offer);
            if (code == 0) {
                at.n_decoded += n_missing;
                offers.push_back(offer);
            }
            is_broken = code < 0;
        }
    }
    at.offered.push_back(offers);
    if (offers.empty()) {
        return;
    }
    const auto best = std::max_element(offers.begin(), offers.end(), [&](const auto & a, const auto & b) { return value(a) < value(b); });
    heap.push_back({ economy.joint(at.joint, *best), serial++, i, *best });
}

void swift_planner::grow(std::vector<request> & requests) {
    std::vector<candidate> heap; // as short as there are sequences
    for (size_t i = 0; i < requests.size(); ++i) {
        sequence & of = sequences[requests[i].seq_id];
        if (of.n_max > 0) {
            extend(requests[i], i, heap);
        } else {
            of.offered.push_back(look_up(of)); // to judge the offers all the same
        }
    }
    std::vector<size_t> order;
    std::vector<double> joints;
    while (!heap.empty()) {
        const auto      likeliest = std::max_element(heap.begin(), heap.end(), [](const candidate & a, const candidate & b) {
            return a.joint != b.joint ? a.joint < b.joint : a.serial > b.serial;
        });
        const candidate next      = *likeliest;
        heap.erase(likeliest);
        if (!economy.includes(next.joint)) {
            continue;
        }
        sequence & of = sequences[requests[next.i].seq_id];
        of.chain.push_back(next.offer.token);
        of.joint = next.joint;
        ++n_nodes;
        order.push_back(next.i);
        joints.push_back(next.joint);
        if ((int32_t) of.chain.size() < of.n_max && !is_eog(next.offer.token)) {
            extend(requests[next.i], next.i, heap);
        }
    }

    // first what each sequence may lose, then what all together gain
    std::vector<size_t> within, n_kept(requests.size(), 0);
    std::vector<double> worth_it;
    for (size_t k = 0; k < order.size(); ++k) {
        const sequence & of = sequences[requests[order[k]].seq_id];
        if ((int32_t) n_kept[order[k]] < economy.affordable((int32_t) of.chain.size(), of.credit_ms)) {
            ++n_kept[order[k]];
            within.push_back(order[k]);
            worth_it.push_back(joints[k]);
        }
    }
    within.resize(economy.best_cut(worth_it));
    n_nodes = (int32_t) within.size();
    for (size_t i = 0; i < requests.size(); ++i) {
        std::vector<int32_t> & chain = sequences[requests[i].seq_id].chain;
        chain.resize(std::count(within.begin(), within.end(), i));
        requests[i].draft = chain;
    }
}

void swift_planner::draft(std::vector<request> & requests, int32_t n_others) {
    end_cycle();
    n_rows        = (int32_t) requests.size() + n_others;
    n_nodes       = 0;
    took_draft_ms = took_pass_ms = 0.0;

    double n_past = 0;
    for (const request & of : requests) {
        n_past += (double) (of.n_text - 1) / requests.size();
    }
    here.look((int64_t) n_past);
    economy.look(n_rows, false);

    bool any = false;
    for (request & each : requests) {
        sequence & of = sequences[each.seq_id];
        of.ngram.follow(each.text, each.n_text);
        of.end.assign(each.text + each.n_text - std::min<size_t>(each.n_text, 2), each.text + each.n_text);
        of.chain.clear();
        of.offered.clear();
        of.n_text      = each.n_text;
        of.n_decoded   = 0;
        of.expected_ms = 0.0;
        of.joint       = 1.0;
        of.n_chosen    = -1;
        of.is_open     = true;
        of.credit_ms   = of.guard.credit() * economy.plain_ms();
        // the first passes of all tell what plain decoding takes
        of.n_max = here.is_known() ? economy.affordable(std::min(each.n_max, swift_economy::MAX_NODES), of.credit_ms) : 0;
        any      = any || of.n_max > 0;
        cycle.push_back(each.seq_id);
    }
    if (any) {
        economy.look(n_rows, true);
    }
    grow(requests);
}

void swift_planner::passed(double draft_ms, double pass_ms) {
    took_draft_ms = draft_ms;
    took_pass_ms  = pass_ms;
}

void swift_planner::accept(int32_t seq_id, const int32_t * tokens, int32_t n_tokens) {
    sequence & of = sequences[seq_id];
    if (!of.is_open) {
        return;
    }
    for (int32_t i = 0; i < n_tokens && i < (int32_t) of.offered.size(); ++i) {
        calibration.judge(of.offered[i], tokens[i]);
        if (i == (int32_t) of.chain.size() || tokens[i] != of.chain[i]) {
            break;
        }
    }
    calibration.passed(n_tokens);
    of.n_chosen = n_tokens;
    of.is_open  = false;
    if (std::all_of(cycle.begin(), cycle.end(), [&](int32_t id) { return !sequences[id].is_open; })) {
        end_cycle();
    }
}

// What the cycle yielded and took. Costs count as expected, not as measured: drafts do not cause hiccups.
void swift_planner::end_cycle() {
    if (cycle.empty()) {
        return;
    }
    double  n_past = 0, expected_ms = 0;
    int32_t n_chosen = 0;
    bool    is_whole = true;
    for (const int32_t id : cycle) {
        const sequence & of = sequences[id];
        is_whole            = is_whole && of.n_chosen >= 0;
        n_past += (double) (of.n_text + std::max(of.n_chosen, 1) - 1) / cycle.size();
        n_chosen += std::max(of.n_chosen, 0);
        expected_ms += of.expected_ms;
    }
    here.look((int64_t) n_past);
    here.observe(n_rows + n_nodes, took_pass_ms);

    if (expected_ms > 0) {
        pace.observe(took_draft_ms, expected_ms);
    } else {
        pace.rest();
    }
    const double plain_pass_ms = here.verify_ms(n_rows), pass_ms = here.verify_ms(n_rows + n_nodes);
    const double drafting_ms = std::min(took_draft_ms, expected_ms * std::exp(swift_pace::NOISE) + plain_pass_ms);
    if (is_whole) {
        economy.took(n_chosen + n_rows - (int32_t) cycle.size(), pass_ms + drafting_ms);
    }
    for (const int32_t id : cycle) {
        sequence &   of   = sequences[id];
        const double rows = n_nodes > 0 ? (double) of.chain.size() / n_nodes : 0.0;
        const double part = expected_ms > 0 ? of.expected_ms / expected_ms : 1.0 / cycle.size();
        const double ms   = plain_pass_ms / n_rows + rows * (pass_ms - plain_pass_ms) + part * drafting_ms;
        if (of.n_chosen >= 0) {
            of.guard.count(of.n_chosen, ms, economy.plain_ms(), !of.chain.empty() || of.expected_ms > 0);
        }
        of.is_open = false;
    }
    since_draft = n_nodes > 0 ? 0 : since_draft + 1;
    cycle.clear();
}

bool swift_planner::wants_rows(int32_t seq_id) {
    const sequence & of   = sequences[seq_id];
    double           best = -1.0;
    for (const swift_offer & offer : of.offered.empty() ? std::vector<swift_offer>() : of.offered[0]) {
        if (offer.source == SWIFT_SOURCE_RECYCLING) {
            best = std::max(best, economy.joint(1.0, offer));
        }
    }
    if (best >= 0) {
        worth += (std::max(0.0, best - economy.row_share()) - worth) / 32;
    }
    ++turn;
    // where the table gains nothing, it learns from every eighth cycle only
    return worth * economy.plain_ms() >= reading_ms || turn % 8 == 0;
}

std::string swift_planner::why() const {
    if (!here.is_known()) {
        return "no pass was timed yet";
    }
    if (since_draft < LATELY) {
        return subnetwork && !is_broken ? "n-grams, recycling, layer-skip: where they pay" : "n-grams, recycling: where they pay";
    }
    char text[160];
    std::snprintf(text, sizeof(text), "plain decoding is faster here: verifying a draft token costs %.0f%% of a forward pass, and no draft token is likely enough", 100 * economy.row_share());
    return text;
}
