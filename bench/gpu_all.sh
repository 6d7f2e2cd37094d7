#!/usr/bin/env bash
# Everything that wants a GPU, from the tree, in two parts of under nine and a half minutes each: what is right first, then
# how fast it is.
#
#   bash bench/gpu_all.sh [FOLDER [kernels|training]]        (PYTHON names another interpreter)
#
# Results (JSON, as they come; plots) and a log of every step go to FOLDER, bench/results unless given. A step that fails
# or runs out of its time does not stop the next; what it had written stays.
set -u

folder=${1:-bench/results}
part=${2:-kernels}
case $part in kernels | training) ;; *) echo "the parts are kernels and training, not $part" >&2 && exit 2 ;; esac
mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
summary=()
failed=0

# step NAME SECONDS COMMAND...
step() {
    local name=$1 limit=$2 begin=$SECONDS code
    shift 2
    echo "== $name: $*"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$folder/$name.log"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || failed=1
    summary+=("$(printf '%-20s %4s %7s of %s s' "$name" "$code" "$((SECONDS - begin))" "$limit")")
}

has() {
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

for package in torch triton safetensors sentencepiece typer rich matplotlib pytest hypothesis xdist; do
    has "$package" || echo "MISSING: the Python package $package"
done
"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' ||
    echo "MISSING: a CUDA device that torch can use"

kernels() {
    if has pytest && has hypothesis; then
        local workers=()
        # Most of the time is Triton compiling: one process for each core, up to eight.
        has xdist && workers=(-n 8)
        step tests-kernels 130 "$python" -m pytest tests/kernels "${workers[@]}"
        step tests-gpu 25 "$python" -m pytest -m gpu --ignore=tests/kernels --continue-on-collection-errors tests
    else
        echo "SKIPPED: the tests, which need pytest and hypothesis"
        summary+=("tests: SKIPPED, pytest or hypothesis is missing")
        failed=1
    fi

    # What matters most comes first. flex is compiled for every length, which takes longer than all else: it comes last.
    local quick="ours,plain,flash,efficient,cudnn"
    step attention 80 "$python" -m cli bench-attention --head-dim 128,64 --causal --only $quick --out "$folder/attention"
    step attention-more 55 "$python" -m cli bench-attention --head-dim 32,64,128 --only $quick \
        --out "$folder/attention-more"
    step attention-flex 45 "$python" -m cli bench-attention --head-dim 128,64 --causal --lengths 4096,1024,16384 \
        --only ours,cudnn,flex --out "$folder/attention-flex"

    step layernorm 45 "$python" -m cli bench-layernorm --out "$folder"
    step cross-entropy 35 "$python" -m cli bench-cross-entropy --out "$folder"
    step decode-attention 40 "$python" -m cli bench-decode-attention --only ours,paged,flash --out "$folder"
    step decode-large 30 "$python" -m cli bench-decode large --rounds 3 --out "$folder"
}

training() {
    local train=("$python" -m cli bench-train --rounds 5 --compile --out "$folder")
    step train-large 150 "${train[@]}" large --batch 30
    step train-large-2048 220 "${train[@]}" large --batch 8 --context 2048
    step train-tiny 150 "${train[@]}" tiny --batch 178
}

"$part"

echo
echo "step                 exit seconds"
printf '%s\n' "${summary[@]}"
exit "$failed"
