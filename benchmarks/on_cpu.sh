#!/usr/bin/env bash
# The CPU's other tables, in at most 20 minutes on a machine that does nothing else: torch.compile (8), bfloat16 (4),
# one thread (4), beside two busy processes (4). Each replaces its file in benchmarks/results/cpu; then the report is
# drawn. A workload that does not fit into its time says so in its row. Names or options go to all four:
#
#   benchmarks/on_cpu.sh [NAME…] [--seconds 0.2]
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
measure() { # seconds, options
  local budget=$1
  shift
  echo "== $*"
  "$python" -m benchmarks --json benchmarks/results/cpu --seconds 0.2 --budget "$budget" "$@"
}
status=0
measure 450 --provider baseline,compile,fastblocks,fastblocks-compile "$@" || status=1
measure 220 --dtype bf16 "$@" || status=1
measure 220 --threads 1 "$@" || status=1
measure 220 --busy 2 "$@" || status=1
"$python" -m benchmarks report || status=1
exit $status
