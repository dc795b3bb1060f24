#!/usr/bin/env bash
# Runs a command on N virtual CPU devices: launch/virtual_devices.sh N COMMAND...
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 N COMMAND..." >&2
    exit 2
fi
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$1"
shift
exec "$@"
