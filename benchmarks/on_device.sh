#!/usr/bin/env bash
# Everything that a bare GPU machine is asked for, in under nine minutes: the kernels' tests, then the standard workloads
# with every provider, in one result file. Needs PyTorch and Triton; no network, nothing is installed, nothing is
# written but the result.
#
#   benchmarks/on_device.sh [COMMIT]      COMMIT names the source where there is no git
#
# The result goes to $OUT if that is set, else to benchmarks/results/<gpu>/<date>-<commit>.json.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
commit=${1:-$(git -C "$root" rev-parse --short=10 HEAD 2>/dev/null || echo unknown)}
python=${PYTHON:-python3}
total=530 # seconds for everything
tests=150 # of them for the tests
started=$SECONDS
left() { echo $((total - SECONDS + started)); }
say() { echo "[$((SECONDS - started)) s] $*"; }

# the package as an installation lays it out, beside what measures it: `kernels` becomes fastblocks.kernels
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/fastblocks"
(cd "$root/fastblocks" && tar -cf - --exclude=./kernels --exclude=__pycache__ .) | tar -xf - -C "$work/fastblocks"
cp -r "$root/kernels" "$work/fastblocks/kernels"
cp -r "$root/benchmarks" "$root/tests" "$root/pyproject.toml" "$root/README.md" "$work/"
cd "$work" || exit 2
export PYTHONPATH=$work PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

missing=$("$python" - <<'PY'
from importlib.util import find_spec
needed, wished = ["torch", "triton", "numpy"], ["pytest", "hypothesis", "liger_kernel", "flashrnn"]
print(" ".join(n for n in needed if not find_spec(n)), "|", " ".join(n for n in wished if not find_spec(n)))
PY
) || { echo "error: $python does not run" >&2; exit 2; }
required=${missing%%|*} optional=${missing##*|}
if [ -n "${optional// /}" ]; then echo "missing, and what needs them is left out:$optional"; fi
if [ -n "${required// /}" ]; then
  echo "error: missing: $required" >&2
  exit 2
fi
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "error: PyTorch sees no GPU here" >&2
  exit 2
}
"$python" -c 'import fastblocks.kernels' || exit 2

status=0
if [[ " $optional " == *" pytest "* ]]; then
  echo "tests/kernels: not run, pytest is missing"
else
  skip=()
  if [[ " $optional " == *" hypothesis "* ]]; then
    for file in $(grep -l hypothesis tests/kernels/*.py); do
      echo "$file: not run, hypothesis is missing"
      skip+=("--ignore=$file")
    done
  fi
  say "tests/kernels"
  timeout -k 5 "$tests" "$python" -m pytest tests/kernels -q -x --maxfail=20 -p no:cacheprovider "${skip[@]}"
  status=$?
  case $status in
    0) ;;
    5) echo "tests/kernels: no tests" && status=0 ;;
    124) echo "tests/kernels: stopped after $tests s" ;;
    *) echo "tests/kernels: FAILED ($status); times follow, of whatever is right" ;;
  esac
fi

result=$work/result.json
run() { # a share of the time that is left, in percent; then what the suite takes
  local share=$1
  shift
  say "workloads: $*"
  if [ "$(left)" -lt 60 ]; then
    say "left out: no time"
    return 1
  fi
  timeout -k 5 "$(($(left) - 10))" "$python" -m benchmarks --json "$result" --append --commit "$commit" \
    --budget $((($(left) - 40) * share / 100)) "$@"
}
# first what this package is measured by, then what has to be compiled for minutes
run 65 --provider baseline,fastblocks,fastblocks-graph,block-diagonal,flashrnn,liger --seconds 0.4 || status=$?
run 80 --provider compile,flex --mode forward,training --seconds 0.3 att-freq att-time att-long cnx-1d cnx-2d-32 \
  rows-norm-128 rows-mlp-128 band model-roformer model-unet || status=$?
run 100 --provider max-autotune --mode forward,training --seconds 0.3 cnx-1d cnx-2d-32 || status=$?

if [ -f "$result" ]; then
  path=$("$python" -c 'import json, sys
d = json.load(open(sys.argv[1]))
print(d["kind"] + "/" + d["date"][:10] + "-" + d["commit"].rstrip("+") + ".json")' "$result")
  if [ -n "${OUT:-}" ]; then target=$OUT/$(basename "$path"); else target=$root/benchmarks/results/$path; fi
  mkdir -p "$(dirname "$target")" && cp "$result" "$target" && echo "written: $target"
fi
echo "$((SECONDS - started)) s"
exit "$status"
