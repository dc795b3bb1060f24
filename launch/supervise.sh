# shellcheck shell=bash
# Sourced by the other scripts: starts the processes of a run, waits for them, and starts all of
# them again after a failure, so that the run resumes from its last checkpoint. A script defines
#   start INDEX            starts process INDEX in the background, as the last thing that it does
#   send SIGNAL INDEX      sends a signal to process INDEX, which has not ended
#   prepare                (optional) what comes before each attempt
# and calls `supervise COUNT`, which returns
#   0    all processes have ended with 0
#   2    the command was refused: an invalid setting, file or service; 126, 127: it cannot be run
#   75   SIGTERM has stopped the run (only with MMSR1_REPORT_STOPPED=1; otherwise that is 0 as well)
#   N    the exit code of the process that failed first, in the last attempt
# What was refused at once is refused again, so it is not restarted. Later, when the same command
# has already run, another cause is likely, such as a service that does not answer.
# These variables may be set:
restarts=${RESTARTS:-10}               # failures in a row after which no attempt follows
restart_delay=${RESTART_DELAY:-10}     # seconds between two attempts
kill_after=${KILL_AFTER:-90}           # seconds between the first failure and SIGKILL to the rest
steady_seconds=${STEADY_SECONDS:-3600} # an attempt of this length begins a new row of failures

supervise() {
    local count=$1 attempt failures=0 begin
    signals=0 processes=()
    trap 'on_signal' INT TERM
    for ((attempt = 0; ; attempt++)); do
        begin=$SECONDS
        if declare -F prepare >/dev/null; then prepare; fi
        processes=()
        for ((index = 0; index < count; index++)); do
            start "$index"
            processes+=($!)
        done
        wait_for_processes
        case "$status" in
            0 | 75) return "$status" ;;
            2 | 126 | 127) if ((attempt == 0)); then return "$status"; fi ;;
        esac
        if ((signals)); then return "$status"; fi
        if ((SECONDS - begin >= steady_seconds)); then failures=0; fi
        failures=$((failures + 1))
        if ((failures > restarts)); then
            echo "launch: exit code $status, and no restart after $restarts failures in a row" >&2
            return "$status"
        fi
        echo "launch: exit code $status; all processes start again in $restart_delay s" \
            "(failure $failures of $restarts in a row)" >&2
        sleep "$restart_delay" &
        wait $! || true # a signal ends it
        if ((signals)); then return "$status"; fi
    done
}

# The first signal lets the run save its step and end; the second one kills it.
on_signal() {
    signals=$((signals + 1))
    if ((signals == 1)); then send_to_all TERM; else send_to_all KILL; fi
}

send_to_all() {
    local target
    for target in "${!processes[@]}"; do
        if kill -0 "${processes[target]}" 2>/dev/null; then send "$1" "$target" & fi
    done
}

# Waits for all processes, and sets `status`. A process that hangs does not end by itself when
# another has failed, so all that are left are killed after a while.
wait_for_processes() {
    local process code running=1 failed='' killed=''
    local -a ended=()
    status=0
    while ((running)); do
        running=0
        for process in "${processes[@]}"; do
            if kill -0 "$process" 2>/dev/null; then
                running=1
            elif [[ " ${ended[*]-} " != *" $process "* ]]; then
                ended+=("$process")
                code=0
                wait "$process" || code=$?
                if ((code && !status)); then status=$code failed=$SECONDS; fi
            fi
        done
        if [[ $failed && ! $killed ]] && ((SECONDS - failed >= kill_after)); then
            echo "launch: killing the processes that have not ended" >&2
            send_to_all KILL
            killed=1
        fi
        if ((running)); then sleep 0.2 || true; fi # Ctrl-C ends `sleep`
    done
}
