#!/usr/bin/env bash
# One would guess that a file which save_file writes may be read by whom the umask lets read it, as every file that
# Python's open() makes, and as those of safetensors 0.7 are.
#
# In truth safetensors 0.8 writes files that their owner alone may read and write (mode 0600), whatever the umask. A model
# saved into a folder that a team shares, or by root in a container, cannot be loaded by others, while config.json and
# tokenizer.json beside it can.
#
# Exits with 1 where this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
umask 022
found=""
for version in 0.7.0 0.8.0; do
    python3 -m venv "$version"
    "$version/bin/pip" install --quiet --disable-pip-version-check "safetensors==$version" numpy==2.4.6
    "$version/bin/python" -c "
import numpy
from safetensors.numpy import save_file

save_file({'weight': numpy.zeros(4, numpy.float32)}, '$version.safetensors')
open('$version.json', 'w').close()"
    mode=$(stat -c %a "$version.safetensors") beside=$(stat -c %a "$version.json")
    echo "safetensors $version: mode $mode; a file that open() made beside it: $beside"
    found="$found $mode $beside"
done
[ "$found" = " 644 644 600 644" ]
