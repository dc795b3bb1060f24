#!/usr/bin/env bash
# A run on hosts that ssh reaches, one process a host. The first one coordinates; its port must be
# open to the others.
#   HOSTS="node1 node2" launch/ssh.sh /shared/mmsr1_jax \
#       mmsr1 train --config=qwen7b --workdir=/shared/run
# The folder is the command's working directory on every host. PORT (8476) is that of the first
# host, SSH ("ssh") the program and its options. Lines of output begin with the host. After a
# failure all processes start again (supervise.sh). Ctrl-C and SIGTERM let all save their step and
# end.
set -euo pipefail
if [ $# -lt 2 ] || [ -z "${HOSTS:-}" ]; then
    echo "usage: HOSTS=\"HOST..\" $0 FOLDER COMMAND..." >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"
folder=$1
shift
read -r -a hosts <<<"$HOSTS"
read -r -a ssh <<<"${SSH:-ssh}"
# A host that is cut off is noticed within a minute.
ssh+=(-o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15 -o ServerAliveCountMax=3)
command=$(printf '%q ' "$@")
launch=$HOSTNAME-$$ # finds the processes of this launch
address=${hosts[0]##*@}:${PORT:-8476}
variables="MMSR1_COORDINATOR=$address MMSR1_NUM_PROCESSES=${#hosts[@]} MMSR1_LAUNCH=$launch"
if [ -n "${MMSR1_REPORT_STOPPED:-}" ]; then variables+=" MMSR1_REPORT_STOPPED=1"; fi

# Prints the line that sends a signal to process INDEX on its host. The number in the file may by
# now be that of another program, which does not have our variable.
kill_line() {
    local file="\${TMPDIR:-/tmp}/mmsr1-$launch-$2"
    echo "pid=\$(cat $file 2>/dev/null) && grep -qz '^MMSR1_LAUNCH=$launch\$' /proc/\$pid/environ" \
        "2>/dev/null && kill -$1 \$pid"
}

start() {
    local host=${hosts[$1]} file="\${TMPDIR:-/tmp}/mmsr1-$launch-$1"
    # What an interrupted connection has left is killed. The remote shell becomes the command, so
    # the file has its process ID.
    "${ssh[@]}" "$host" "$(kill_line KILL "$1"); cd $(printf '%q' "$folder") && echo \$\$ >$file \
        && exec env $variables MMSR1_PROCESS_ID=$1 $command" \
        > >(trap '' INT TERM && sed -u "s/^/[$host] /") 2>&1 </dev/null &
}

send() {
    "${ssh[@]}" "${hosts[$2]}" "$(kill_line "$1" "$2")" </dev/null || true
    # A host that does not answer cannot be told; its process ends by itself.
    if [ "$1" = KILL ]; then kill "${processes[$2]}" 2>/dev/null || true; fi
}

supervise "${#hosts[@]}"; exit # on one line, as bash reads a file while it runs it
