#!/usr/bin/env bash
# Builds the library for this machine's GPU (CUDA or Metal), tests it with everything offloaded, and
# measures the mechanism on a synthetic model.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: scripts/gpu_check.sh [--cpu] [--shape 7b|1b|tiny] [--type q4_0|q8_0] [--rounds N] [--lib DIR]
                            [--no-tests]

  --cpu      the same on the CPU, with a tiny model: tries the script itself
  --shape    of the synthetic model (default: 7b, with --cpu: tiny)
  --type     of its weights (default: q4_0)
  --rounds   of measurement (default: 7, with --cpu: 2)
  --lib      a library that is built already, instead of building it
  --no-tests measure only

PYTHON names the interpreter (default: python3); it needs the packages of pyproject.toml. Nothing is
downloaded if the llama.cpp source is in the cache (python native/source.py --fetch-only).
USAGE
}

die() {
    echo "gpu_check: $*" >&2
    exit 1
}

cpu=0 run_tests=1 shape= type=q4_0 rounds= lib=
while [ $# -gt 0 ]; do
    case $1 in
        --cpu) cpu=1 ;;
        --no-tests) run_tests=0 ;;
        -h | --help) usage; exit 0 ;;
        --shape | --type | --rounds | --lib)
            [ $# -ge 2 ] || die "$1 needs a value"
            case $1 in
                --shape) shape=$2 ;;
                --type) type=$2 ;;
                --rounds) rounds=$2 ;;
                --lib) lib=$(cd "$2" 2>/dev/null && pwd) || die "$2 is not a folder" ;;
            esac
            shift
            ;;
        *) usage >&2; exit 2 ;;
    esac
    shift
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

# --- what is there ---------------------------------------------------------------------------------

if [ $cpu = 1 ]; then
    backend=CPU build=build/cpu ngl=0 options=(-DGGML_METAL=OFF)
    shape=${shape:-tiny} rounds=${rounds:-2}
elif [ "$(uname -s)" = Darwin ]; then
    backend=Metal build=build/gpu ngl=99 options=(-DGGML_METAL=ON)
elif command -v nvcc >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    backend=CUDA build=build/gpu ngl=99
    # for this card alone: all architectures take several times as long
    options=(-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native)
else
    die "neither CUDA (nvcc, and a GPU that nvidia-smi lists) nor Metal is here; --cpu tries the script without"
fi
shape=${shape:-7b} rounds=${rounds:-7}

"$python" - <<'PY' || die "install the packages above for $python, or name another interpreter in PYTHON"
import importlib.util, sys
needed = ("llama_cpp", "numpy", "gguf", "click", "platformdirs", "pytest")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit("missing: " + " ".join(missing))
PY

# --- the library -----------------------------------------------------------------------------------

if [ -z "$lib" ]; then
    command -v cmake >/dev/null || die "cmake is not installed"
    echo "== building for $backend in $build"
    mkdir -p "$build"
    log=$build/gpu_check.log
    cmake -S . -B "$build" "${options[@]}" -DPython3_EXECUTABLE="$(command -v "$python")" >"$log" 2>&1 &&
        cmake --build "$build" --target swift_gguf --parallel "$(getconf _NPROCESSORS_ONLN)" >>"$log" 2>&1 ||
        { tail -n 20 "$log" >&2; die "the build failed, see above and $log"; }
    lib=$PWD/$build/lib
fi
export SWIFT_GGUF_LIB_DIR=$lib PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

"$python" - "$backend" <<'PY' || die "the library in $lib is not usable here, see above"
import sys
from swift_gguf.errors import SwiftError
from swift_gguf.native import library
try:
    devices = library().devices()
except SwiftError as error:
    sys.exit(f"error: {error}")
for device in devices:
    print(f"device {device.name}: {device.description}")
if sys.argv[1] != "CPU" and not any(device.is_gpu for device in devices):
    sys.exit(f"error: the library sees no GPU; was it built for {sys.argv[1]}?")
PY

# --- tests, everything offloaded -------------------------------------------------------------------

tests=(tests/native tests/model)
# those need real weights, which this script does not download
if "$python" -c '
import sys
from swift_gguf.hub import models
sys.exit(0 if any(models.installed(entry) for entry in models.registry()) else 1)'; then
    tests+=(tests/real)
else
    echo "== no demo model in the cache: tests/real is left out (scripts/fetch_demo_models.py)"
fi
failed=0
if [ $run_tests = 1 ] && [ ${#tests[@]} -gt 0 ]; then
    echo "== pytest ${tests[*]}"
    # 0 keeps a machine's GPU out of --cpu
    SWIFT_GGUF_TEST_NGL=$([ $cpu = 1 ] && echo 0 || echo -1) "$python" -m pytest -q "${tests[@]}" || failed=$?
fi

# --- measurements ----------------------------------------------------------------------------------

mkdir -p "$build"
model=$build/synthetic-$shape-$type.gguf
if [ ! -f "$model" ]; then
    echo "== writing $model"
    "$python" scripts/make_synthetic.py "$model" --shape "$shape" --type "$type" >/dev/null
fi
echo "== measuring"
"$python" scripts/lab mechanism "$model" -ngl $ngl --rounds "$rounds" --json "$build/mechanism.json"
echo
echo "figures: $build/mechanism.json"
[ $failed = 0 ] || die "tests failed on $backend (pytest: $failed), see above"
