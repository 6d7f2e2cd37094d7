#!/usr/bin/env bash
# One would guess that `nohup torchrun ... &` goes on when the terminal closes: nohup has the process ignore SIGHUP, and
# most programs leave an ignored signal ignored.
#
# In truth torch's elastic agent (torch.distributed.elastic, which torchrun runs) puts its own handler on SIGHUP whatever
# was there before, takes the signal for a request to end, and stops all workers. A plain Python process under the same
# nohup goes on. Whoever starts workers through LaunchConfig can leave SIGHUP out with signals_to_handle="SIGTERM,SIGINT";
# setsid, tmux or a scheduler keep the signal away altogether.
#
# Exits with 1 where this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$work"

cat >worker.py <<'PY'
import pathlib
import time

pathlib.Path("started").touch()
for _ in range(150):
    time.sleep(0.1)
pathlib.Path("finished").touch()
PY
cat >quiet.py <<'PY'
from torch.distributed.launcher import LaunchConfig, elastic_launch

if __name__ == "__main__":
    config = LaunchConfig(1, 1, 1, run_id="x", rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost",
                          signals_to_handle="SIGTERM,SIGINT")  # fmt: skip
    elastic_launch(config, "python")("-u", "worker.py")
PY

# Start a command with SIGHUP ignored, as nohup does, send it SIGHUP once its worker runs, and say whether that finished.
survives() {
    rm -f started finished
    ( trap '' HUP; exec "$@" ) >log 2>&1 &
    local process=$!
    until [ -e started ]; do sleep 0.2; done
    sleep 2
    kill -HUP $process
    wait $process || true
    [ -e finished ] && echo yes || echo no
}
export PATH="$work/venv/bin:$PATH"
python -c 'import torch; print("torch", torch.__version__)'
plain=$(survives python worker.py)
agent=$(survives torchrun --nproc-per-node 1 --master-addr localhost --master-port 0 worker.py)
grep -m 1 -o "Received Signals.SIGHUP[^,]*\|Received 1 death signal" log || true
without=$(survives python quiet.py)
echo "SIGHUP ignored at the start, then sent; the work was finished: by python $plain, under torchrun $agent, with signals_to_handle $without"
[ "$plain $agent $without" = "yes no yes" ] || { cat log; echo "the behaviour has changed"; exit 1; }
