#!/usr/bin/env bash
# Everything that wants a GPU: `bash bench/gpu_all.sh FOLDER [STEP...]`. What it does, and how it goes on, is told in
# gpu_all.py. PYTHON names an interpreter.
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_all.py" "$@"
