#!/usr/bin/env bash
# A run on a Cloud TPU slice of several hosts, one process a host, which JAX detects.
#   launch/tpu_slice.sh setup NAME ZONE            copies the checkout and installs it on all workers
#   launch/tpu_slice.sh run NAME ZONE COMMAND...   runs a command on all workers
#   launch/tpu_slice.sh stop NAME ZONE             SIGTERM: saves the step and ends
# The workdir is on a disk that all workers mount (Filestore). Not tried on a slice.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 setup|run|stop NAME ZONE [COMMAND...]" >&2
    exit 2
fi
verb=$1 name=$2 zone=$3
shift 3
all_workers=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all)
root=$(cd "$(dirname "$0")/.." && pwd)
case "$verb" in
    setup)
        git -C "$root" archive --format=tar.gz -o /tmp/mmsr1_jax.tar.gz HEAD
        gcloud compute tpus tpu-vm scp /tmp/mmsr1_jax.tar.gz "$name:" --zone="$zone" --worker=all
        "${all_workers[@]}" --command="mkdir -p mmsr1_jax && tar xzf mmsr1_jax.tar.gz -C mmsr1_jax \
            && python3 -m venv .venv && .venv/bin/pip install --quiet './mmsr1_jax[tpu]'"
        ;;
    run)
        # All workers, always: a program on one worker of a slice waits for the others for ever.
        # In the foreground: with nohup a spot slice reports success at once. A lock that a killed
        # process has left in /tmp/libtpu_lockfile would refuse the next one.
        "${all_workers[@]}" --command="kill -0 \$(cat .mmsr1-pid) 2>/dev/null \
            || rm -f /tmp/libtpu_lockfile; echo \$\$ >.mmsr1-pid; \
            cd mmsr1_jax && PATH=\$HOME/.venv/bin:\$PATH exec $(printf '%q ' "$@")"
        ;;
    stop)
        "${all_workers[@]}" --command="kill -TERM \$(cat .mmsr1-pid)"
        ;;
    *)
        echo "unknown: $verb" >&2
        exit 2
        ;;
esac
