#!/usr/bin/env bash
# What other people's tools make of our models and our API: `bash bench/compatibility.sh [NAME...]`. Each tool runs in a
# venv of its own, made from pinned packages; results go to bench/results/compatibility.json. How to add one is told in
# compatibility/__main__.py. PYTHON names an interpreter that has this project.
cd "$(dirname "${BASH_SOURCE[0]}")/.." && exec "${PYTHON:-.venv/bin/python}" -m bench.compatibility "$@"
