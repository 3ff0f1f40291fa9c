#!/usr/bin/env bash
# Run a largebatch command on this machine: one rank per GPU or, where there is none, per CPU core.
#
#   launch/torchrun.sh train imagenet_resnet50
#   RANKS=2 launch/torchrun.sh train fashion_mnist schedule.epochs=2
#
# RANKS   processes to start; the result does not depend on it
# PYTHON  interpreter that has largebatch installed (default: this checkout's .venv, else python3)
set -euo pipefail

fail() {
    echo "torchrun.sh: $*" >&2
    exit 2
}

visible_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true # empty or -1 hides every GPU
    elif command -v nvidia-smi >/dev/null; then
        # It prints its errors on standard output, so only lines of its own list count.
        { nvidia-smi --list-gpus || true; } | grep -c '^GPU [0-9]' || true
    else
        echo 0
    fi
}

[ $# -gt 0 ] || fail "give a command, for example: launch/torchrun.sh train fashion_mnist"

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$checkout/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a program"
"$PYTHON" -c 'from importlib.util import find_spec; raise SystemExit(not (find_spec("torch") and find_spec("largebatch")))' ||
    fail "$PYTHON has no torch or no largebatch: run 'make test' once, or set PYTHON"

if [ -z "${RANKS:-}" ]; then
    RANKS=$(visible_gpus)
    [ "$RANKS" -gt 0 ] || RANKS=$(nproc)
fi
[[ $RANKS =~ ^[1-9][0-9]*$ ]] || fail "RANKS=$RANKS must be a whole number from 1"

# What torchrun would choose itself for several ranks, less its warning; the config sets the threads anyway.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# All ranks are here, so gloo need not listen to the network.
if [ -e /sys/class/net/lo ]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
fi
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$RANKS" -m largebatch "$@"
