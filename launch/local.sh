#!/usr/bin/env bash
# Runs a command as N processes, each with D virtual CPU devices, as on N hosts:
#   launch/local.sh N D COMMAND...
# Lines of output begin with the number of the process. After a failure all processes start again
# (supervise.sh). Ctrl-C and SIGTERM reach all of them.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 N D COMMAND..." >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"
count=$1 devices=$2
shift 2
command=("$@")
export JAX_PLATFORMS=cpu MMSR1_COORDINATOR MMSR1_NUM_PROCESSES="$count"
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

prepare() {
    local free='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0))'
    free+='; print(s.getsockname()[1])'
    MMSR1_COORDINATOR="127.0.0.1:$(python3 -c "$free")"
}

start() {
    # A Ctrl-C must not end `sed`, which still has to print what the process writes.
    MMSR1_PROCESS_ID=$1 "${command[@]}" > >(trap '' INT TERM && sed -u "s/^/[$1] /") 2>&1 &
}

send() { kill -"$1" "${processes[$2]}"; }

supervise "$count"; exit # on one line, as bash reads a file while it runs it
