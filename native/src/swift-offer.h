// A token that a source proposes after a path of draft tokens.

#pragma once

#include <cstdint>

enum swift_source {
    SWIFT_SOURCE_NGRAM,
    SWIFT_SOURCE_RECYCLING,
    SWIFT_SOURCE_LAYER_SKIP,
    SWIFT_SOURCE_COUNT,
};

struct swift_offer {
    int32_t      token       = -1;
    double       probability = 0.0; // the source's own
    swift_source source      = SWIFT_SOURCE_NGRAM;
};
