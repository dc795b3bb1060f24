#!/usr/bin/env bash
# A run on a Cloud TPU slice, one process a host, which JAX detects.
#   launch/tpu_slice.sh setup NAME ZONE           copies the checkout, installs it on all workers
#   launch/tpu_slice.sh run NAME ZONE COMMAND...  runs a command on all workers
#   launch/tpu_slice.sh logs NAME ZONE [LINES]    prints the last lines of each worker
#   launch/tpu_slice.sh stop NAME ZONE            SIGTERM: saves the step and ends
# The workdir is on a disk that all workers mount (Filestore). Lines of output begin with the
# worker. After a failure `run` starts all processes again (supervise.sh); start it in tmux, on a
# machine that stays on. If that machine fails, the processes keep running; another `run` replaces
# them. Not tried on a slice; gcloud accepts the flags.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 setup|run|logs|stop NAME ZONE [COMMAND...]" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"
verb=$1 name=$2 zone=$3
shift 3
# All workers, always: a program on one worker of a slice waits for the others for ever (jax#22436).
workers=(--zone="$zone" --worker=all --quiet)
# A worker that is gone is noticed within a minute.
workers+=(--ssh-flag="-o ServerAliveInterval=15" --ssh-flag="-o ServerAliveCountMax=3")
root=$(cd "$(dirname "$0")/.." && pwd)

on_workers() { gcloud compute tpus tpu-vm ssh "$name" "${workers[@]}" --command="$1"; }

# Prints the line that sends a signal to the process of a worker. The number in the file may by now
# be that of another program, which does not have our variable.
kill_line() {
    echo "pid=\$(cat .mmsr1-pid 2>/dev/null) && grep -qz '^MMSR1_LAUNCH=1\$' /proc/\$pid/environ" \
        "2>/dev/null && kill -$1 \$pid"
}

start() {
    local line
    # gcloud repeats the command after a lost connection, so what still runs is killed first.
    line="if $(kill_line KILL); then sleep 5; fi; "
    # A killed process leaves this lock, which refuses the next one (jax#10192).
    line+="rm -f /tmp/libtpu_lockfile; "
    # Not with nohup, with which gcloud reports success at once: in the foreground, with a copy of
    # the output in a file. `tee -p` goes on writing it when the connection is lost.
    line+="exec > >(trap '' HUP INT TERM; sed -u \"s/^/[worker \${HOSTNAME##*-}] /\" \
        | tee -p -a mmsr1.log) 2>&1; trap '' HUP; echo \$\$ >.mmsr1-pid; cd mmsr1_jax && "
    # JAX's port for slices, 8482, is closed by the default firewall rules; 8476 is open
    # (jax#35905).
    line+="PATH=\$HOME/.venv/bin:\$PATH exec env MMSR1_LAUNCH=1 JAX_COORDINATOR_PORT=8476 \
        MMSR1_REPORT_STOPPED=${MMSR1_REPORT_STOPPED:-} $command"
    on_workers "bash -c $(printf '%q' "$line")" </dev/null &
}

send() { on_workers "$(kill_line "$1")" </dev/null || true; }

case "$verb" in
    setup)
        folder=$(mktemp -d)
        trap 'rm -rf "$folder"' EXIT
        archive=$folder/mmsr1_jax.tar.gz
        git -C "$root" archive --format=tar.gz -o "$archive" HEAD
        gcloud compute tpus tpu-vm scp "$archive" "$name:" --zone="$zone" --worker=all --quiet
        # Images of TPU VMs have Python 3.10; uv brings its own.
        on_workers "mkdir -p mmsr1_jax && tar xzf mmsr1_jax.tar.gz -C mmsr1_jax \
            && python3 -m pip install --quiet --user uv \
            && python3 -m uv venv --quiet --allow-existing --python 3.12 .venv \
            && python3 -m uv pip install --quiet --python .venv/bin/python './mmsr1_jax[tpu]'"
        ;;
    run)
        command=$(printf '%q ' "$@")
        supervise 1; exit
        ;;
    logs) on_workers "tail -n $(printf '%q' "${1:-50}") mmsr1.log" ;;
    stop) on_workers "$(kill_line TERM)" ;;
    *)
        echo "unknown: $verb" >&2
        exit 2
        ;;
esac
