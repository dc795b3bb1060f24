#!/usr/bin/env bash
# A run on a spot slice, which is created, and again when it is preempted; the run then resumes.
#   launch/tpu_spot.sh NAME ZONE TYPE COMMAND...       TYPE: an accelerator type, such as v6e-32
# It ends when the run is complete, is refused, is stopped by Ctrl-C or SIGTERM, or has failed
# RESTARTS (10) times in a row on a slice that is still there. The slice is then deleted, unless
# KEEP=1. VERSION is the image of its VMs, SETUP a line that runs on all workers before the
# checkout is installed, such as the mount of the disk of the workdir; it may run again. Start it
# in tmux, on a machine that stays on. Not tried on a slice; gcloud accepts the flags.
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: $0 NAME ZONE TYPE COMMAND..." >&2
    exit 2
fi
name=$1 zone=$2 type=$3
shift 3
here=$(dirname "${BASH_SOURCE[0]}")
case "$type" in
    v6e-*) image=v2-alpha-tpuv6e ;;
    v5p-*) image=v2-alpha-tpuv5 ;;
    v5litepod-*) image=v2-alpha-tpuv5-lite ;;
    *) image=tpu-ubuntu2204-base ;;
esac
poll=${POLL_SECONDS:-60}

queued() { gcloud compute tpus queued-resources "$@" --zone="$zone" --quiet; }

# Prints the state of the request, or MISSING.
state() { queued describe "$name" --format='value(state.state)' 2>/dev/null || echo MISSING; }

# Waits a while; ends everything if a signal has come.
pause() {
    sleep "$poll" &
    wait $! || true
    if [[ $stopped ]]; then finish 75; fi
}

finish() {
    if [[ ! ${KEEP:-} ]] && [ "$(state)" != MISSING ]; then queued delete "$name" --force; fi
    exit "$1"
}

# Creates the slice, with the checkout installed on it, unless it is there.
provide() {
    local now
    while :; do
        now=$(state)
        case "$now" in
            ACTIVE) break ;;
            MISSING)
                queued create "$name" --node-id="$name" --accelerator-type="$type" --spot --async \
                    --runtime-version="${VERSION:-$image}" || true
                installed=''
                ;;
            SUSPENDED | FAILED) # preempted, or there were no chips; the node goes with the request
                queued delete "$name" --force || true
                ;;
        esac
        echo "launch: $name is $now" >&2
        pause
    done
    if [[ $installed ]]; then return; fi
    if [[ ${SETUP:-} ]]; then
        gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --quiet \
            --command="$SETUP" || return 1
    fi
    "$here/tpu_slice.sh" setup "$name" "$zone" || return 1
    installed=1
}

# Sets `status`. Code 75 means that SIGTERM has stopped the run: the notice of a preemption.
run() {
    RESTARTS=0 MMSR1_REPORT_STOPPED=1 "$here/tpu_slice.sh" run "$name" "$zone" "$@" &
    child=$!
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    status=0
    wait "$child" || status=$?
    child=''
}

stopped='' child='' installed='' failures=0 first=1
trap 'stopped=1; if [[ $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi' INT TERM
while :; do
    status=1
    if provide; then run "$@"; fi
    if [[ $stopped ]] || ((status == 0)) || ((first && (status == 2 || status == 127))); then
        finish "$status"
    fi
    if [[ $installed ]]; then first=''; fi
    pause
    # After the notice the state may still be ACTIVE for a while.
    if ((status != 75)) && [ "$(state)" = ACTIVE ]; then
        failures=$((failures + 1))
        if ((failures > ${RESTARTS:-10})); then finish "$status"; fi
    else
        failures=0
    fi
done
