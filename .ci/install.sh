#!/usr/bin/env bash
# Fills .venv with the pinned versions: PyTorch first and in the build this machine can use, then
# the rest. Called by `make install`. KARMA_RAY_TORCH=cpu|gpu overrides the detection.
set -euo pipefail
cd "$(dirname "$0")/.."

host_python="${PYTHON:-python3}"
python=.venv/bin/python
torch="$(grep '^torch==' constraints.txt)"

"$host_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "karma_ray needs Python 3.11 or newer; '$host_python' is $("$host_python" -V 2>&1)." >&2
  echo "Name another one: make install PYTHON=python3.12" >&2
  exit 1
}

if ! [ -x "$python" ] || ! "$python" -m pip --version >/dev/null 2>&1; then
  echo "== creating .venv"
  # Some distributions ship venv without ensurepip; the host's pip then puts pip in.
  "$host_python" -m venv .venv 2>/dev/null || {
    "$host_python" -m venv --clear --without-pip .venv
    "$host_python" -m pip --python "$python" install pip
  }
fi

wants_gpu_build() {
  case "${KARMA_RAY_TORCH:-auto}" in
    gpu) return 0 ;;
    cpu) return 1 ;;
    auto) ;;
    *) echo "KARMA_RAY_TORCH: '$KARMA_RAY_TORCH' is not valid; choices: auto, cpu, gpu" >&2; exit 2 ;;
  esac
  # macOS has one build only, and it is small.
  [ "$(uname -s)" = Darwin ] || nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

torch_stands() {
  "$python" - "${torch#torch==}" <<'PY' 2>/dev/null
import sys
from importlib.metadata import version

sys.exit(version("torch").split("+")[0] != sys.argv[1])
PY
}

# The general index serves Linux a build that pulls several GB of CUDA; asking for torch before
# anything that depends on it lets the machine decide which build it gets.
if torch_stands; then
  echo "== $torch is already there"
elif wants_gpu_build; then
  echo "== installing $torch (GPU build)"
  "$python" -m pip install -c constraints.txt "$torch"
elif "$python" -m pip install --dry-run --no-deps "$torch+cpu" >/dev/null 2>&1; then
  echo "== installing $torch (CPU build)"
  "$python" -m pip install -c constraints.txt "$torch+cpu"
else
  echo "== installing $torch (CPU build, through uv)"
  "$python" -m pip install -c constraints.txt uv
  "$python" -m uv pip install --python "$python" --torch-backend=cpu --no-deps "$torch" || {
    echo "No CPU build of $torch could be had. KARMA_RAY_TORCH=gpu takes the general one (GBs)." >&2
    exit 1
  }
fi

echo "== installing karma_ray and what it needs"
"$python" -m pip install -c constraints.txt -e ".[dev]"
