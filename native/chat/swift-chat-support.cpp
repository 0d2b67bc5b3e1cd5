// The few functions that llama.cpp's readers of answers call from the rest of `common`, from libllama and from ggml.
//
// The original files (common.cpp, log.cpp) would need downloads, threads and a model. Here there is no model and no
// vocabulary: functions that ask for one return nothing.

#include "common.h"
#include "log.h"

#include <cstdarg>
#include <cstdio>
#include <stdexcept>

// -- log.h: nothing is logged, since failures are thrown as well.

int common_log_get_verbosity_thold(void) { return -1; }

common_log * common_log_main() { return nullptr; }

void common_log_add(common_log *, ggml_log_level, const char *, ...) {}

// -- common.h

std::string string_join(const std::vector<std::string> & values, const std::string & separator) {
    std::string joined;
    for (size_t i = 0; i < values.size(); ++i) {
        joined += i == 0 ? values[i] : separator + values[i];
    }
    return joined;
}

std::vector<std::string> string_split(const std::string & str, const std::string & delimiter) {
    std::vector<std::string> parts;
    size_t                   begin = 0;
    if (!delimiter.empty()) {
        for (size_t end; (end = str.find(delimiter, begin)) != std::string::npos; begin = end + delimiter.size()) {
            parts.push_back(str.substr(begin, end - begin));
        }
    }
    parts.push_back(str.substr(begin));
    return parts;
}

std::string string_repeat(const std::string & str, size_t n) {
    std::string repeated;
    while (n-- > 0) {
        repeated += str;
    }
    return repeated;
}

void string_replace_all(std::string & s, const std::string & search, const std::string & replace) {
    if (search.empty()) {
        return;
    }
    for (size_t at = 0; (at = s.find(search, at)) != std::string::npos; at += replace.size()) {
        s.replace(at, search.size(), replace);
    }
}

llama_tokens common_tokenize(const llama_vocab *, const std::string &, bool, bool) { return {}; }

std::string common_token_to_piece(const llama_vocab *, llama_token, bool) { return ""; }

// -- llama.h and ggml.h

extern "C" {

const llama_vocab * llama_model_get_vocab(const llama_model *) { return nullptr; }
const char *        llama_model_chat_template(const llama_model *, const char *) { return nullptr; }
llama_token         llama_vocab_bos(const llama_vocab *) { return LLAMA_TOKEN_NULL; }
llama_token         llama_vocab_eos(const llama_vocab *) { return LLAMA_TOKEN_NULL; }
bool                llama_vocab_get_add_bos(const llama_vocab *) { return false; }
bool                llama_vocab_get_add_eos(const llama_vocab *) { return false; }

int32_t llama_chat_apply_template(const char *, const llama_chat_message *, size_t, bool, char *, int32_t) { return -1; }

// A failed assertion would end the process. Here it is an error like any other.
void ggml_abort(const char *, int, const char * fmt, ...) {
    char    what[256];
    va_list values;
    va_start(values, fmt);
    std::vsnprintf(what, sizeof(what), fmt, values);
    va_end(values);
    throw std::runtime_error(what);
}

} // extern "C"
