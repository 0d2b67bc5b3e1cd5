#include "swift-chat.h"

#include "chat.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <vector>

namespace {

// The limit to nested brackets in what a model writes: JSON is parsed and written by recursion.
constexpr int MAX_NESTING = 200;

char * copy_of(const std::string & text) {
    char * copy = static_cast<char *>(std::malloc(text.size() + 1));
    if (copy != nullptr) {
        std::memcpy(copy, text.c_str(), text.size() + 1);
    }
    return copy;
}

std::string told(const char * what) {
    try {
        return common_json({
                                   { "error", what }
        })
                .dump();
    } catch (...) { // it is no UTF-8
        return R"({"error": "llama.cpp's reader of answers failed"})";
    }
}

// The JSON that `work` returns, or {"error"} with what it throws.
template <typename Work>
char * answer_of(Work && work) {
    try {
        return copy_of(work().dump());
    } catch (const std::exception & error) {
        return copy_of(told(error.what()));
    } catch (...) {
        return copy_of(told("an unknown error"));
    }
}

bool is_nested_too_deep(const std::string & text) {
    int depth = 0;
    for (const char c : text) {
        if (c == '[' || c == '{' || c == '(') {
            if (++depth > MAX_NESTING) {
                return true;
            }
        } else if (c == ']' || c == '}' || c == ')') {
            depth = std::max(0, depth - 1);
        }
    }
    return false;
}

common_chat_templates_inputs inputs_of(const common_json & request) {
    common_chat_templates_inputs inputs;
    inputs.messages            = common_chat_msgs_parse_oaicompat(request.at("messages"));
    inputs.tool_choice         = common_chat_tool_choice_parse_oaicompat(request.value("tool_choice", std::string("auto")));
    inputs.parallel_tool_calls = request.value("parallel_tool_calls", true);
    inputs.enable_thinking     = request.value("enable_thinking", true);
    inputs.reasoning_format    = COMMON_REASONING_FORMAT_AUTO;
    if (request.contains("tools")) {
        inputs.tools = common_chat_tools_parse_oaicompat(request.at("tools"));
    }
    if (request.contains("variables")) {
        for (const auto & [name, value] : request.at("variables").items()) {
            inputs.chat_template_kwargs[name] = value.dump();
        }
    }
    return inputs;
}

common_json analysis_of(const common_json & request) {
    const std::string source    = request.at("template");
    const auto        templates = common_chat_templates_init(
            nullptr, source, request.value("bos_token", std::string()), request.value("eos_token", std::string()));
    const common_chat_params params = common_chat_templates_apply(templates.get(), inputs_of(request));
    return {
        { "format",            int(params.format)        },
        { "parser",            params.parser             },
        { "generation_prompt", params.generation_prompt  },
        { "thinking_start",    params.thinking_start_tag },
        { "thinking_ends",     params.thinking_end_tags  },
        { "stops",             params.additional_stops   },
        { "preserved_tokens",  params.preserved_tokens   },
    };
}

common_json json_of(const common_chat_msg & message) {
    common_json calls = common_json::array();
    for (const auto & call : message.tool_calls) {
        calls.push_back(common_json({
                { "id",        call.id        },
                { "name",      call.name      },
                { "arguments", call.arguments },
        }));
    }
    return {
        { "content",           message.render_content()  },
        { "reasoning_content", message.reasoning_content },
        { "tool_calls",        calls                     },
    };
}

} // namespace

struct swift_chat_reader {
    common_chat_parser_params params;
};

extern "C" {

int swift_chat_abi(void) { return SWIFT_CHAT_ABI; }

char * swift_chat_analyse(const char * request, size_t length) {
    return answer_of([&] { return analysis_of(common_json::parse(std::string(request, length))); });
}

swift_chat_reader * swift_chat_reader_new(const char * syntax, size_t length, char ** error) {
    try {
        const common_json given  = common_json::parse(std::string(syntax, length));
        const int         format = given.at("format").get<int>();
        if (format < 0 || format >= COMMON_CHAT_FORMAT_COUNT) {
            throw std::invalid_argument("there is no such format");
        }
        auto reader                      = std::make_unique<swift_chat_reader>();
        reader->params.format            = common_chat_format(format);
        reader->params.reasoning_format  = COMMON_REASONING_FORMAT_AUTO;
        reader->params.generation_prompt = given.value("generation_prompt", std::string());
        const std::string parser         = given.at("parser");
        if (!parser.empty()) {
            reader->params.parser.load(parser);
        }
        return reader.release();
    } catch (const std::exception & failure) {
        *error = copy_of(failure.what());
    } catch (...) {
        *error = copy_of("an unknown error");
    }
    return nullptr;
}

void swift_chat_reader_free(swift_chat_reader * reader) { delete reader; }

char * swift_chat_read(const swift_chat_reader * reader, const char * text, size_t length, bool is_partial) {
    return answer_of([&] {
        const std::string given(text, length);
        if (is_nested_too_deep(given)) {
            throw std::invalid_argument("the answer is nested too deep");
        }
        return json_of(common_chat_parse(given, is_partial, reader->params));
    });
}

void swift_chat_free(char * text) { std::free(text); }

} // extern "C"
