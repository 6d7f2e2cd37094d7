#!/usr/bin/env bash
# One would guess: what llama-batched-bench has printed when it ends with 0 is all that it had to say, each line once.
# True: in the llama.cpp of llama-cpp-python 0.3.36 a thread prints what is logged, the tables of results too, and nobody
# waits for it when the program ends. The last lines are lost in half of the runs on a busy machine, and some come twice.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: llama-cpp-python==0.3.36
tar xzf llama_cpp_python-0.3.36.tar.gz
source=llama_cpp_python-0.3.36/vendor/llama.cpp
cat > probe.cpp <<'CODE'
#include <chrono>
#include <cstdlib>
#include <thread>
#include "log.h"
bool tty_can_use_colors() { return false; }
extern "C" [[noreturn]] void ggml_abort(const char *, int, const char *, ...) { std::abort(); }
int main() {
    for (int i = 0; i < 3; i++) {
        LOG("line %d\n", i);
        std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    LOG("line 3\n");
}
CODE
g++ -O1 -std=c++17 -I"$source/common" -I"$source/include" -I"$source/ggml/include" -I"$source/vendor" \
  probe.cpp "$source/common/log.cpp" "$source/common/json.cpp" -o probe -lpthread
for _ in $(seq 300); do { ./probe | tr '\n' ' '; echo; } done | sort | uniq -c | sort -rn | tee seen
if [ "$(wc -l < seen)" = 1 ]; then
  echo "every run printed the same lines: they are waited for now" >&2
  exit 1
fi
