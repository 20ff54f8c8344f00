#!/usr/bin/env bash
# Makes .gpu_kit/site.tar.xz: what slimfront needs and a machine with a GPU lacks (Python 3.12 and PyTorch are there, no network).
# What slimfront does not use there is left out (interfaces, other languages), so that it can be carried: 64 MiB at most.
# Usage: benchmarks/gpu_kit_wheels.sh PYTHON3.12 [HAVE]; HAVE lists the packages that the machine has, one name a line.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
have=${2:-/dev/null}
kit=.gpu_kit
rm -rf "$kit/wheels" "$kit/site" && mkdir -p "$kit/wheels"

# The pins of constraints.txt, for the needs of pyproject.toml; not of packages that are there.
needs=$("$python" - <<'END'
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*[f'"{need}"' for need in tomllib.load(file)["project"]["dependencies"] if not need.startswith("torch>")])
END
)
grep -v '^torch==' constraints.txt > "$kit/constraints.txt"
eval "$python -m pip install -q --dry-run --ignore-installed --report $kit/report.json -c $kit/constraints.txt $needs" 
"$python" - "$kit/report.json" "$have" > "$kit/needs.txt" <<'END'
import json, re, sys
name = lambda text: re.sub(r"[-_.]+", "-", text).lower()
have = {name(line.strip()) for line in open(sys.argv[2])}
for item in json.load(open(sys.argv[1]))["install"]:
    one = item["metadata"]
    if name(one["name"]) not in have and not re.match(r"nvidia-|cuda-|triton$|torch$", name(one["name"])):
        print(f"{one['name']}=={one['version']}")
END
platforms=$(for n in 39 35 34 31 28 27 26 24 17 12 5; do printf -- '--platform manylinux_2_%s_x86_64 ' $n; done)
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms \
  --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64 -d "$kit/wheels" -r "$kit/needs.txt"
"$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$kit/site" "$kit"/wheels/*.whl
(
  cd "$kit/site"
  rm -rf ray/rllib ray/serve ray/llm ray/jars ray/cpp ray/dashboard/client mlflow/server/js mlflow/java virtualenv* ray/tests
  find . -name tests -type d -prune -exec rm -rf {} +
  strip --strip-unneeded ray/_raylet.so ray/core/src/ray/raylet/raylet ray/core/src/ray/gcs/gcs_server
)
tar c -C "$kit" site | xz -T0 -8 > "$kit/site.tar.xz"
rm -rf "$kit/site" "$kit/wheels"
size=$(stat -c %s "$kit/site.tar.xz")
echo "$kit/site.tar.xz: $size bytes"
[ "$size" -le $((60 * 1024 * 1024)) ] || { echo "that is too much to carry"; exit 1; }
