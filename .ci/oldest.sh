#!/usr/bin/env bash
# The fast tests with the lowest versions that pyproject.toml allows, in an environment of its own
# (.venv-oldest): what the lower bounds promise is true. Called by `make test-oldest`.
set -euo pipefail
cd "$(dirname "$0")/.."

host_python="${PYTHON:-python3}"
venv=.venv-oldest
python="$venv/bin/python"

[ -x "$python" ] || "$host_python" -m venv "$venv"
"$python" -m pip install --quiet uv

echo "== the lowest versions that the bounds allow"
"$python" -m uv pip compile --quiet --resolution lowest-direct --python "$python" \
  --extra dev --no-annotate --no-header -o "$venv/oldest.txt" pyproject.toml
grep -iE '^(torch|transformers|peft|numpy|polars|pyarrow|ray)(==|\[)' "$venv/oldest.txt"

# The CPU build where its index can be reached; the general one is GBs of CUDA.
torch="$(grep '^torch==' "$venv/oldest.txt")"
"$python" -m uv pip install --quiet --python "$python" --torch-backend=cpu "$torch" ||
  "$python" -m uv pip install --quiet --python "$python" "$torch"
"$python" -m uv pip install --quiet --python "$python" -r "$venv/oldest.txt"
"$python" -m uv pip install --quiet --python "$python" --no-deps -e .

"$python" -m pytest -q --durations=5 -n 2 --dist loadfile "$@"
