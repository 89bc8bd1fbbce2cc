#!/bin/sh
# The container's first process. The server's own output goes into a file, which this shows as well.
set -eu
log=${FSSDEPLOY_LOG:-/tmp/serve.log}
: >> "$log"
tail -n 0 -F "$log" &
exec fssdeploy serve /models --host 0.0.0.0 --http-port 8000 --grpc-port 8001 --metrics-port 8002 --bank /bank \
  --log "$log" "$@"
