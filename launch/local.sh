#!/usr/bin/env bash
# Runs a command as N processes, each with D virtual CPU devices, as on N hosts:
#   launch/local.sh N D COMMAND...
# Lines of output begin with the number of the process. Ctrl-C and SIGTERM reach all of them.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 N D COMMAND..." >&2
    exit 2
fi
count=$1 devices=$2
shift 2
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
free='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
MMSR1_COORDINATOR="127.0.0.1:$(python3 -c "$free")"
export MMSR1_COORDINATOR MMSR1_NUM_PROCESSES="$count"
processes=()
for ((index = 0; index < count; index++)); do
    MMSR1_PROCESS_ID=$index "$@" > >(sed -u "s/^/[$index] /") 2>&1 &
    processes+=($!)
done
trap 'kill -TERM "${processes[@]}" 2>/dev/null || true' INT TERM
status=0
for process in "${processes[@]}"; do
    # `wait` returns early when a signal is handled, so it is repeated until the process has ended.
    while kill -0 "$process" 2>/dev/null; do wait "$process" || true; done
    wait "$process" || status=$?
done
exit "$status"
