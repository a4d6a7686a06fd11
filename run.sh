#!/usr/bin/env bash
# ./run.sh demo|test|setup|wheel|sanitize: everything in .venv, installed again only when pyproject.toml or a kernel changed.
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TORCH_CPP_LOG_LEVEL=ERROR TORCH_LOGS="-all"
export PYTHONWARNINGS=ignore
# Compiled Python is kept, in .venv, whatever a container says: an interpreter then starts in half the time.
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX="${PYTHONPYCACHEPREFIX:-$PWD/.venv/pycache}"

setup() {
  local wanted
  wanted=$(cat pyproject.toml setup.py docker/fbgemm-cpu-shim/pyproject.toml cce_torchrec/{*.h,*/*.h,*/*.cpp} | sha256sum)
  if [ -f .venv/installed ] && [ "$(cat .venv/installed)" = "$wanted" ]; then
    . .venv/bin/activate
    return
  fi
  echo "== installing into .venv (once; again only when pyproject.toml or a kernel changes)"
  local python
  python=$(command -v python3.11 || command -v python3)
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  . .venv/bin/activate
  # torch first and by its exact version: a range would bring the newest build with CUDA packages.
  # Python compiles what is used when it is imported first: much of this never is.
  pip install -q --no-compile torch==2.13.0
  pip install -q --no-compile ./docker/fbgemm-cpu-shim -e '.[cpu,demo,docs,test]'
  pip check
  echo "$wanted" > .venv/installed
}

demo() {
  echo "== flights, DLRM, 2 ranks: full tables, then CCE and hashing at 1/20 of their parameters"
  local method
  for method in full cce hash; do
    echo "-- $method"
    torchrun --nproc-per-node 2 --master-port "${MASTER_PORT:-29533}" -m cce_torchrec.train \
      --method "$method" --dataset flights --epochs "${DEMO_EPOCHS:-2}" --out "runs/demo/$method" --overwrite
  done
  python -m benchmarks.compare runs/demo/full runs/demo/cce runs/demo/hash
}

run_tests() {
  if [ -z "${CCE_DATA_DIR:-}" ] && [ -d ../shared/data ]; then
    CCE_DATA_DIR=$(cd ../shared/data && pwd)
    export CCE_DATA_DIR
  fi
  echo "== ruff"
  ruff check .
  ruff format --check .
  local logs types docs failed=0
  logs=$(mktemp -d)
  # Beside the tests, which leave a core idle now and then.
  mypy > "$logs/mypy" 2>&1 & types=$!
  NO_MKDOCS_2_WARNING=1 mkdocs build --strict -q -d build/site > "$logs/docs" 2>&1 & docs=$!
  # Two at once: most tests have one process busy, those of several ranks wait for each other. In
  # the order of tests/conftest.py; xdist's own would begin the files of few, long tests last.
  echo "== pytest"; python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@" || failed=$?
  wait "$types" || failed=1
  wait "$docs" || failed=1
  echo "== mypy"; cat "$logs/mypy"
  echo "== docs"; cat "$logs/docs"
  rm -r "$logs"
  return "$failed"
}

wheel() {
  echo "== sdist and wheel, and its tests in an empty environment"
  pip install -q -e '.[release]'
  python -m tests.wheel "$@"
}

sanitize() {
  echo "== tests of the compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer"
  timeout 600 python -m tests.sanitize
}

case "${1:-}" in
  demo) setup; demo ;;
  test) shift; setup; run_tests "$@" ;;
  setup) setup ;;
  wheel) shift; setup; wheel "$@" ;;
  sanitize) setup; sanitize ;;
  *) echo "usage: ./run.sh demo|test|setup|wheel [--suite]|sanitize" >&2; exit 2 ;;
esac
