#!/usr/bin/env bash
# Everything that wants a GPU, from the tree, in three parts of a few minutes each: what is right first, then how fast it
# is.
#
#   bash bench/gpu_all.sh [FOLDER [tests|kernels|training]...]        (all three by default; PYTHON names an interpreter)
#
# Results (JSON, as they come; plots) and a log of every step go to FOLDER, bench/results unless given. A step that fails
# or runs out of its time does not stop the next; what it had written stays.
set -u

folder=${1:-bench/results}
parts=("${@:2}")
[ ${#parts[@]} -gt 0 ] || parts=(tests kernels training)
for part in "${parts[@]}"; do
    case $part in
    tests | kernels | training) ;;
    *) echo "the parts are tests, kernels and training, not $part" >&2 && exit 2 ;;
    esac
done
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
    # Interrupted, pytest still shows what has failed so far.
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$folder/$name.log"
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

tests() {
    if has pytest && has hypothesis; then
        local workers=()
        # Most of the time is Triton compiling: one process for each core, up to sixteen.
        has xdist && workers=(-n "$(($(nproc) < 16 ? $(nproc) : 16))")
        step tests-gpu 60 "$python" -m pytest -m gpu --continue-on-collection-errors --tb=short tests
        step tests-kernels 170 "$python" -m pytest tests/kernels --tb=short "${workers[@]}"
    else
        echo "SKIPPED: the tests, which need pytest and hypothesis"
        summary+=("tests: SKIPPED, pytest or hypothesis is missing")
        failed=1
    fi
}

kernels() {
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

for part in "${parts[@]}"; do "$part"; done

echo
echo "step                 exit seconds"
printf '%s\n' "${summary[@]}"
exit "$failed"
