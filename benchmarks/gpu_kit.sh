#!/usr/bin/env bash
# Runs on a machine with a GPU all that is only known there, part by part, each within its time; what is there so far is in $OUT.
# Nothing is fetched: .gpu_kit/site.tar.xz (see gpu_kit_wheels.sh) and .gpu_kit/cifar10 are carried along.
# Usage: benchmarks/gpu_kit.sh [--rehearse] [--minutes N] [PART …], of: tests bench latency fidelity search profile.
# --rehearse does the same on a CPU, on tiny sizes.
set -uo pipefail
cd "$(dirname "$0")/.."
rehearse=0 minutes=8 parts=()
while [ $# -gt 0 ]; do
  case $1 in
    --rehearse) rehearse=1 ;;
    --minutes) minutes=$2; shift ;;
    *) parts+=("$1") ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(tests bench latency fidelity search profile)
# Where links do not travel with the files, they are made again.
for room in search trainables; do
  [ -e "slimfront/$room/__init__.py" ] || ln -sfn "../$room" "slimfront/$room"
done
out=${OUT:-.gpu_kit/out}
mkdir -p "$out"
kept=${GPU_KIT_KEPT:-/tmp/slimfront-gpu-kit}   # stays on the machine between calls
mkdir -p "$kept"

site=.gpu_kit/site.tar.xz
[ -f "$site" ] || site=.gpu_kit/mini.tar.xz   # without Ray, Optuna and MLflow: enough for all parts but the tests and the search
if [ -f "$site" ] && [ ! -f "$kept/$(basename "$site").done" ]; then
  rm -rf "$kept/site"
  tar xJ -C "$kept" -f "$site" || exit 1
  touch "$kept/$(basename "$site").done"
  mkdir -p "$kept/site/slimfront-0.dist-info"
  printf 'Metadata-Version: 2.1\nName: slimfront\nVersion: 0\n' > "$kept/site/slimfront-0.dist-info/METADATA"
fi
if [ -d .gpu_kit/cifar10 ] && [ ! -d ../shared/data/cifar10 ]; then
  mkdir -p ../shared/data && cp -r .gpu_kit/cifar10 ../shared/data/
fi
export PYTHONPATH="$kept/site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TORCHINDUCTOR_CACHE_DIR="$kept/inductor" TRITON_CACHE_DIR="$kept/triton" SLIMFRONT_CACHE="$kept/data"
python=${GPU_KIT_PYTHON:-python3}
quick=() && [ $rehearse = 1 ] && quick=(--quick)

part() { # NAME SECONDS COMMAND …
  local name=$1 limit=$2; shift 2
  local begun=$SECONDS
  timeout -k 5 "$limit" "$@" > >(tee "$out/$name.log") 2>&1
  echo "== $name: exit $?, $((SECONDS - begun)) s" | tee -a "$out/summary.txt"
}

for name in "${parts[@]}"; do
  case $name in
    tests)
      if [ $rehearse = 1 ]; then
        part tests 600 "$python" -m pytest -q -p no:cacheprovider tests/trainables/test_gpu.py tests/trainables/test_step_graphs.py \
          tests/trainables/test_synchronisation.py tests/trainables/packs/test_pack.py tests/trainables/test_trainable.py
      else
        part tests 150 "$python" -m pytest -q -p no:cacheprovider -n 8 -m gpu tests/trainables --durations 5
      fi ;;
    bench) part bench 240 "$python" -m benchmarks.gpu --quick --json ;;
    bench-full) part bench-full 400 "$python" -m benchmarks.gpu --json ;;
    latency) part latency 60 "$python" -m benchmarks.gpu_latency "${quick[@]}" --json ;;
    fidelity)
      cp -n benchmarks/results/fidelity-paper.jsonl "$out/fidelity.jsonl" 2>/dev/null
      [ -f "$kept/fidelity.jsonl" ] && cp "$kept/fidelity.jsonl" "$out/fidelity.jsonl"
      part fidelity $((60 * minutes + 60)) "$python" -m benchmarks.fidelity --scale paper "${quick[@]}" --minutes "$minutes" \
        --states "$kept/states" --out "$out/fidelity.jsonl" ${FIDELITY:-}
      cp "$out/fidelity.jsonl" "$kept/fidelity.jsonl" 2>/dev/null ;;
    search) part search 300 "$python" -m benchmarks.gpu_search "${quick[@]}" --json ${SEARCH:-} ;;
    profile) part profile 90 "$python" -m benchmarks.gpu_profile "${quick[@]}" --json ;;
    *) echo "there is no part '$name'"; exit 2 ;;
  esac
done
cat "$out/summary.txt"
