#!/usr/bin/env bash
# A run on hosts that ssh reaches, one process a host. The first one coordinates; its port must be
# open to the others.
#   HOSTS="node1 node2" launch/ssh.sh /shared/mmsr1_jax mmsr1 train --config=qwen7b --workdir=/shared/run
# The folder is the command's working directory on every host. Lines of output begin with the host.
set -euo pipefail
if [ $# -lt 2 ] || [ -z "${HOSTS:-}" ]; then
    echo "usage: HOSTS=\"HOST..\" $0 FOLDER COMMAND..." >&2
    exit 2
fi
folder=$1
shift
read -r -a hosts <<<"$HOSTS"
command=$(printf '%q ' "$@")
processes=()
for index in "${!hosts[@]}"; do
    host=${hosts[$index]}
    variables="MMSR1_COORDINATOR=${hosts[0]}:${PORT:-8476} MMSR1_NUM_PROCESSES=${#hosts[@]}"
    # The remote shell becomes the command, so that the file has its process ID.
    ssh -o BatchMode=yes "$host" \
        "cd $(printf '%q' "$folder") && echo \$\$ >.mmsr1-pid-$index \
        && exec env $variables MMSR1_PROCESS_ID=$index $command" \
        > >(sed -u "s/^/[$host] /") 2>&1 </dev/null &
    processes+=($!)
done
# SIGTERM to one process lets all save their step and end.
# shellcheck disable=SC2329  # called by the trap
stop() {
    ssh -o BatchMode=yes "${hosts[0]}" \
        "kill -TERM \$(cat $(printf '%q' "$folder")/.mmsr1-pid-0)" </dev/null || true
}
trap stop INT TERM
status=0
for process in "${processes[@]}"; do
    while kill -0 "$process" 2>/dev/null; do wait "$process" || true; done
    wait "$process" || status=$?
done
exit "$status"
