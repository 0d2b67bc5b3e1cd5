// llama.cpp's readers of chat answers (common/chat.h), called from C.
//
// A library of its own that needs no model, so a process without one can look at a template. Requests and answers are
// UTF-8 JSON. Nothing is thrown and nothing is written to standard error: an error is {"error": "..."}. Returned texts
// belong to the caller, who frees them with swift_chat_free.

#pragma once

#include <stdbool.h>
#include <stddef.h>

#if defined(_WIN32)
#    define SWIFT_CHAT_API __declspec(dllexport)
#else
#    define SWIFT_CHAT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define SWIFT_CHAT_ABI 1

typedef struct swift_chat_reader swift_chat_reader;

SWIFT_CHAT_API int swift_chat_abi(void);

// Finds out in which format a template has answers written, by common_chat_templates_apply, which renders the template
// many times.
//
// request: {"template", "bos_token", "eos_token": texts; "messages", "tools": OpenAI's; "tool_choice": "auto" (the default),
// "required" or "none"; "parallel_tool_calls", "enable_thinking": booleans, both true by default; "variables": an object of
// further variables of the template}.
// answer: {"format", "parser", "generation_prompt": texts, for swift_chat_reader_new; "thinking_start": text, "thinking_ends",
// "stops", "preserved_tokens": lists of texts}
SWIFT_CHAT_API char * swift_chat_analyse(const char * request, size_t length);

// Makes a reader of answers. syntax: the answer of swift_chat_analyse. If it is not one: NULL, and *error in one line.
SWIFT_CHAT_API swift_chat_reader * swift_chat_reader_new(const char * syntax, size_t length, char ** error);
SWIFT_CHAT_API void                swift_chat_reader_free(swift_chat_reader * reader);

// Parses an answer to {"content", "reasoning_content": texts; "tool_calls": [{"id", "name", "arguments": texts}]}. A
// partial answer gives what can be told so far; its last call may lack its end. Several threads may use one reader.
SWIFT_CHAT_API char * swift_chat_read(const swift_chat_reader * reader, const char * text, size_t length, bool is_partial);

SWIFT_CHAT_API void swift_chat_free(char * text);

#ifdef __cplusplus
}
#endif
