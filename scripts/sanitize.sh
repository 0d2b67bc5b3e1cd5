#!/usr/bin/env bash
# Our native code under AddressSanitizer and UndefinedBehaviorSanitizer: the tests of the library on generated
# models, the C program with leak detection, and a fuzzer on the reader of sidecars.
#
#     scripts/sanitize.sh [SECONDS [TESTS ...]]      SECONDS of fuzzing: 30 unless told; 0: none. TESTS: of what our C++ does
#
# Needs .venv (make dev), cmake, and clang with its runtimes (Debian: apt install clang libclang-rt-dev). Builds into
# build/sanitize, some minutes the first time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seconds=${1:-30}
shift || true
build=$PWD/build/sanitize
python=$PWD/.venv/bin/python

for tool in clang clang++ cmake "$python"; do
    command -v "$tool" > /dev/null || { echo "sanitize: $tool is missing; see $0" >&2; exit 1; }
done
runtime=$(clang -print-file-name="libclang_rt.asan-$(uname -m).so")
[[ -e $runtime ]] || { echo "sanitize: clang has no shared runtime; Debian: apt install libclang-rt-dev" >&2; exit 1; }

mkdir -p "$build"
cmake -S . -B "$build" -DSWIFT_GGUF_SANITIZE=ON -DPython3_EXECUTABLE="$python" \
    -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ > "$build.log"
cmake --build "$build" --target swift_gguf fuzz_sidecar --parallel "$(nproc)" >> "$build.log"
cmake --install "$build" --prefix "$build/installed" >> "$build.log"

export SWIFT_GGUF_LIB_DIR=$build/installed/swift_gguf/lib
export ASAN_SYMBOLIZER_PATH=${ASAN_SYMBOLIZER_PATH:-$(command -v llvm-symbolizer || true)}
# pytest would swallow what is written to standard error; Python keeps what it allocates until it ends
rm -f "$build"/report.*
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:log_path=$build/report
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:log_path=$build/report
trap 'cat "$build"/report.* 2> /dev/null || true' ERR

# C programs are compiled by hand below: linked without the runtimes, as the tests do it, they would not start
skipped=(--ignore=tests/native/test_c_example.py --ignore=tests/native/test_sanitizers.py)

tests=("$@")
[[ $# -gt 0 ]] || tests=(tests/native tests/model tests/sampling tests/prepare)

echo "== tests"
LD_PRELOAD=$runtime "$python" -m pytest -q -p no:cacheprovider -m "not slow" "${skipped[@]}" "${tests[@]}"

echo "== leaks"
LD_PRELOAD=$runtime "$python" -m tests.fixtures.fuzz_corpus "$build/fuzz"
program=$build/speculate
# shellcheck disable=SC2046
clang native/examples/speculate.c -o "$program" $("$python" -m swift_gguf config --cflags --libs) -fsanitize=address -shared-libasan
LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=1:log_path=$build/report \
    "$program" "$build/fuzz/model.gguf" "hello hello hello" 48 0.7 "$build/fuzz/profile.json" "$build/fuzz/corpus/whole"

if ((seconds > 0)); then
    echo "== fuzzing for $seconds s"
    mkdir -p "$build/fuzz/found"
    LD_PRELOAD=$runtime SWIFT_GGUF_FUZZ_MODEL=$build/fuzz/model.gguf "$build/bin/fuzz_sidecar" \
        -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -malloc_limit_mb=256 -max_len=131072 \
        -print_final_stats=1 -verbosity=1 -artifact_prefix="$build/fuzz/found/" "$build/fuzz/new" "$build/fuzz/corpus"
fi
echo "== nothing found"
