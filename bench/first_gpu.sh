#!/usr/bin/env bash
# The first minutes on a machine with a GPU: correct first, then the headline figures, each part within its limit.
#
#   OUT=folder [BUDGET=430] [PARTS="tests layers"] [DRY=1] bash bench/first_gpu.sh
#
# BUDGET: seconds in which everything has begun and ended, but for a last write; leave 30 more. Where the CUDA kernels
# are not built they are, in the checkout (25 s, which a _C built before for that Python saves). Wheels of what the
# machine lacks (pytest-benchmark) and of rivals (axolotl, bitsandbytes) are taken from .whl/ where there is such a
# folder; a part that lacks a package is left out, and said. OUT gets gpu.json, a line for every bench as it ends
# (gpu.jsonl), the tests' report, the tuner's table, the log; a last table is printed, which bench/gpu.py --table --out
# FILE prints again.
# DRY=1, and wherever there is no GPU: all of it tiny and on the CPU, which shows that every part starts and ends.
set -u
: "${OUT:?a folder for the files}" "${BUDGET:=430}" "${PARTS:=tests kernels layers steps rest tune}"
: "${DRY:=}" "${PYTHON:=python3}"
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) && cd "$(dirname "$0")/.." || exit 2
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
export TORCHINDUCTOR_COMPILE_THREADS=1  # else every test process that compiles starts processes of its own
SECONDS=0
how=--quick
if [ -n "$DRY" ] || ! "$PYTHON" bench/gpu.py --look; then
  echo "== a dry run: tiny, on the CPU, its figures mean nothing"
  how=--dry
fi

say() {  # command ...: its last lines here, all of it in the log; its limit is part of the command
  "$@" > "$OUT/last" 2>&1
  local code=$?
  cat "$OUT/last" >> "$OUT/log"
  tail -n 25 "$OUT/last"
  rm -f "$OUT/last"
  echo "== exit $code after $SECONDS s: $*" | tee -a "$OUT/log"
}

if [ $how = --quick ]; then
  "$PYTHON" -c "from slao_kernels import native; raise SystemExit(native.why_not('cuda') is not None)" ||
    say timeout -s INT -k 12 120 "$PYTHON" setup.py build_ext --inplace
  if [ -d .whl ]; then
    site=$(mktemp -d)
    say timeout -s INT -k 12 60 "$PYTHON" -m pip install -q --no-index --no-deps --target "$site" .whl/*.whl
    export PYTHONPATH=$PYTHONPATH:$site
  fi
fi
say timeout -s INT -k 12 60 "$PYTHON" -m slao_kernels
# Without the kernels' build the rest still says something: of Triton's, of the layers, of whole steps.
# shellcheck disable=SC2086  # words of their own
"$PYTHON" bench/gpu.py $PARTS $how --without-core --deadline $((BUDGET - SECONDS)) --out "$OUT/gpu.json" --log "$OUT/log"
code=$?
command -v nvidia-smi > /dev/null &&
  nvidia-smi --query-gpu=name,clocks.sm,clocks.mem,temperature.gpu,power.draw --format=csv,noheader | tee -a "$OUT/log"
exit $code
